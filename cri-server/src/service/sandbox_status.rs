//! PodSandboxStatus, served from memory. With `verbose`, the network of a ready pod is checked by its plugins (CNI
//! CHECK).

use super::Server;
use crate::convert::sandbox::PodMetadata;
use crate::convert::{status, time, verbose};
use boxlite_proto::cri::v1::{PodSandboxStatusRequest, PodSandboxStatusResponse};
use boxlite_runtime::{BoxSnapshot, BoxState};
use serde_json::json;
use std::collections::HashMap;
use tonic::Status;

/// Handles PodSandboxStatus.
pub(crate) async fn status(
    server: &Server,
    request: PodSandboxStatusRequest,
) -> Result<PodSandboxStatusResponse, Status> {
    let pod = server.pod(&request.pod_sandbox_id)?;
    let snapshot = pod.snapshot();
    let containers_statuses = pod
        .containers()
        .iter()
        .map(status::container_status)
        .collect();
    Ok(PodSandboxStatusResponse {
        status: Some(status::sandbox_status(&snapshot)),
        info: if request.verbose {
            info(server, &snapshot).await
        } else {
            HashMap::new()
        },
        containers_statuses,
        timestamp: time::now_ns(),
    })
}

/// Returns the details that `crictl inspectp` shows besides the status.
async fn info(server: &Server, snapshot: &BoxSnapshot) -> HashMap<String, String> {
    let record = PodMetadata::from_bytes(&snapshot.metadata);
    let mut stages = vec![("cni".to_owned(), record.network_ms)];
    stages.extend(snapshot.timers.stages.iter().cloned());
    let stages: Vec<_> = stages
        .into_iter()
        .map(|(stage, ms)| json!({"stage": stage, "ms": ms}))
        .collect();
    let network = match snapshot.state {
        BoxState::Ready if record.host_network() => "host network".to_owned(),
        BoxState::Ready if record.passt => "passt".to_owned(),
        BoxState::Ready => match server.cni.check(&snapshot.id).await {
            Ok(()) => "passed CNI CHECK".to_owned(),
            Err(error) => {
                let text = boxlite_runtime::report(&error);
                if is_portmap_ipv6_bug(&text, &record.addresses) {
                    "passed CNI CHECK".to_owned()
                } else {
                    text
                }
            }
        },
        _ => "down".to_owned(),
    };
    let linux = record
        .config
        .as_ref()
        .and_then(|config| config.linux.as_ref());
    let info = json!({
        "pid": snapshot.shim_pid,
        "resources": verbose::pod_resources(linux.and_then(|linux| linux.resources.as_ref())),
        "overhead": verbose::pod_resources(linux.and_then(|linux| linux.overhead.as_ref())),
        "config": record.config.as_ref().map(verbose::sandbox_config),
        "runtimeHandler": record.runtime_handler,
        "network": network,
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

/// Returns whether CHECK failed because of a bug of portmap before 1.2 (containernetworking/plugins): it looks for IPv6 rules of a pod
/// that has only IPv4 addresses.
fn is_portmap_ipv6_bug(error: &str, addresses: &[String]) -> bool {
    let has_ipv6 = addresses.iter().any(|address| address.contains(':'));
    !has_ipv6 && error.contains("portmap") && error.contains("could not check ipv6 dnat")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portmap_check_of_ipv6_rules_is_ignored_for_ipv4_pods() {
        let error = "failed to run CHECK of CNI plugin \"portmap\": could not check ipv6 dnat";
        let pod = |addresses: &[&str]| -> Vec<String> {
            addresses
                .iter()
                .map(|address| (*address).to_owned())
                .collect()
        };
        assert!(is_portmap_ipv6_bug(error, &pod(&["10.1.2.3"])));
        assert!(!is_portmap_ipv6_bug(error, &pod(&["10.1.2.3", "fd00::3"])));
        let other = "failed to run CHECK of CNI plugin \"bridge\": no interface";
        assert!(!is_portmap_ipv6_bug(other, &pod(&["10.1.2.3"])));
    }
}
