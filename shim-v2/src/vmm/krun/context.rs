//! Step 1: the libkrun context. The guest kernel is loaded first, so that libkrun finds it in any directory.

use super::ffi::{self, Context};
use crate::vmm::krunfw;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;

pub(super) fn create(spec: &InstanceSpec) -> BoxliteResult<Context> {
    krunfw::load(&spec.installation.libkrunfw)?;
    ffi::log_errors();
    Context::create()
}
