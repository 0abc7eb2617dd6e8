//! Step 4: the pod's virtiofs share.

use super::ffi::Context;
use crate::vmm::step::invalid;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::names::SHARE_TAG;
use boxlite_proto::vmm::InstanceSpec;

/// DAX is off: it would take another memory slot of the guest, and others can truncate files mapped through it, which kills the
/// reader.
const DAX_BYTES: u64 = 0;

pub(super) fn configure(context: &Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    let path = spec.share_dir.to_str();
    let path = path.ok_or_else(|| invalid("share_dir", spec.share_dir.display(), "not UTF-8"))?;
    context.add_virtiofs(SHARE_TAG, Some(path), DAX_BYTES, false)
}
