//! Step 2: CPUs and memory.

use super::ffi::Context;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;

pub(super) fn configure(context: &Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    context.set_vm_config(spec.vcpus, spec.memory_mib)
}
