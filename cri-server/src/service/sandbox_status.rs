//! PodSandboxStatus: from memory, never from a VM.

use super::Server;
use crate::convert::sandbox::SandboxRecord;
use crate::convert::{status, time};
use boxlite_proto::cri::v1::{PodSandboxStatusRequest, PodSandboxStatusResponse};
use boxlite_runtime::BoxSnapshot;
use serde_json::json;
use std::collections::HashMap;
use tonic::Status;

/// The call.
pub fn status(
    server: &Server,
    request: &PodSandboxStatusRequest,
) -> Result<PodSandboxStatusResponse, Status> {
    let pod = server.pod(&request.pod_sandbox_id)?;
    let snapshot = pod.snapshot();
    let containers_statuses = pod
        .containers()
        .iter()
        .map(|container| status::container_status(container, server.updates.get(&container.id)))
        .collect();
    Ok(PodSandboxStatusResponse {
        status: Some(status::sandbox_status(&snapshot)),
        info: if request.verbose {
            info(&snapshot)
        } else {
            HashMap::new()
        },
        containers_statuses,
        timestamp: time::now_ns(),
    })
}

/// What `crictl inspectp` shows beside the status.
fn info(snapshot: &BoxSnapshot) -> HashMap<String, String> {
    let record = SandboxRecord::decoded(&snapshot.metadata);
    let mut stages = vec![("cni".to_owned(), record.network_ms)];
    stages.extend(snapshot.timers.stages.iter().cloned());
    let stages: Vec<_> = stages
        .into_iter()
        .map(|(stage, ms)| json!({"stage": stage, "ms": ms}))
        .collect();
    let info = json!({
        "state": format!("{:?}", snapshot.state),
        "reason": snapshot.reason,
        "vmm": snapshot.vmm.to_string(),
        "shimPid": snapshot.shim_pid,
        "vcpus": snapshot.options.vcpus,
        "memoryMiB": snapshot.options.memory_mib,
        "netns": snapshot.options.netns,
        "startStages": stages,
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}
