//! Host pods on a kubeadm-style cluster: `make test-host-pods`.
//!
//! boxlite-cri is the kubelet's runtime and hands pods of kube-system that need the host to a stock containerd. kube-proxy is a
//! DaemonSet there, a static pod runs there, and CoreDNS, a server and its client are in VMs. One sequence, since each step
//! depends on the one before.

mod images;
mod objects;

use super::control_plane::ControlPlane;
use super::kubectl::Kubectl;
use super::programs::Programs;
use super::worker::{HostPods, Setup, Worker};
use super::{NODE, condition, until, worker};
use crate::cgroups::CgroupRoot;
use crate::containerd::stock;
use crate::failure::{During, Result};
use crate::image::registry::Registry;
use crate::install::Install;
use crate::service::Service;
use crate::{ensure, same};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time limit for pods, whose VMs boot beside each other.
const POD_TIMEOUT: Duration = Duration::from_secs(240);
/// Lines of the logs in the error.
const LOG_LINES: usize = 15;
/// File of the machine's random boot identifier: a VM has another one.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Running cluster.
struct HostPodsTest {
    plane: ControlPlane,
    worker: Worker,
    containerd: Service,
    /// Configuration of containerd.
    config: PathBuf,
    _registry: Registry,
}

/// Runs the sequence and prints one line per step. Returns true if all passed.
pub(super) async fn run() -> Result<bool> {
    let begun = Instant::now();
    let test = HostPodsTest::start().await?;
    println!(
        "host pods: node Ready after {:.0} s",
        begun.elapsed().as_secs_f64()
    );
    let result = test.steps().await;
    if let Err(failure) = &result {
        println!("FAIL  {failure}\n{}", test.describe().await);
    }
    println!(
        "e2e host pods: {} in {:.0} s",
        if result.is_ok() { "passed" } else { "failed" },
        begun.elapsed().as_secs_f64()
    );
    Ok(result.is_ok())
}

impl HostPodsTest {
    async fn start() -> Result<Self> {
        let dir = crate::namespaces::scratch();
        let (install, programs) = (Install::find()?, Programs::find()?);
        let cgroups = CgroupRoot::enter(&dir)?;
        worker::prepare(&dir).during("failed to prepare the node")?;
        let registry = Registry::start(&install.registry, &dir, 5000, false).await?;
        images::push(&registry, &install, &programs)
            .await
            .during("failed to push the images")?;
        let (containerd, config) = containerd(&dir, &install).await?;
        let plane = ControlPlane::start(&dir, &programs).await?;
        let manifests = dir.join("manifests");
        std::fs::create_dir_all(&manifests)?;
        let static_pod = serde_json::to_vec(&objects::static_pod())?;
        std::fs::write(manifests.join("static.json"), static_pod)?;
        let host_pods = HostPods {
            endpoint: config.with_file_name("c.sock"),
            manifests,
        };
        let worker = Worker::start(
            &dir,
            &install,
            &programs,
            &plane,
            &registry,
            &cgroups,
            &Setup {
                host_pods: Some(&host_pods),
                ..Setup::default()
            },
        )
        .await?;
        Ok(Self {
            plane,
            worker,
            containerd,
            config,
            _registry: registry,
        })
    }

    async fn steps(&self) -> Result {
        step("handlers of the node", self.handlers()).await?;
        step("static pod", self.static_pod()).await?;
        step("kube-proxy as a DaemonSet", self.proxy()).await?;
        step("CoreDNS in a VM", self.dns()).await?;
        step("server and client in VMs", self.workload()).await?;
        step("each host pod is in the log", self.rules()).await?;
        step("containerd is killed and starts again", self.restart()).await?;
        step("removal", self.removal()).await
    }

    /// Returns kubectl in a namespace.
    fn kubectl(&self, namespace: &str) -> Kubectl {
        Kubectl {
            namespace: namespace.into(),
            ..self.plane.kubectl.clone()
        }
    }

    /// The kubelet reports containerd's handler.
    async fn handlers(&self) -> Result {
        let node = self.plane.kubectl.json(&["get", "node", NODE]).await?;
        let handlers = node["status"]["runtimeHandlers"].as_array();
        let names: Vec<_> = handlers.into_iter().flatten().collect();
        for wanted in ["boxlite", "runc"] {
            ensure!(names.iter().any(|h| h["name"] == wanted), "{names:?}");
        }
        Ok(())
    }

    /// The kubelet's static pod runs on the host, and has a mirror in the API server.
    async fn static_pod(&self) -> Result {
        let name = format!("{}-{NODE}", objects::STATIC);
        let system = self.kubectl("kube-system");
        self.ready(&system, &format!("pod/{name}")).await?;
        self.runs_on_host(&system, &name, true).await
    }

    async fn proxy(&self) -> Result {
        let system = self.kubectl("kube-system");
        for object in objects::proxy() {
            system.apply(&object).await?;
        }
        let pod = self.pod_of(&system, "kube-proxy").await?;
        self.runs_on_host(&system, &pod, true).await
    }

    /// CoreDNS reaches the API server through kube-proxy's rules for its service.
    async fn dns(&self) -> Result {
        let system = self.kubectl("kube-system");
        for object in objects::dns() {
            system.apply(&object).await?;
        }
        let pod = self.pod_of(&system, "kube-dns").await?;
        self.runs_on_host(&system, &pod, false).await
    }

    async fn workload(&self) -> Result {
        let kubectl = self.kubectl("default");
        for object in objects::workload() {
            kubectl.apply(&object).await?;
        }
        for app in ["web", "client"] {
            let pod = self.pod_of(&kubectl, app).await?;
            self.runs_on_host(&kubectl, &pod, false).await?;
        }
        self.serves().await
    }

    /// The client resolves the service by CoreDNS and connects to it through kube-proxy's rules.
    async fn serves(&self) -> Result {
        let kubectl = self.kubectl("default");
        let fetch = format!("wget -q -O - {}", objects::URL);
        let command = ["exec", "deploy/client", "--", "sh", "-c", &fetch];
        until("the service answers", POD_TIMEOUT, || async {
            let page = kubectl.run(&command).await?;
            same!(page, objects::PAGE, "page of the service");
            Ok(())
        })
        .await
    }

    async fn rules(&self) -> Result {
        let log = std::fs::read_to_string(self.worker.node.log())?;
        let lines = log
            .lines()
            .filter(|line| line.contains("pod runs without a VM"));
        let lines: Vec<_> = lines.collect();
        same!(lines.len(), 2, "host pods in the log: {lines:#?}");
        for (pod, request) in [
            (objects::STATIC, "requests the host's network"),
            ("kube-proxy", "requests privileges"),
        ] {
            let is_pod = |line: &&&str| line.contains(pod) && line.contains(request);
            same!(lines.iter().filter(is_pod).count(), 1, "{pod}: {lines:#?}");
        }
        Ok(())
    }

    /// Without containerd the node is Ready, and pods in VMs go on; with it again, its containers are the same.
    async fn restart(&self) -> Result {
        let system = self.kubectl("kube-system");
        let pod = self.pod_of(&system, "kube-proxy").await?;
        let before = container(&system, &pod).await?;
        self.containerd.kill().await?;
        self.serves().await?;
        self.plane
            .kubectl
            .run(&["delete", "pod", "-l", "app=web", "--grace-period=1"])
            .await?;
        self.pod_of(&self.kubectl("default"), "web").await?;
        self.serves().await.during("a new pod without containerd")?;
        let node = self.plane.kubectl.json(&["get", "node", NODE]).await?;
        same!(condition(&node, "Ready"), "True", "condition of the node");
        stock::serve(&self.containerd, &self.config, &[]).await?;
        self.pod_of(&system, "kube-proxy").await?;
        let after = container(&system, &pod).await?;
        same!(after["containerID"], before["containerID"], "container");
        same!(after["restartCount"], 0, "restarts");
        self.runs_on_host(&system, &pod, true).await
    }

    /// A deleted host pod leaves nothing in containerd.
    async fn removal(&self) -> Result {
        let system = self.kubectl("kube-system");
        let delete = ["delete", "daemonset", "kube-proxy", "--timeout=120s"];
        system.run(&delete).await?;
        let node = &self.worker.node;
        until("the container is removed", POD_TIMEOUT, || async {
            let containers = node.containers().await?.into_iter();
            let names = containers.filter_map(|c| c.metadata).map(|m| m.name);
            let names: Vec<_> = names.collect();
            ensure!(!names.contains(&"kube-proxy".to_owned()), "{names:?}");
            Ok(())
        })
        .await
    }

    /// Waits until an object's pod is Ready.
    async fn ready(&self, kubectl: &Kubectl, object: &str) -> Result {
        let path = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
        until(&format!("{object} is Ready"), POD_TIMEOUT, || async {
            let ready = kubectl.run(&["get", object, "-o", path]).await?;
            same!(ready, "True", "condition");
            Ok(())
        })
        .await
    }

    /// Waits until the only pod of an app is Ready, and returns its name.
    async fn pod_of(&self, kubectl: &Kubectl, app: &str) -> Result<String> {
        let label = format!("app={app}");
        until(&format!("{app} is Ready"), POD_TIMEOUT, || async {
            let list = kubectl.json(&["get", "pods", "-l", &label]).await?;
            let pods = list["items"].as_array().cloned().unwrap_or_default();
            ensure!(
                pods.len() == 1 && condition(&pods[0], "Ready") == "True",
                "{} pods: {}",
                pods.len(),
                pods.first().map_or(&Value::Null, |pod| &pod["status"])
            );
            let name = &pods[0]["metadata"]["name"];
            Ok(name.as_str().unwrap_or_default().to_owned())
        })
        .await
    }

    /// Compares the pod's kernel with the host's.
    async fn runs_on_host(&self, kubectl: &Kubectl, pod: &str, expected: bool) -> Result {
        let boot_id = kubectl.run(&["exec", pod, "--", "cat", BOOT_ID]).await?;
        let is_host = boot_id == std::fs::read_to_string(BOOT_ID)?;
        same!(is_host, expected, "{pod} runs on the host's kernel");
        Ok(())
    }

    /// Returns the pods, their events and the ends of the logs.
    async fn describe(&self) -> String {
        let kubectl = &self.plane.kubectl;
        let mut text = String::new();
        for args in [
            &["get", "pods", "-A", "-o", "wide"][..],
            &["get", "events", "-A"],
            &["logs", "-n", "kube-system", "ds/kube-proxy", "--tail=15"],
            &["logs", "-n", "kube-system", "deploy/coredns", "--tail=15"],
        ] {
            let output = kubectl.run(args).await;
            text += &output.unwrap_or_else(|failure| format!("{failure}\n"));
        }
        for service in [
            self.worker.node.service(),
            &self.containerd,
            self.worker.kubelet(),
        ] {
            text += &format!("---\n{}\n", service.tail(0, LOG_LINES));
        }
        text
    }
}

/// Starts containerd and returns it with its configuration file.
async fn containerd(dir: &Path, install: &Install) -> Result<(Service, PathBuf)> {
    let dir = dir.join("c");
    std::fs::create_dir_all(dir.join("cni"))?;
    images::write_mirrors(&dir)?;
    let config = dir.join("config.toml");
    let text = stock::with_runc(&dir, &install.cni, images::PAUSE);
    std::fs::write(&config, text)?;
    // Its pods are in the host's network; without a configuration its CRI plugin reports NetworkReady false.
    let conflist = serde_json::json!({"cniVersion": "1.0.0", "name": "host", "plugins": [{"type": "loopback"}]});
    std::fs::write(dir.join("cni/10-host.conflist"), conflist.to_string())?;
    let service = Service::new("containerd", dir.join("containerd.log"));
    stock::serve(&service, &config, &[]).await?;
    Ok((service, config))
}

/// Returns the status of a pod's only container.
async fn container(kubectl: &Kubectl, pod: &str) -> Result<Value> {
    let pod = kubectl.json(&["get", "pod", pod]).await?;
    Ok(pod["status"]["containerStatuses"][0].clone())
}

async fn step(name: &str, action: impl Future<Output = Result>) -> Result {
    let begun = Instant::now();
    action.await.during(name)?;
    println!("ok    {name:<60} {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}
