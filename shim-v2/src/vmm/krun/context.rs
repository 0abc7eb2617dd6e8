//! Step 1: the libkrun context. The guest kernel is loaded first, so that libkrun finds it in any directory.

use super::ffi::{self, Context};
use crate::vmm::krunfw;
use boxlite_proto::error::{BoxliteError, BoxliteResult};
use boxlite_proto::vmm::InstanceSpec;

/// Name of a parameter of TSI, in every kernel that has it.
const TSI_PARAMETER: &[u8] = b"tsi_hijack";

pub(super) fn create(spec: &InstanceSpec) -> BoxliteResult<Context> {
    let library = &spec.installation.libkrunfw;
    krunfw::load(library)?;
    // Without TSI the pod would have no network at all, and nothing would say so.
    if spec.host_network
        && memchr::memmem::find(krunfw::kernel_image(library)?.bytes, TSI_PARAMETER).is_none()
    {
        return Err(BoxliteError::InvalidSpec {
            field: "host_network",
            value: true.to_string(),
            reason: format!(
                "the guest kernel {} has no TSI, by which libkrun opens sockets on the node: use the kernel of Debian's \
                 libkrunfw5, or vmm = \"qemu\"",
                library.display()
            ),
        });
    }
    ffi::log_errors();
    Context::create()
}
