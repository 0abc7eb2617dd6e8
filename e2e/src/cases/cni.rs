//! Input of CNI plugins: capabilities from the pod's configuration and the kubelet's pod CIDR, and the cached result at
//! CHECK and DEL.
//!
//! A recording plugin at the end of the chain keeps its input. Connectivity is tested in [`super::network`].

use crate::case;
use crate::client::{answer, within};
use crate::failure::{During, Result};
use crate::pod::{LONG_TIMEOUT, Pod, pod_spec};
use crate::runner::{Case, Context};
use crate::{ensure, same};
use k8s_cri::v1::*;
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(plugins_receive_their_capabilities, 90),
        case!(check_of_ipv4_pod_with_host_port_passes, 60),
    ]
}

/// Records its input as `<command>.json` and its environment as `<command>.env`.
const RECORDER: &str = "#!/bin/sh\ncd \"$(dirname \"$0\")\" && env > $CNI_COMMAND.env && exec cat > $CNI_COMMAND.json\n";

async fn plugins_receive_their_capabilities(ctx: Context) -> Result {
    let dir = ctx.scratch.join("rec-bin");
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join("recorder"), RECORDER)?;
    std::fs::set_permissions(dir.join("recorder"), std::fs::Permissions::from_mode(0o755))?;
    let leases = ctx.scratch.join("rec-ipam");
    let node = ctx
        .dedicated_node("rec", |o| {
            o.cni_bin = Some(dir.clone());
            o.cni_plugins = Some(json!([
                {"type": "bridge", "bridge": "bxrec", "isGateway": true,
                 "ipam": {"type": "host-local", "dataDir": leases, "ranges": [[{"subnet": "10.89.77.0/24"}]]}},
                {"type": "recorder", "capabilities": {"bandwidth": true, "portMappings": true, "dns": true, "ipRanges": true}}
            ]));
        })
        .await?;
    let config = UpdateRuntimeConfigRequest {
        runtime_config: Some(RuntimeConfig {
            network_config: Some(NetworkConfig {
                pod_cidr: "10.89.77.0/24,fd89:77::/64".into(),
            }),
        }),
    };
    answer(
        "UpdateRuntimeConfig",
        node.cri
            .runtime()
            .update_runtime_config(within(LONG_TIMEOUT, config))
            .await,
    )?;
    let pod = Pod::run_with(&node, with_capabilities(pod_spec(&node, "capabilities"))).await?;
    check_add_input(&dir)?;
    let environment = std::fs::read_to_string(dir.join("ADD.env"))?;
    let name = pod.config.metadata.clone().unwrap_or_default().name;
    for wanted in [
        format!("CNI_CONTAINERID={}", pod.id),
        format!("K8S_POD_NAME={name}"),
        "CNI_IFNAME=eth0".into(),
    ] {
        ensure!(
            environment.contains(&wanted),
            "{wanted} not found in {environment}"
        );
    }
    // A verbose status runs CHECK with the cached result, which names the pod's address; DEL receives the same result.
    let info = pod.status_verbose(true).await?.info;
    let text = info.get("info").cloned().unwrap_or_default();
    ensure!(text.contains("passed CNI CHECK"), "{text}");
    let address = pod.ip().await?;
    let kept = recorded(&dir, "CHECK")?["prevResult"].clone();
    ensure!(
        kept["ips"].to_string().contains(&address),
        "no {address} at CHECK: {kept}"
    );
    pod.end().await?;
    same!(
        recorded(&dir, "DEL")?["prevResult"],
        kept,
        "the result at DEL"
    );
    node.terminate().await
}

/// Debian's portmap looks for IPv6 rules of a pod that has none; a verbose status does not report that as a failure.
async fn check_of_ipv4_pod_with_host_port_passes(ctx: Context) -> Result {
    let leases = ctx.scratch.join("v4-ipam");
    let node = ctx
        .dedicated_node("v4", |o| {
            o.cni_plugins = Some(json!([
                {"type": "bridge", "bridge": "bxv4", "isGateway": true,
                 "ipam": {"type": "host-local", "dataDir": leases, "ranges": [[{"subnet": "10.89.78.0/24"}]]}},
                {"type": "portmap", "capabilities": {"portMappings": true}}
            ]));
        })
        .await?;
    let mut config = pod_spec(&node, "v4");
    config.port_mappings = vec![PortMapping {
        protocol: Protocol::Tcp.into(),
        container_port: 80,
        host_port: 8082,
        host_ip: String::new(),
    }];
    let pod = Pod::run_with(&node, config).await?;
    let info = pod.status_verbose(true).await?.info;
    let text = info.get("info").cloned().unwrap_or_default();
    ensure!(text.contains("passed CNI CHECK"), "{text}");
    pod.end().await?;
    node.terminate().await
}

/// Sets a value for each capability.
fn with_capabilities(mut config: PodSandboxConfig) -> PodSandboxConfig {
    config.annotations = [
        (
            "kubernetes.io/ingress-bandwidth".to_owned(),
            "10M".to_owned(),
        ),
        (
            "kubernetes.io/egress-bandwidth".to_owned(),
            "1Gi".to_owned(),
        ),
    ]
    .into();
    config.port_mappings = vec![PortMapping {
        protocol: Protocol::Udp.into(),
        container_port: 53,
        host_port: 5300,
        host_ip: "127.0.0.1".into(),
    }];
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.96.0.10".into()],
        searches: vec!["svc.cluster.local".into()],
        options: vec!["ndots:5".into()],
    });
    config
}

/// Fails unless ADD received all values of [`with_capabilities`].
fn check_add_input(dir: &Path) -> Result {
    let add = recorded(dir, "ADD")?;
    let runtime = &add["runtimeConfig"];
    same!(
        runtime["bandwidth"]["ingressRate"],
        json!(10_000_000),
        "ingress"
    );
    same!(
        runtime["bandwidth"]["egressRate"],
        json!(1_u64 << 30),
        "egress"
    );
    same!(
        runtime["portMappings"],
        json!([{"hostPort": 5300, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"}]),
        "ports"
    );
    same!(runtime["dns"]["servers"], json!(["10.96.0.10"]), "DNS");
    same!(
        runtime["ipRanges"],
        json!([[{"subnet": "10.89.77.0/24"}], [{"subnet": "fd89:77::/64"}]]),
        "pod CIDRs of UpdateRuntimeConfig"
    );
    Ok(())
}

fn recorded(dir: &Path, command: &str) -> Result<Value> {
    let path = dir.join(format!("{command}.json"));
    let bytes = std::fs::read(&path).during(path.display())?;
    Ok(serde_json::from_slice(&bytes)?)
}
