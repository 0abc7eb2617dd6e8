//! [`StockNode`]: a node whose runtime is a stock containerd with runc, and a kubelet on it. Knows nothing of boxlite.
//!
//! containerd's configuration is in a private `/etc/containerd`, as an installer expects it, and a loop restarts containerd when it
//! ends, as systemd does.

use crate::cgroups::CgroupRoot;
use crate::cluster::control_plane::ControlPlane;
use crate::cluster::node_programs;
use crate::cluster::programs::Programs;
use crate::containerd::stock;
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

/// Command that restarts containerd: the node starts it again whenever it ends.
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
            kubelet: kubelet(dir, programs, plane, cgroups).await?,
            _proxy: node_programs::proxy(dir, programs, &plane.authority).await?,
        };
        node_programs::ready(&plane.kubectl, READY_TIMEOUT)
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
    stock::configuration(
        dir,
        cni,
        PAUSE,
        r#"imports = ["/etc/containerd/conf.d/*.toml"]"#,
        r#"[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2""#,
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
    plane: &ControlPlane,
    cgroups: &CgroupRoot,
) -> Result<Service> {
    let configuration =
        node_programs::kubelet_configuration(dir, &plane.authority, &socket(dir), cgroups)?;
    let text = serde_json::to_vec_pretty(&configuration)?;
    std::fs::write(node_programs::kubelet_file(dir), text)?;
    let service = Service::new("kubelet", dir.join("kubelet.log"));
    node_programs::start_kubelet(&service, dir, programs).await?;
    Ok(service)
}
