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
        let drive = format!(
            "file={path},if=none,id=disk{index},format=raw,cache=unsafe,file.locking=off,{mode}"
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
