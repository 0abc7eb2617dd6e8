//! Step 5: block devices, named by their serials.

use super::ffi::Context;
use crate::vmm::step::{invalid, require};
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;

pub(super) fn configure(context: &Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    for disk in &spec.disks {
        require("a disk image", &disk.path)?;
        let path = disk.path.to_str();
        let path = path.ok_or_else(|| invalid("disks.path", disk.path.display(), "not UTF-8"))?;
        context.add_disk(&disk.serial, path, disk.read_only)?;
    }
    Ok(())
}
