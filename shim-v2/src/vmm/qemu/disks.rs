//! Step 5: data disks, named by their serials.

use super::context::Context;
use crate::vmm::step::require;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;

pub(super) fn configure(context: &mut Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    for (index, disk) in spec.disks.iter().enumerate() {
        require("a disk image", &disk.path)?;
        let mode = if disk.read_only {
            "readonly=on"
        } else {
            "discard=unmap"
        };
        let path = disk.path.display();
        // cache=unsafe ignores the guest's flushes. That is safe for these disks: the agent's image is read-only, and the scratch
        // disk is created for this VM and removed with it, so data lost by a host crash is never read. Persistent data is in
        // volumes.
        // Errors are reported to the guest, whose writer gets EIO. By default QEMU pauses the VM on ENOSPC until its monitor
        // resumes it.
        let drive = format!(
            "file={path},if=none,id=disk{index},format=raw,cache=unsafe,file.locking=off,\
             werror=report,rerror=report,{mode}"
        );
        context.option("-drive", drive);
        context.option(
            "-device",
            format!("virtio-blk-device,drive=disk{index},serial={}", disk.serial),
        );
        match disk.read_only {
            true => context.read_only.push(disk.path.clone()),
            false => context.read_write.push(disk.path.clone()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use boxlite_proto::vmm::Disk;

    /// With QEMU's default, werror=enospc, a full disk of the node pauses the VM.
    #[test]
    fn configure_reports_disk_errors_to_the_guest() {
        let image = tempfile::NamedTempFile::new().expect("image");
        let mut context = Context::default();
        let spec = InstanceSpec {
            disks: vec![Disk {
                path: image.path().to_owned(),
                serial: "scratch".to_owned(),
                read_only: false,
            }],
            ..crate::vmm::tests::spec(boxlite_proto::vmm::VmmKind::Qemu)
        };
        configure(&mut context, &spec).expect("configured");
        let drive = context.args.iter().find(|arg| arg.starts_with("file="));
        let drive = drive.expect("a drive");
        for option in ["werror=report", "rerror=report"] {
            assert!(drive.split(',').any(|part| part == option), "{drive}");
        }
    }
}
