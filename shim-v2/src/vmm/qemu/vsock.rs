//! Step 7: vsock by vhost-device-vsock: a connect to `vsock` and `CONNECT 2695` reaches the agent; the agent's call to
//! 2696 reaches `vsock_2696`. No vhost-vsock of the host's kernel is involved.

use super::context::Context;
use crate::vmm::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::names::VSOCK_SOCKET;
use boxlite_proto::vmm::InstanceSpec;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

pub(super) fn configure(context: &mut Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    // In the VM's working directory. A name that no other VM has ever had: see wait_listening.
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .step("reading the clock")?;
    context.vsock_socket = format!("vhu-{:x}", now.as_nanos());
    remove_old(&spec.work_dir.join(VSOCK_SOCKET))?;
    context.option(
        "-chardev",
        format!("socket,id=vsock,path={}", context.vsock_socket),
    );
    context.option("-device", "vhost-user-vsock-device,chardev=vsock");
    Ok(())
}

/// A socket file left by an earlier start of the same pod keeps a new one from being bound.
fn remove_old(socket: &Path) -> BoxliteResult<()> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).step("removing an old vsock socket")
        }
        _ => Ok(()),
    }
}

/// Arguments of vhost-device-vsock. Names are relative to the VM's working directory.
pub(super) fn device_args(socket: &str) -> Vec<String> {
    // Packets over 32 KiB stall a connection for ever with the default buffer (measured).
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
