//! [`Node`]: a boxlite-cri daemon with private root and state directories, CNI and registry configuration, and a CRI
//! client.
//!
//! Starts, kills and restarts the daemon as an init system would; [`crate::pod`] manages its pods. Used by tests, demo
//! and bench.

use crate::client::Cri;
use crate::ensure;
use crate::failure::Result;
use crate::install::Install;
use crate::service::Service;
use k8s_cri::v1::{
    Container, ListContainersRequest, ListPodSandboxRequest, PodSandbox, VersionRequest,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;
use tokio::process::Command;

/// Host, server URL and optional CA of a hosts.toml.
pub(crate) type Mirror = (String, String, Option<PathBuf>);

/// Options of a node.
#[derive(Debug, Clone)]
pub(crate) struct NodeOptions {
    /// Name of the directory below the scratch directory. Short, because socket paths are limited.
    pub name: String,
    /// `vmm` key: `auto`, `qemu` or `krun`.
    pub vmm: String,
    /// Registry mirrors.
    pub registries: Vec<Mirror>,
    /// True to write a CNI configuration.
    pub network: bool,
    /// True if the default CNI plugin chain does masquerading and host ports: both run iptables about ten times per pod.
    pub iptables: bool,
    /// Replacement for the default CNI plugin chain.
    pub cni_plugins: Option<serde_json::Value>,
    /// Additional directory of CNI plugins, searched first.
    pub cni_bin: Option<PathBuf>,
    /// CNI plugin timeout in seconds.
    pub cni_timeout: u32,
    /// Replacement for the installed agent.
    pub guest: Option<PathBuf>,
    /// RunPodSandbox timeout in seconds.
    pub run_pod_seconds: u32,
    /// NRI socket; by default in the node's directory.
    pub nri_socket: Option<PathBuf>,
    /// Number of vCPUs of a pod without CPU limit; the runtime's default otherwise.
    pub vcpus: Option<u8>,
    /// `pod.shared_volume_writers` key; the runtime's default otherwise.
    pub shared_volume_writers: Option<&'static str>,
    /// Lines of the section `[pool]`; none otherwise.
    pub pool: Option<String>,
    /// Lines of the section `[host_pods]`; none otherwise.
    pub host_pods: Option<String>,
    /// `network.without_cni` key; the runtime's default otherwise.
    pub without_cni: Option<&'static str>,
    /// Replacement for the installed passt.
    pub passt: Option<PathBuf>,
}

impl NodeOptions {
    /// Returns the default options.
    pub(crate) fn new(name: &str, vmm: &str) -> Self {
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
            nri_socket: None,
            vcpus: None,
            shared_volume_writers: None,
            pool: None,
            host_pods: None,
            without_cni: None,
            passt: None,
        }
    }
}

/// A node under test.
pub(crate) struct Node {
    /// Directory of all its files.
    pub dir: PathBuf,
    /// CRI client of the daemon.
    pub cri: Cri,
    /// Address of the metrics page, `127.0.0.1:<port>`.
    pub metrics: String,
    program: PathBuf,
    service: Service,
}

static SUBNET: AtomicU16 = AtomicU16::new(1);

impl Node {
    /// Writes the configuration and starts the daemon.
    pub(crate) async fn start(
        scratch: &Path,
        install: &Install,
        options: &NodeOptions,
    ) -> Result<Self> {
        let node = Self::prepare(scratch, install, options)?;
        node.serve().await?;
        Ok(node)
    }

    /// Writes the configuration without starting the daemon.
    pub(crate) fn prepare(
        scratch: &Path,
        install: &Install,
        options: &NodeOptions,
    ) -> Result<Self> {
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

    /// Returns a node for another daemon that serves CRI at `<dir>/c.sock`. Only its CRI client and directory are
    /// usable.
    pub(crate) fn foreign(dir: &Path) -> Result<Self> {
        Ok(Self {
            cri: Cri::lazy(&dir.join("c.sock"))?,
            metrics: String::new(),
            program: PathBuf::new(),
            service: Service::new("another daemon", PathBuf::new()),
            dir: dir.to_owned(),
        })
    }

    /// Starts the daemon and waits until it answers.
    pub(crate) async fn serve(&self) -> Result {
        self.serve_with(|_| {}).await
    }

    /// Starts the daemon with a changed command and waits until it answers.
    pub(crate) async fn serve_with(&self, change: impl FnOnce(&mut Command)) -> Result {
        let mut command = Command::new(&self.program);
        command
            .args(["serve", "--config"])
            .arg(self.dir.join("config.toml"));
        change(&mut command);
        self.service
            .start(command, || async {
                let mut client = self.cri.runtime();
                client.version(VersionRequest::default()).await?;
                Ok(())
            })
            .await
    }

    /// Kills the daemon with SIGKILL, without its shims.
    pub(crate) async fn kill(&self) -> Result {
        self.service.kill().await
    }

    /// Terminates the daemon with SIGTERM and waits, as an upgrade does; pods keep running.
    pub(crate) async fn terminate(&self) -> Result {
        self.service.terminate().await
    }

    /// Returns all pods.
    pub(crate) async fn pods(&self) -> Result<Vec<PodSandbox>> {
        let request = ListPodSandboxRequest::default();
        let list = self.cri.runtime().list_pod_sandbox(request).await?;
        Ok(list.into_inner().items)
    }

    /// Returns the containers of all pods.
    pub(crate) async fn containers(&self) -> Result<Vec<Container>> {
        let request = ListContainersRequest::default();
        let list = self.cri.runtime().list_containers(request).await?;
        Ok(list.into_inner().containers)
    }

    /// Returns the path of the CRI socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("cri.sock")
    }

    /// Returns the daemon's process.
    pub(crate) fn service(&self) -> &Service {
        &self.service
    }

    /// Returns the path of the daemon's log.
    pub(crate) fn log(&self) -> PathBuf {
        self.service.log().to_owned()
    }

    /// Returns the last lines of the log.
    pub(crate) fn log_tail(&self, lines: usize) -> String {
        self.log_since(0, lines)
    }

    /// Returns the last lines written after `mark` bytes.
    pub(crate) fn log_since(&self, mark: usize, lines: usize) -> String {
        self.service.tail(mark, lines)
    }

    /// Returns the directory of the IPAM leases.
    pub(crate) fn leases(&self) -> PathBuf {
        self.dir.join("ipam/e2e")
    }

    /// Returns the Prometheus metrics page.
    pub(crate) async fn metrics_page(&self) -> Result<String> {
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

    /// Returns the value of a metric, given by its name and labels as the page writes them; 0 without one.
    pub(crate) async fn metric(&self, name: &str) -> Result<u64> {
        let page = self.metrics_page().await?;
        let mut values = page
            .lines()
            .filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(values.next().map_or(Ok(0), str::parse)?)
    }
}

/// Writes one `hosts.toml` per mirror below `dir`, in containerd's layout.
pub(crate) fn write_mirrors(dir: &Path, mirrors: &[Mirror]) -> Result {
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
    let mut pod = String::from("[pod]\n");
    if let Some(vcpus) = options.vcpus {
        pod += &format!("vcpus = {vcpus}\n");
    }
    if let Some(policy) = options.shared_volume_writers {
        pod += &format!("shared_volume_writers = \"{policy}\"\n");
    }
    if let Some(pool) = &options.pool {
        pod += &format!("\n[pool]\n{pool}\n");
    }
    if let Some(host_pods) = &options.host_pods {
        pod += &format!("\n[host_pods]\n{host_pods}\n");
    }
    if let Some(network) = options.without_cni {
        pod += &format!("\n[network]\nwithout_cni = \"{network}\"\n");
    }
    let nri = options
        .nri_socket
        .clone()
        .unwrap_or_else(|| dir.join("nri.sock"));
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
passt = "{}"

[cni]
conf_dir = "{at}/cni"
bin_dirs = [{}]
timeout_seconds = {}

[registry]
config_path = "{at}/certs.d"

[nri]
enable = true
socket_path = "{}"
plugin_path = "{at}/nri/plugins"
plugin_config_path = "{at}/nri/conf.d"

{pod}
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
        options.passt.as_ref().unwrap_or(&install.passt).display(),
        bins.join(", "),
        options.cni_timeout,
        nri.display(),
        options.run_pod_seconds,
    )
}
