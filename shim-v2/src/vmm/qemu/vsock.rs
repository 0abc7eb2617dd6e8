//! Step 7: vsock by vhost-device-vsock. A client of `vsock` that sends `CONNECT 2695` reaches the agent; the agent's
//! connection to port 2696 reaches `vsock_2696`. The host kernel's vhost-vsock is not used.

use super::context::Context;
use crate::vmm::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::names::VSOCK_SOCKET;
use boxlite_proto::vmm::InstanceSpec;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

pub(super) fn configure(context: &mut Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    // In the VM's working directory, under a name no other VM has used; see wait_listening.
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .step("read the clock")?;
    context.vsock_socket = format!("vhu-{:x}", now.as_nanos());
    remove_old(&spec.work_dir.join(VSOCK_SOCKET))?;
    context.option(
        "-chardev",
        format!("socket,id=vsock,path={}", context.vsock_socket),
    );
    context.option("-device", "vhost-user-vsock-device,chardev=vsock");
    Ok(())
}

/// Removes the socket file of an earlier start of the same pod, which would prevent binding.
fn remove_old(socket: &Path) -> BoxliteResult<()> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).step("remove an old vsock socket")
        }
        _ => Ok(()),
    }
}

/// Returns the arguments of vhost-device-vsock. Names are relative to the VM's working directory.
pub(super) fn device_args(socket: &str) -> Vec<String> {
    // With the default buffer, packets over 32 KiB stall a connection (measured).
    let socket = format!("--socket={socket}");
    let names = [
        "--guest-cid=3",
        &socket,
        "--uds-path",
        VSOCK_SOCKET,
        "--tx-buffer-size=32768",
    ];
    names.map(str::to_owned).to_vec()
}
