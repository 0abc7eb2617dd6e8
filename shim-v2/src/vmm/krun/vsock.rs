//! Step 7: vsock and its two ports. TSI is on only for a pod in the host's network, whose sockets it opens on the host; a pod
//! with its own NIC must not reach the host's network by it.
//!
//! Socket names are relative to the VM's working directory, because a unix socket address holds 107 bytes.

use super::ffi::Context;
use crate::vmm::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::names::{GUEST_PORT, READY_PORT, READY_SOCKET, VSOCK_SOCKET};
use boxlite_proto::vmm::InstanceSpec;

pub(super) fn configure(context: &Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    // libkrun refuses an existing socket file.
    match std::fs::remove_file(spec.work_dir.join(VSOCK_SOCKET)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).step("remove an old vsock socket");
        }
        _ => {}
    }
    context.disable_implicit_vsock()?;
    context.add_vsock(spec.host_network)?;
    context.add_vsock_port(GUEST_PORT, VSOCK_SOCKET, true)?;
    context.add_vsock_port(READY_PORT, READY_SOCKET, false)
}
