//! [`Node`]: one boxlite-cri with roots, CNI and registry configuration of its own, and a client of it.
//!
//! Starts, kills and restarts the daemon as an init system would; what runs in pods is [`crate::pod`]'s affair. Called by
//! tests, demo and bench.

use crate::client::Cri;
use crate::ensure;
use crate::install::Install;
use crate::outcome::Result;
use crate::service::Service;
use k8s_cri::v1::VersionRequest;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;
use tokio::process::Command;

/// `host`, `server` (a URL) and an optional CA: one hosts.toml.
pub type Mirror = (String, String, Option<PathBuf>);

/// What differs between nodes.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// Short: its files lie below `<scratch>/<name>`.
    pub name: String,
    /// `auto`, `qemu`, `krun`.
    pub vmm: String,
    /// Where images come from.
    pub registries: Vec<Mirror>,
    /// Whether there is a CNI configuration.
    pub network: bool,
    /// Whether the default CNI plugin chain masquerades and maps host ports: both run iptables some ten times a pod.
    pub iptables: bool,
    /// Instead of the default CNI plugin chain.
    pub cni_plugins: Option<serde_json::Value>,
    /// More directories with CNI plugins, in front.
    pub cni_bin: Option<PathBuf>,
    /// Seconds until a hanging plugin is killed.
    pub cni_timeout: u32,
    /// Instead of the installed agent.
    pub guest: Option<PathBuf>,
    /// Seconds for one RunPodSandbox.
    pub run_pod_seconds: u32,
}

impl NodeOptions {
    /// The usual node of this name.
    pub fn new(name: &str, vmm: &str) -> Self {
        Self {
            name: name.into(),
            vmm: vmm.into(),
            registries: Vec::new(),
            network: true,
            iptables: true,
            cni_plugins: None,
            cni_bin: None,
            cni_timeout: 20,
            guest: None,
            run_pod_seconds: 230,
        }
    }
}

/// A node.
pub struct Node {
    /// All its files.
    pub dir: PathBuf,
    /// CRI client.
    pub cri: Cri,
    /// `127.0.0.1:<port>` of the metrics page.
    pub metrics: String,
    program: PathBuf,
    service: Service,
}

static SUBNET: AtomicU16 = AtomicU16::new(1);

impl Node {
    /// Writes the configuration and starts the daemon.
    pub async fn start(scratch: &Path, install: &Install, options: &NodeOptions) -> Result<Self> {
        let node = Self::prepare(scratch, install, options)?;
        node.serve().await?;
        Ok(node)
    }

    /// Writes the configuration only.
    pub fn prepare(scratch: &Path, install: &Install, options: &NodeOptions) -> Result<Self> {
        let dir = scratch.join(&options.name);
        let subnet = SUBNET.fetch_add(1, Ordering::Relaxed);
        for sub in ["cni", "certs.d", "logs", "ipam"] {
            std::fs::create_dir_all(dir.join(sub))?;
        }
        let metrics = format!("127.0.0.1:{}", 9700 + subnet);
        if options.network {
            std::fs::write(
                dir.join("cni/10-e2e.conflist"),
                conflist(&dir, subnet, options)?,
            )?;
        }
        write_mirrors(&dir.join("certs.d"), &options.registries)?;
        std::fs::write(
            dir.join("config.toml"),
            config(&dir, install, options, &metrics),
        )?;
        Ok(Self {
            cri: Cri::lazy(&dir.join("cri.sock"))?,
            metrics,
            program: install.daemon.clone(),
            service: Service::new("boxlite-cri", dir.join("daemon.log")),
            dir,
        })
    }

    /// A node that somebody else's daemon serves at `<dir>/c.sock`: only its CRI client and its directory are of use.
    pub fn foreign(dir: &Path) -> Result<Self> {
        Ok(Self {
            cri: Cri::lazy(&dir.join("c.sock"))?,
            metrics: String::new(),
            program: PathBuf::new(),
            service: Service::new("somebody else's daemon", PathBuf::new()),
            dir: dir.to_owned(),
        })
    }

    /// Runs the daemon and waits until it answers.
    pub async fn serve(&self) -> Result {
        let mut command = Command::new(&self.program);
        command
            .args(["serve", "--config"])
            .arg(self.dir.join("config.toml"));
        self.service
            .start(command, || async {
                let mut client = self.cri.runtime();
                client.version(VersionRequest::default()).await?;
                Ok(())
            })
            .await
    }

    /// kill -9 of the daemon alone, as a crash would.
    pub async fn kill(&self) -> Result {
        self.service.kill().await
    }

    /// SIGTERM and wait, as an upgrade would; pods go on.
    pub async fn terminate(&self) -> Result {
        self.service.terminate().await
    }

    /// The daemon's CRI socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("cri.sock")
    }

    /// The daemon's process.
    pub fn service(&self) -> &Service {
        &self.service
    }

    /// The daemon's log.
    pub fn log(&self) -> PathBuf {
        self.service.log().to_owned()
    }

    /// Its last lines.
    pub fn log_tail(&self, lines: usize) -> String {
        self.log_since(0, lines)
    }

    /// The last lines of what was written behind `mark` bytes.
    pub fn log_since(&self, mark: usize, lines: usize) -> String {
        self.service.tail(mark, lines)
    }

    /// Where IPAM keeps leases.
    pub fn leases(&self) -> PathBuf {
        self.dir.join("ipam/e2e")
    }

    /// The Prometheus page.
    pub async fn metrics_page(&self) -> Result<String> {
        let url = format!("http://{}/metrics", self.metrics);
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(20))
            .build()?;
        let answer = client.get(url).send().await?;
        ensure!(
            answer.status().is_success(),
            "/metrics: {}",
            answer.status()
        );
        Ok(answer.text().await?)
    }
}

/// One `hosts.toml` below `dir` for each, in containerd's layout.
pub fn write_mirrors(dir: &Path, mirrors: &[Mirror]) -> Result {
    for (host, server, ca) in mirrors {
        let at = dir.join(host);
        std::fs::create_dir_all(&at)?;
        let mut toml = format!(
            "server = \"{server}\"\n\n[host.\"{server}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
        );
        if let Some(ca) = ca {
            toml.push_str(&format!("  ca = \"{}\"\n", ca.display()));
        }
        std::fs::write(at.join("hosts.toml"), toml)?;
    }
    Ok(())
}

fn conflist(dir: &Path, subnet: u16, options: &NodeOptions) -> Result<String> {
    let plugins = options.cni_plugins.clone().unwrap_or_else(|| {
        let bridge = serde_json::json!(
            {"type": "bridge", "bridge": format!("bx{subnet}"), "isGateway": true, "ipMasq": options.iptables, "hairpinMode": true,
             "ipam": {"type": "host-local", "dataDir": dir.join("ipam"),
                      "ranges": [[{"subnet": format!("10.88.{subnet}.0/24")}], [{"subnet": format!("fd88:{subnet:x}::/64")}]],
                      "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}}
        );
        if !options.iptables {
            return serde_json::json!([bridge]);
        }
        serde_json::json!([
            bridge,
            {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}
        ])
    });
    Ok(serde_json::to_string_pretty(
        &serde_json::json!({"cniVersion": "1.0.0", "name": "e2e", "plugins": plugins}),
    )?)
}

fn config(dir: &Path, install: &Install, options: &NodeOptions, metrics: &str) -> String {
    let at = dir.display();
    let bins: Vec<_> = options
        .cni_bin
        .iter()
        .chain([&install.cni])
        .map(|p| format!("\"{}\"", p.display()))
        .collect();
    format!(
        r#"root = "{at}/root"
state = "{at}/state"
listen = "unix://{at}/cri.sock"
log_level = "info"
vmm = "{}"

[paths]
guest = "{}"
shim = "{}"
libkrunfw = "{}"
qemu = "{}"
virtiofsd = "{}"
vhost_device_vsock = "{}"

[cni]
conf_dir = "{at}/cni"
bin_dirs = [{}]
timeout_seconds = {}

[registry]
config_path = "{at}/certs.d"

[nri]
enable = true
socket_path = "{at}/nri.sock"
plugin_path = "{at}/nri/plugins"
plugin_config_path = "{at}/nri/conf.d"

[metrics]
listen = "{metrics}"

[timeouts]
run_pod_seconds = {}
"#,
        options.vmm,
        options.guest.as_ref().unwrap_or(&install.guest).display(),
        install.shim.display(),
        install.libkrunfw.display(),
        install.qemu.display(),
        install.virtiofsd.display(),
        install.vhost_device_vsock.display(),
        bins.join(", "),
        options.cni_timeout,
        options.run_pod_seconds,
    )
}
