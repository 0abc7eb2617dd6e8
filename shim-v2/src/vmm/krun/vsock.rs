//! Step 7: vsock, and its two ports. Without TSI (a pod with its own card must not reach the host's network past it), but for
//! a pod in the host's network: its sockets are the host's by TSI.
//!
//! Socket names are relative to the working directory, which is the VM's: a unix address holds 107 bytes.

use super::ffi::Context;
use crate::vmm::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::names::{GUEST_PORT, READY_PORT, READY_SOCKET, VSOCK_SOCKET};
use boxlite_proto::vmm::InstanceSpec;

pub(super) fn configure(context: &Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    // libkrun refuses a socket file that exists.
    match std::fs::remove_file(spec.work_dir.join(VSOCK_SOCKET)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).step("removing an old vsock socket");
        }
        _ => {}
    }
    context.disable_implicit_vsock()?;
    context.add_vsock(spec.host_network)?;
    context.add_vsock_port(GUEST_PORT, VSOCK_SOCKET, true)?;
    context.add_vsock_port(READY_PORT, READY_SOCKET, false)
}
