//! [`Worker`]: the cluster's node: boxlite-cri, kubelet, kube-proxy and CoreDNS as processes, and its address on a bridge. With
//! host pods, the latter two are pods.
//!
//! The kubelet has cgroups below a private root and cannot write the machine's kernel and vm sysctls.

use super::control_plane::ControlPlane;
use super::kubectl::Kubectl;
use super::programs::Programs;
use super::{DNS_IP, NODE_IP, healthy, node_programs};
use crate::cgroups::CgroupRoot;
use crate::failure::{Failure, Result};
use crate::image::registry::Registry;
use crate::install::Install;
use crate::namespaces::{run, tmpfs};
use crate::node::{Mirror, Node, NodeOptions};
use crate::service::Service;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::process::Command;

/// Sysctls that a kubelet sets, with its values.
const SYSCTLS: [(&str, u32); 6] = [
    ("vm/overcommit_memory", 1),
    ("vm/panic_on_oom", 0),
    ("kernel/panic", 10),
    ("kernel/panic_on_oops", 1),
    ("kernel/keys/root_maxkeys", 1_000_000),
    ("kernel/keys/root_maxbytes", 25_000_000),
];
/// Time limit for the node to become Ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Lines of the kubelet's log in the error for a node that is not Ready.
const LOG_LINES: usize = 15;

/// Running node.
pub(crate) struct Worker {
    /// The runtime.
    pub node: Arc<Node>,
    kubelet: Service,
    /// Configuration with which the kubelet was started first.
    configuration: Value,
    dir: PathBuf,
    programs: Programs,
    _services: Vec<Service>,
}

/// Settings of a node besides the usual ones.
#[derive(Default)]
pub(crate) struct Setup<'a> {
    /// Runs the system components as pods.
    pub host_pods: Option<&'a HostPods>,
    /// Lines of boxlite-cri's section `[pool]`.
    pub pool: Option<&'a str>,
}

/// A node whose system components are pods.
pub(crate) struct HostPods {
    /// Socket of the containerd that runs host pods.
    pub endpoint: PathBuf,
    /// Directory of the kubelet's static pods.
    pub manifests: PathBuf,
}

/// Returns the mirrors by which all images come from the loopback registry.
pub(super) fn registries(registry: &Registry) -> Vec<Mirror> {
    ["registry.k8s.io", "docker.io", "127.0.0.1:5000"]
        .map(|host| (host.to_owned(), format!("http://{}", registry.host), None))
        .to_vec()
}

/// Prepares the namespaces for a node: its address, private directories and read-only sysctls of the machine.
pub(crate) fn prepare(dir: &Path) -> Result {
    for (dir, size) in [("/run", "512m"), ("/var/log", "2g")] {
        std::fs::create_dir_all(dir)?;
        tmpfs(Path::new(dir), &format!("mode=0755,size={size}"))?;
        run("mount", &["--make-shared", dir])?;
    }
    std::fs::create_dir_all("/run/netns")?;
    protect_sysctls(dir)?;
    run("ip", &["link", "add", "node0", "type", "bridge"])?;
    run(
        "ip",
        &["addr", "add", &format!("{NODE_IP}/24"), "dev", "node0"],
    )?;
    run("ip", &["link", "set", "node0", "up"])?;
    run("ip", &["route", "add", "default", "dev", "node0"])?;
    std::fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "1")?;
    Ok(())
}

/// Makes the sysctls of the machine read-only, and shows the kubelet the values that it would otherwise write.
fn protect_sysctls(dir: &Path) -> Result {
    for dir in ["/proc/sys/vm", "/proc/sys/kernel"] {
        run("mount", &["--bind", dir, dir])?;
        run("mount", &["-o", "remount,bind,ro", dir])?;
    }
    for (name, value) in SYSCTLS {
        let file = dir.join(name.replace('/', "."));
        std::fs::write(&file, format!("{value}\n"))?;
        let target = format!("/proc/sys/{name}");
        run("mount", &["--bind", &file.display().to_string(), &target])?;
    }
    Ok(())
}

impl Worker {
    /// Starts the node's processes and waits until the node is Ready.
    pub(crate) async fn start(
        dir: &Path,
        install: &Install,
        programs: &Programs,
        plane: &ControlPlane,
        registry: &Registry,
        cgroups: &CgroupRoot,
        setup: &Setup<'_>,
    ) -> Result<Self> {
        let host_pods = setup.host_pods;
        let mut options = NodeOptions::new("n", "auto");
        options.pool = setup.pool.map(str::to_owned);
        options.host_pods = host_pods.map(|host_pods| {
            format!(
                "endpoint = \"unix://{}\"\nhandlers = [\"runc\"]\nnamespaces = [\"kube-system\"]",
                host_pods.endpoint.display()
            )
        });
        options.registries = registries(registry);
        let node = Arc::new(Node::start(dir, install, &options).await?);
        let (authority, socket) = (&plane.authority, node.socket());
        let mut configuration =
            node_programs::kubelet_configuration(dir, authority, &socket, cgroups)?;
        configuration["clusterDNS"] = json!([DNS_IP]);
        configuration["clusterDomain"] = json!("cluster.local");
        configuration["containerLogMaxSize"] = json!("10Mi");
        if let Some(host_pods) = host_pods {
            configuration["staticPodPath"] = json!(host_pods.manifests);
        }
        let mut worker = Self {
            node,
            kubelet: Service::new("kubelet", dir.join("kubelet.log")),
            configuration,
            dir: dir.to_owned(),
            programs: programs.clone(),
            _services: Vec::new(),
        };
        worker.write_configuration(&json!({}))?;
        worker.start_kubelet().await?;
        worker.ready(&plane.kubectl).await?;
        if host_pods.is_some() {
            return Ok(worker);
        }
        // kube-proxy reads the node's object at its start, and gives up after a few attempts.
        worker._services = vec![
            node_programs::proxy(dir, programs, &plane.authority).await?,
            dns(dir, programs, plane).await?,
        ];
        Ok(worker)
    }

    /// Waits until the node is Ready as the API server reports it.
    pub(super) async fn ready(&self, kubectl: &Kubectl) -> Result {
        let log =
            |failure: Failure| Failure(format!("{failure}\n{}", self.kubelet.tail(0, LOG_LINES)));
        node_programs::ready(kubectl, READY_TIMEOUT)
            .await
            .map_err(log)
    }

    /// Writes the kubelet's configuration with these changes: values of the top level, except feature gates, which are added.
    fn write_configuration(&self, changes: &Value) -> Result {
        let mut configuration = self.configuration.clone();
        for (key, value) in changes.as_object().into_iter().flatten() {
            match (key.as_str(), value) {
                ("featureGates", Value::Object(gates)) => {
                    for (gate, enabled) in gates {
                        configuration[key][gate] = enabled.clone();
                    }
                }
                _ => configuration[key] = value.clone(),
            }
        }
        let text = serde_json::to_vec_pretty(&configuration)?;
        std::fs::write(node_programs::kubelet_file(&self.dir), text)?;
        Ok(())
    }

    /// Restarts the kubelet with changes to its original configuration, `{}` for none, and waits until it is healthy.
    pub(crate) async fn restart_kubelet(&self, changes: &Value) -> Result {
        self.kubelet.kill().await?;
        self.write_configuration(changes)?;
        self.start_kubelet().await
    }

    /// Starts the kubelet and waits until it is healthy.
    pub(crate) async fn start_kubelet(&self) -> Result {
        node_programs::start_kubelet(&self.kubelet, &self.dir, &self.programs).await
    }

    /// Restarts the kubelet with its original configuration if a case has changed it.
    pub(crate) async fn restore_kubelet(&self) -> Result {
        let text = std::fs::read(node_programs::kubelet_file(&self.dir))?;
        match serde_json::from_slice::<Value>(&text)? == self.configuration {
            true => Ok(()),
            false => self.restart_kubelet(&json!({})).await,
        }
    }

    /// Returns the kubelet's process.
    pub(crate) fn kubelet(&self) -> &Service {
        &self.kubelet
    }
}

/// Starts CoreDNS on the node's address and makes it the cluster's DNS service.
async fn dns(dir: &Path, programs: &Programs, plane: &ControlPlane) -> Result<Service> {
    let corefile = dir.join("Corefile");
    std::fs::write(
        &corefile,
        format!(
            ".:53 {{\n  bind {NODE_IP}\n  errors\n  ready 127.0.0.1:8181\n  kubernetes cluster.local in-addr.arpa ip6.arpa {{\n    \
             kubeconfig {} boxlite\n    pods insecure\n    fallthrough in-addr.arpa ip6.arpa\n    ttl 5\n  }}\n  cache 5\n}}\n",
            plane.kubectl.kubeconfig.display()
        ),
    )?;
    let mut command = Command::new(programs.program("coredns"));
    command.arg("-conf").arg(&corefile);
    let service = Service::new("coredns", dir.join("coredns.log"));
    service
        .start(command, || async {
            healthy("http://127.0.0.1:8181/ready").await
        })
        .await?;
    let mut kubectl = plane.kubectl.clone();
    kubectl.namespace = "kube-system".into();
    let ports = |target: bool| -> Vec<Value> {
        [("dns", "UDP"), ("dns-tcp", "TCP")]
            .map(|(name, protocol)| match target {
                true => json!({"name": name, "protocol": protocol, "port": 53, "targetPort": 53}),
                false => json!({"name": name, "protocol": protocol, "port": 53}),
            })
            .to_vec()
    };
    kubectl
        .apply(&json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "kube-dns", "labels": {"k8s-app": "kube-dns"}},
            "spec": {"clusterIP": DNS_IP, "ports": ports(true)}}))
        .await?;
    kubectl
        .apply(&json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "kube-dns-node", "labels": {"kubernetes.io/service-name": "kube-dns"}},
            "ports": ports(false), "endpoints": [{"addresses": [NODE_IP], "conditions": {"ready": true}}]}))
        .await?;
    Ok(service)
}
