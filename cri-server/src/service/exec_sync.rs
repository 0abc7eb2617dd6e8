//! ExecSync: runs a command to completion with bounded output.

use super::{Server, status_of};
use crate::convert::ConvertError;
use boxlite_proto::cri::v1::{ExecSyncRequest, ExecSyncResponse};
use std::time::Duration;
use tonic::Status;

/// Maximum size of stdout and of stderr: both, with their framing, fit into the 16 MiB that a kubelet reads.
const MAX_OUTPUT_BYTES: usize = (8 << 20) - (4 << 10);

/// Handles ExecSync. A timeout is DEADLINE_EXCEEDED; a timeout or a disconnecting client kills the command and all
/// its descendants.
pub(crate) async fn exec(
    server: &Server,
    request: ExecSyncRequest,
) -> Result<ExecSyncResponse, Status> {
    if request.cmd.first().is_none_or(String::is_empty) {
        return Err(ConvertError::Missing("cmd").into());
    }
    let (pod, container) = server.running_container(&request.container_id)?;
    // Zero and negative values mean "no timeout".
    let timeout = u64::try_from(request.timeout)
        .ok()
        .filter(|seconds| *seconds > 0)
        .map(Duration::from_secs);
    let output = pod
        .exec_sync(&container.id, request.cmd, timeout, MAX_OUTPUT_BYTES)
        .await
        .map_err(status_of)?;
    if output.truncated {
        tracing::info!(limit = MAX_OUTPUT_BYTES, "ExecSync output truncated");
    }
    Ok(ExecSyncResponse {
        stdout: output.stdout.into(),
        stderr: output.stderr.into(),
        exit_code: output.exit_code,
    })
}
