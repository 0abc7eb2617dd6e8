//! [`StockNode`]: a node whose runtime is a stock containerd with runc, and a kubelet on it. Knows nothing of boxlite.
//!
//! containerd's configuration is in a private `/etc/containerd`, as an installer expects it, and a loop restarts containerd when it
//! ends, as systemd does.

use crate::cgroups::CgroupRoot;
use crate::cluster::certificates::Authority;
use crate::cluster::control_plane::{ControlPlane, url};
use crate::cluster::programs::Programs;
use crate::cluster::{NODE, NODE_IP, condition, healthy, until};
use crate::ensure;
use crate::failure::{Failure, Result};
use crate::image::registry::Registry;
use crate::install::{self, Install};
use crate::namespaces::tmpfs;
use crate::node::write_mirrors;
use crate::service::Service;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::process::Command;

/// Command that makes the loop below start containerd anew.
pub(super) const RESTART: [&str; 3] = ["pkill", "-x", "containerd"];
/// Directories of the machine that the installer and the shim write to, replaced by private ones.
pub(super) const PRIVATE: [&str; 4] = [
    "/etc/containerd",
    "/opt",
    "/etc/boxlite",
    "/var/lib/boxlite",
];
/// Image of the pause containers.
pub(super) const PAUSE: &str = "127.0.0.1:5000/pause:1";
/// Time limit for the node to become Ready.
const READY_TIMEOUT: Duration = Duration::from_secs(90);
/// Lines of the logs in the error for a node that is not Ready.
const LOG_LINES: usize = 15;

/// Running node.
pub(super) struct StockNode {
    containerd: Service,
    kubelet: Service,
    _proxy: Service,
}

impl StockNode {
    /// Starts containerd, kubelet and kube-proxy, and waits until the node is Ready.
    pub(super) async fn start(
        dir: &Path,
        install: &Install,
        programs: &Programs,
        plane: &ControlPlane,
        registry: &Registry,
        cgroups: &CgroupRoot,
    ) -> Result<Self> {
        for private in PRIVATE {
            std::fs::create_dir_all(private)?;
            tmpfs(Path::new(private), "mode=0755,size=1g")?;
        }
        let containerd = containerd(dir, install, registry).await?;
        let node = Self {
            containerd,
            kubelet: kubelet(dir, programs, &plane.authority, cgroups).await?,
            _proxy: proxy(dir, programs, &plane.authority).await?,
        };
        let ready = until("the node is Ready", READY_TIMEOUT, || async {
            let object = plane.kubectl.json(&["get", "node", NODE]).await?;
            ensure!(
                condition(&object, "Ready") == "True",
                "{}",
                object["status"]["conditions"]
            );
            Ok(())
        });
        ready
            .await
            .map_err(|failure| Failure(format!("{failure}\n{}", node.logs())))?;
        Ok(node)
    }

    /// Returns the last lines of the logs.
    pub(super) fn logs(&self) -> String {
        let (containerd, kubelet) = (&self.containerd, &self.kubelet);
        format!(
            "--- containerd\n{}\n--- kubelet\n{}",
            containerd.tail(0, LOG_LINES),
            kubelet.tail(0, LOG_LINES)
        )
    }
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("c.sock")
}

async fn containerd(dir: &Path, install: &Install, registry: &Registry) -> Result<Service> {
    let bin = install::cache().join("containerd-2/usr/bin");
    ensure!(
        bin.join("containerd").exists(),
        "{} not found: run e2e/scripts/containerd 2",
        bin.display()
    );
    std::fs::create_dir_all(dir.join("cni"))?;
    std::fs::write(dir.join("cni/10-chart.conflist"), conflist(dir))?;
    let mirror = (
        "127.0.0.1:5000".to_owned(),
        format!("http://{}", registry.host),
        None,
    );
    write_mirrors(&dir.join("certs.d"), &[mirror])?;
    std::fs::write("/etc/containerd/config.toml", config(dir, &install.cni))?;
    let mut command = Command::new("sh");
    command
        .args(["-c", "while :; do \"$@\"; done", "sh"])
        .arg(bin.join("containerd"))
        .args(["--config", "/etc/containerd/config.toml"])
        .env(
            "PATH",
            format!(
                "{}:{}",
                bin.display(),
                std::env::var("PATH").unwrap_or_default()
            ),
        );
    let service = Service::new("containerd", dir.join("containerd.log"));
    let (ctr, address) = (bin.join("ctr"), socket(dir));
    service
        .start(command, || async {
            let mut version = Command::new(&ctr);
            version.arg("--address").arg(&address).arg("version");
            let output = version.output().await?;
            ensure!(output.status.success(), "ctr version: {}", output.status);
            Ok(())
        })
        .await?;
    Ok(service)
}

fn config(dir: &Path, cni: &Path) -> String {
    let (at, cni) = (dir.display(), cni.display());
    format!(
        r#"version = 3
imports = ["/etc/containerd/conf.d/*.toml"]
root = "{at}/root"
state = "{at}/state"
[grpc]
address = "{at}/c.sock"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE}"
[plugins."io.containerd.cri.v1.images".registry]
config_path = "{at}/certs.d"
[plugins."io.containerd.nri.v1.nri"]
disable = true
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{cni}"]
conf_dir = "{at}/cni"
"#
    )
}

fn conflist(dir: &Path) -> String {
    json!({"cniVersion": "1.0.0", "name": "chart", "plugins": [
        {"type": "bridge", "bridge": "bxchart", "isGateway": true, "ipMasq": true, "hairpinMode": true,
         "ipam": {"type": "host-local", "dataDir": dir.join("ipam"), "ranges": [[{"subnet": "10.88.0.0/24"}]],
                  "routes": [{"dst": "0.0.0.0/0"}]}}
    ]})
    .to_string()
}

async fn kubelet(
    dir: &Path,
    programs: &Programs,
    authority: &Authority,
    cgroups: &CgroupRoot,
) -> Result<Service> {
    let subject = format!("/O=system:nodes/CN=system:node:{NODE}");
    let kubeconfig = authority.kubeconfig("kubelet", &subject, &url())?;
    let names = format!("DNS:{NODE},IP:{NODE_IP}");
    let serving = authority.issue("kubelet-serving", &format!("/CN={NODE}"), &names)?;
    let resolv = dir.join("resolv.conf");
    std::fs::write(&resolv, format!("nameserver {NODE_IP}\n"))?;
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": format!("unix://{}", socket(dir).display()),
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
    });
    let file = dir.join("kubelet.json");
    std::fs::write(&file, serde_json::to_vec_pretty(&config)?)?;
    let mut command = Command::new(programs.program("kubelet"));
    command
        .arg(format!("--config={}", file.display()))
        .arg(format!("--kubeconfig={}", kubeconfig.display()))
        .arg(format!("--root-dir={}", dir.join("kubelet").display()))
        .arg(format!("--cert-dir={}", dir.join("serving").display()))
        .arg(format!("--hostname-override={NODE}"))
        .arg(format!("--node-ip={NODE_IP}"))
        .arg("--v=2");
    let service = Service::new("kubelet", dir.join("kubelet.log"));
    service
        .start(command, || async {
            healthy("http://127.0.0.1:10248/healthz").await
        })
        .await?;
    Ok(service)
}

async fn proxy(dir: &Path, programs: &Programs, authority: &Authority) -> Result<Service> {
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
