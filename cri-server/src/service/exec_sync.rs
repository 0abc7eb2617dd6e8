//! ExecSync: a command from start to exit code, its output bounded.

use super::{Server, status_of};
use boxlite_proto::cri::v1::{ExecSyncRequest, ExecSyncResponse};
use std::time::Duration;
use tonic::Status;

/// Most bytes of stdout and of stderr: both, with their framing, fit into the 16 MiB that a kubelet reads.
const MAX_OUTPUT_BYTES: usize = (8 << 20) - (4 << 10);

/// The call. A timeout is DEADLINE_EXCEEDED; it and a client that goes away kill the command with all it started.
pub async fn exec(server: &Server, request: ExecSyncRequest) -> Result<ExecSyncResponse, Status> {
    if request.cmd.first().is_none_or(String::is_empty) {
        return Err(Status::invalid_argument("cmd is missing"));
    }
    let (pod, container) = server.running_container(&request.container_id)?;
    // 0, and what is below, is "no timeout".
    let timeout = u64::try_from(request.timeout)
        .ok()
        .filter(|seconds| *seconds > 0)
        .map(Duration::from_secs);
    let output = pod
        .exec_sync(&container.id, request.cmd, timeout, MAX_OUTPUT_BYTES)
        .await
        .map_err(status_of)?;
    if output.truncated {
        tracing::info!(limit = MAX_OUTPUT_BYTES, "output of an ExecSync was cut");
    }
    Ok(ExecSyncResponse {
        stdout: output.stdout.into(),
        stderr: output.stderr.into(),
        exit_code: output.exit_code,
    })
}
