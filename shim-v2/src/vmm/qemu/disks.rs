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
        // cache=unsafe ignores the guest's flushes, and is right here: these are the agent's image, which nobody writes,
        // and the scratch disk, which is made for this VM and removed with it. No VM ever boots from it again, so what a
        // crash of the host leaves half written in it is never read. Data that must live on is in volumes, not here.
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
