//! kubelet and kube-proxy of the cluster's node, whichever runtime it has. The runtimes are in `worker` and `chart`.

use super::certificates::Authority;
use super::control_plane::url;
use super::kubectl::Kubectl;
use super::programs::Programs;
use super::{NODE, NODE_IP, condition, healthy, until};
use crate::cgroups::CgroupRoot;
use crate::ensure;
use crate::failure::Result;
use crate::service::Service;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::process::Command;

/// Returns the file of the kubelet's configuration.
pub(super) fn kubelet_file(dir: &Path) -> PathBuf {
    dir.join("kubelet.json")
}

/// Issues the kubelet's certificates and returns its configuration for the runtime at `socket`.
pub(super) fn kubelet_configuration(
    dir: &Path,
    authority: &Authority,
    socket: &Path,
    cgroups: &CgroupRoot,
) -> Result<Value> {
    let subject = format!("/O=system:nodes/CN=system:node:{NODE}");
    authority.kubeconfig("kubelet", &subject, &url())?;
    let names = format!("DNS:{NODE},IP:{NODE_IP}");
    let serving = authority.issue("kubelet-serving", &format!("/CN={NODE}"), &names)?;
    // Pods with dnsPolicy Default get this file; there is no name server outside.
    let resolv = dir.join("resolv.conf");
    std::fs::write(&resolv, format!("nameserver {NODE_IP}\n"))?;
    Ok(json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": format!("unix://{}", socket.display()),
        "runtimeRequestTimeout": "4m",
        "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true},
            "x509": {"clientCAFile": authority.at("ca.crt")}},
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": serving.certificate, "tlsPrivateKeyFile": serving.key,
        "resolvConf": resolv,
        "cgroupDriver": "cgroupfs", "cgroupRoot": cgroups.name, "cgroupsPerQOS": true,
        "enforceNodeAllocatable": ["pods"],
        // cgroup v1, swap and a root without CAP_SYS_RESOURCE are properties of the test machine.
        "failCgroupV1": false, "failSwapOn": false, "oomScoreAdj": 0,
        "featureGates": {"KubeletInUserNamespace": true},
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "2%", "imagefs.available": "2%"},
        "volumePluginDir": dir.join("volume-plugins"),
        "nodeStatusUpdateFrequency": "5s",
    }))
}

/// Starts the kubelet with the configuration in [`kubelet_file`] and waits until it is healthy.
pub(super) async fn start_kubelet(service: &Service, dir: &Path, programs: &Programs) -> Result {
    let mut command = Command::new(programs.program("kubelet"));
    command
        .arg(format!("--config={}", kubelet_file(dir).display()))
        .arg(format!(
            "--kubeconfig={}",
            dir.join("pki/kubelet.kubeconfig").display()
        ))
        // On the file system of the images and scratch disks, as on most nodes.
        .arg(format!("--root-dir={}", dir.join("kubelet").display()))
        .arg(format!("--cert-dir={}", dir.join("serving").display()))
        .arg(format!("--hostname-override={NODE}"))
        .arg(format!("--node-ip={NODE_IP}"))
        .arg("--v=2");
    service
        .start(command, || async {
            healthy("http://127.0.0.1:10248/healthz").await
        })
        .await
}

/// Starts kube-proxy and waits until it is healthy.
pub(super) async fn proxy(
    dir: &Path,
    programs: &Programs,
    authority: &Authority,
) -> Result<Service> {
    let kubeconfig = authority.kubeconfig("proxy", "/CN=system:kube-proxy", &url())?;
    let mut command = Command::new(programs.program("kube-proxy"));
    command
        .arg(format!("--kubeconfig={}", kubeconfig.display()))
        .arg(format!("--hostname-override={NODE}"))
        .args(["--proxy-mode=iptables", "--cluster-cidr=10.88.0.0/16"])
        // The machine's conntrack table is not the cluster's.
        .args([
            "--conntrack-max-per-core=0",
            "--conntrack-tcp-timeout-established=0",
        ])
        .arg("--conntrack-tcp-timeout-close-wait=0");
    let service = Service::new("kube-proxy", dir.join("proxy.log"));
    service
        .start(command, || async {
            healthy("http://127.0.0.1:10249/healthz").await
        })
        .await?;
    Ok(service)
}

/// Waits until the node is Ready as the API server reports it.
pub(super) async fn ready(kubectl: &Kubectl, limit: Duration) -> Result {
    until("the node is Ready", limit, || async {
        let node = kubectl.json(&["get", "node", NODE]).await?;
        ensure!(
            condition(&node, "Ready") == "True",
            "{}",
            node["status"]["conditions"]
        );
        Ok(())
    })
    .await
}
