//! charts/boxlite on a cluster whose node runs a stock containerd with runc: `make test-chart`.
//!
//! One sequence, since each step depends on the one before: an installation that fails, one that succeeds, pods, `helm test`, an
//! upgrade and an uninstallation with a running pod, and an uninstallation that restores the node's files.

mod node;

use super::control_plane::ControlPlane;
use super::programs::Programs;
use super::{NODE, until, worker};
use crate::cgroups::CgroupRoot;
use crate::failure::{During, Failure, Result};
use crate::image::build::{Blob, Image};
use crate::image::busybox;
use crate::image::layer::Compression;
use crate::image::registry::Registry;
use crate::install::{self, Install};
use crate::{ensure, process, same};
use node::{PRIVATE, RESTART, StockNode};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::process::Command;

/// Repository of the installer's image in the loopback registry.
const REPOSITORY: &str = "boxlite/installer";
/// Image of the pods.
const BUSYBOX: &str = "127.0.0.1:5000/busybox:1";
/// Label of a node that runs pods of the RuntimeClass.
const LABEL: &str = "io.boxlite/runtime";
/// Time limit for a pod, and of helm's own waits.
const POD_TIMEOUT: Duration = Duration::from_secs(120);
const HELM_TIMEOUT: &str = "240s";
/// Options of helm that wait for the DaemonSet.
const WAIT: [&str; 3] = ["--wait", "--timeout", HELM_TIMEOUT];
/// Label selector of the installer's pods.
const SELECTOR: &str = "app.kubernetes.io/component=installer";

/// Options of the chart's test.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Directory of the chart.
    #[arg(long)]
    chart: PathBuf,
    /// OCI layout of the installer's image.
    #[arg(long)]
    image: PathBuf,
    /// Leave out the steps that start VMs.
    #[arg(long)]
    skip_pods: bool,
}

/// Running cluster with its release.
struct ChartTest {
    plane: ControlPlane,
    node: StockNode,
    options: Options,
    digest: String,
    dir: PathBuf,
    _registry: Registry,
}

/// Runs the sequence and prints one line per step. Returns true if all passed.
pub(super) async fn run(options: &Options) -> Result<bool> {
    let begun = Instant::now();
    let test = ChartTest::start(options).await?;
    println!(
        "chart: node Ready after {:.0} s",
        begun.elapsed().as_secs_f64()
    );
    let result = test.steps().await;
    if let Err(failure) = &result {
        println!(
            "FAIL  {failure}\n{}\n{}",
            test.describe().await,
            test.node.logs()
        );
    }
    println!(
        "e2e chart: {} in {:.0} s",
        if result.is_ok() { "passed" } else { "failed" },
        begun.elapsed().as_secs_f64()
    );
    Ok(result.is_ok())
}

impl ChartTest {
    async fn start(options: &Options) -> Result<Self> {
        let dir = crate::namespaces::scratch();
        let (install, programs) = (Install::find()?, Programs::find()?);
        let cgroups = CgroupRoot::enter(&dir)?;
        worker::prepare(&dir).during("failed to prepare the node")?;
        let registry = Registry::start(&install.registry, &dir, 5000, false).await?;
        let digest = push(&registry, &install, &options.image).await?;
        let plane = ControlPlane::start(&dir, &programs).await?;
        let node = StockNode::start(&dir, &install, &programs, &plane, &registry, &cgroups).await?;
        Ok(Self {
            plane,
            node,
            options: options.clone(),
            digest,
            dir,
            _registry: registry,
        })
    }

    async fn steps(&self) -> Result {
        let before = files()?;
        step("failed installation is reported", self.broken()).await?;
        step("install", self.install()).await?;
        if !self.options.skip_pods {
            step("pod runs on another kernel", self.pod()).await?;
            let test = ["test", "boxlite", "--timeout", HELM_TIMEOUT];
            step("helm test", self.helm(&test)).await?;
            step("upgrade with a running pod", self.upgrade()).await?;
            step("uninstall with a running pod fails", self.refused()).await?;
        }
        step("uninstall", self.uninstall(&before)).await
    }

    /// A node whose containerd imports no drop-ins has an event, the pod a termination message, and the node no label.
    async fn broken(&self) -> Result<String> {
        const CONFIG: &str = "runtime.containerdConfig=/etc/containerd/other.toml";
        self.release(&["--set", CONFIG]).await?;
        let expected = "invalid configuration /etc/containerd/other.toml: it does not import";
        let kubectl = &self.plane.kubectl;
        until("event and termination message", POD_TIMEOUT, || async {
            let events = [
                "get",
                "events",
                "--field-selector",
                "reason=BoxliteInstallFailed",
            ];
            let events = kubectl.json(&events).await?.to_string();
            ensure!(events.contains(expected), "events: {events}");
            let pods = kubectl.json(&["get", "pods", "-l", SELECTOR]).await?;
            let container = &pods["items"][0]["status"]["containerStatuses"][0];
            let states = [&container["state"], &container["lastState"]];
            let mut messages = states
                .map(|s| s["terminated"]["message"].to_string())
                .into_iter();
            ensure!(
                messages.any(|m| m.contains(expected)),
                "container: {container}"
            );
            Ok(())
        })
        .await?;
        let node = self.object().await?;
        same!(
            node["metadata"]["labels"][LABEL],
            Value::Null,
            "label of the node"
        );
        let drop_in = Path::new("/etc/containerd/conf.d");
        ensure!(
            !drop_in.exists(),
            "the drop-in of the failed installation remains"
        );
        Ok(String::new())
    }

    async fn install(&self) -> Result<String> {
        self.release(&WAIT).await?;
        let node = self.object().await?;
        same!(
            node["metadata"]["labels"][LABEL],
            "true",
            "label of the node"
        );
        ensure!(
            reports(&node),
            "handlers: {}",
            node["status"]["runtimeHandlers"]
        );
        ensure!(
            Path::new("/opt/boxlite/bin").exists(),
            "nothing is installed"
        );
        self.plane
            .kubectl
            .run(&[
                "get",
                "events",
                "--field-selector",
                "reason=BoxliteInstalled",
            ])
            .await
    }

    /// A pod of the RuntimeClass and one of the node's default runtime.
    async fn pod(&self) -> Result<String> {
        let node = self.object().await?;
        let own = node["status"]["nodeInfo"]["kernelVersion"]
            .as_str()
            .unwrap_or_default();
        for (name, class) in [("plain", None), ("vm", Some("boxlite"))] {
            self.start_pod(name, class).await?;
            let kernel = self
                .plane
                .kubectl
                .run(&["exec", name, "--", "uname", "-r"])
                .await?;
            let same = kernel.trim() == own;
            ensure!(
                same == class.is_none(),
                "{name} runs on {kernel}, the node on {own}"
            );
        }
        self.plane
            .kubectl
            .run(&["delete", "pod", "plain", "--grace-period=1"])
            .await
    }

    async fn start_pod(&self, name: &str, class: Option<&str>) -> Result {
        let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {"terminationGracePeriodSeconds": 1, "automountServiceAccountToken": false,
                "containers": [{"name": "main", "image": BUSYBOX, "command": ["sleep", "infinity"]}]}});
        if let Some(class) = class {
            pod["spec"]["runtimeClassName"] = json!(class);
        }
        let kubectl = &self.plane.kubectl;
        kubectl.apply(&pod).await?;
        until(&format!("{name} is Ready"), POD_TIMEOUT, || async {
            let pod = kubectl.json(&["get", "pod", name]).await?;
            ensure!(
                super::condition(&pod, "Ready") == "True",
                "{}",
                pod["status"]
            );
            Ok(())
        })
        .await
    }

    /// A changed configuration reaches the node, and the running pod keeps its VM.
    async fn upgrade(&self) -> Result<String> {
        let shims = process::pids(&["containerd-shim-boxlite"])?;
        let config = ["--set-string", "shim=vmm = \"qemu\""];
        self.release(&[&WAIT[..], &config].concat()).await?;
        let config = std::fs::read_to_string("/opt/boxlite/etc/shim.toml")?;
        ensure!(config.contains("qemu"), "shim.toml: {config}");
        let kept = process::pids(&["containerd-shim-boxlite"])?;
        // The shim of helm's test may still be ending.
        let known = kept.iter().all(|pid| shims.contains(pid));
        ensure!(!kept.is_empty() && known, "shims {shims:?} became {kept:?}");
        self.start_pod("second", Some("boxlite")).await?;
        let kubectl = &self.plane.kubectl;
        kubectl
            .run(&["delete", "pod", "second", "--grace-period=1"])
            .await?;
        kubectl.run(&["exec", "vm", "--", "true"]).await
    }

    /// With a running pod helm fails, and the node gets no more pods.
    async fn refused(&self) -> Result<String> {
        let output = self
            .command(&["uninstall", "boxlite", "--timeout", "60s"])
            .output()
            .await?;
        ensure!(
            !output.status.success(),
            "helm uninstalled the programs of a running pod"
        );
        let node = self.object().await?;
        same!(
            node["metadata"]["labels"][LABEL],
            Value::Null,
            "label of the node"
        );
        self.plane.kubectl.run(&["exec", "vm", "--", "true"]).await
    }

    async fn uninstall(&self, before: &BTreeMap<String, u64>) -> Result<String> {
        let kubectl = &self.plane.kubectl;
        kubectl
            .run(&["delete", "pod", "vm", "--ignore-not-found", "--wait"])
            .await?;
        let text = self
            .helm(&["uninstall", "boxlite", "--wait", "--timeout", HELM_TIMEOUT])
            .await?;
        let node = self.object().await?;
        ensure!(
            !reports(&node),
            "handlers: {}",
            node["status"]["runtimeHandlers"]
        );
        for kind in ["labels", "annotations"] {
            let text = node["metadata"][kind].to_string();
            ensure!(!text.contains("io.boxlite"), "{kind} of the node: {text}");
        }
        same!(files()?, *before, "files of the node");
        let shims = process::pids(&["containerd-shim-boxlite"])?;
        ensure!(shims.is_empty(), "shims {shims:?} are running");
        let classes = kubectl.run(&["get", "runtimeclass", "-o", "name"]).await?;
        same!(classes, "", "RuntimeClasses");
        Ok(text)
    }

    /// Installs or upgrades the release.
    async fn release(&self, more: &[&str]) -> Result<String> {
        let chart = self.options.chart.display().to_string();
        let (digest, restart) = (
            format!("image.digest={}", self.digest),
            format!("runtime.restart={{{}}}", RESTART.join(",")),
        );
        let repository = format!("image.repository=127.0.0.1:5000/{REPOSITORY}");
        let mut args = vec!["upgrade", "--install", "boxlite", &chart];
        for value in [&repository, &digest, &restart] {
            args.extend(["--set", value]);
        }
        args.extend([
            "--set",
            "timeoutSeconds=30",
            "--set",
            "removalTimeoutSeconds=45",
        ]);
        args.extend(more);
        self.helm(&args).await
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(install::cache().join("helm/helm"));
        command
            .args(args)
            .args(["--namespace", "default"])
            .env("KUBECONFIG", &self.plane.kubectl.kubeconfig)
            .env("HOME", self.dir.join("pki/home"))
            .kill_on_drop(true);
        command
    }

    async fn helm(&self, args: &[&str]) -> Result<String> {
        let output = self.command(args).output().await.during("helm")?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        ensure!(
            output.status.success(),
            "helm {}: {}\n{}",
            args.join(" "),
            text(&output.stderr),
            text(&output.stdout)
        );
        Ok(text(&output.stdout))
    }

    async fn object(&self) -> Result<Value> {
        self.plane.kubectl.json(&["get", "node", NODE]).await
    }

    /// Returns pods, their events and logs, for a failure.
    async fn describe(&self) -> String {
        let mut text = String::new();
        for args in [
            &["get", "pods", "-o", "wide"][..],
            &["get", "events"],
            &[
                "logs",
                "--tail=20",
                "--prefix",
                "-l",
                "app.kubernetes.io/name=boxlite",
            ],
        ] {
            let done = self.plane.kubectl.try_run(args, b"").await;
            text.push_str(&done.map_or_else(|f| f.0, |d| format!("{}{}", d.text(), d.stderr)));
        }
        text
    }
}

/// Runs a step and prints its name and duration.
async fn step<T>(name: &str, run: impl Future<Output = Result<T>>) -> Result {
    let begun = Instant::now();
    run.await.map_err(|f| Failure(format!("{name}: {f}")))?;
    println!("ok    {name:<60} {:>6.1} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// Returns whether the node reports the handler.
fn reports(node: &Value) -> bool {
    let handlers = node["status"]["runtimeHandlers"].as_array();
    handlers
        .into_iter()
        .flatten()
        .any(|h| h["name"] == "boxlite")
}

/// Returns size by path of every file below the directories that an installation may write to.
fn files() -> Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    let mut dirs: Vec<PathBuf> = PRIVATE.iter().map(PathBuf::from).collect();
    dirs.push("/run/boxlite".into());
    while let Some(dir) = dirs.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                dirs.push(entry.path());
            }
            let size = if metadata.is_dir() { 0 } else { metadata.len() };
            found.insert(entry.path().display().to_string(), size);
        }
    }
    Ok(found)
}

/// Pushes the pods' images and the installer's. Returns the digest of the latter.
async fn push(registry: &Registry, install: &Install, layout: &Path) -> Result<String> {
    let base = busybox::layer(&install.busybox, Compression::Gzip)?;
    let environment = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let shell = json!({"Cmd": ["sh"], "Env": [environment]});
    let pause = json!({"Entrypoint": ["sleep", "infinity"], "Env": [environment]});
    for (name, config) in [("busybox", shell), ("pause", pause)] {
        registry
            .push(name, "1", &Image::new(vec![base.clone()], config))
            .await?;
    }
    let read = |name: &str| {
        let path = layout.join(name);
        std::fs::read(&path).during(path.display())
    };
    let blob = |digest: &Value| {
        let digest = digest.as_str().unwrap_or_default().replace(':', "/");
        read(&format!("blobs/{digest}"))
    };
    let index: Value = serde_json::from_slice(&read("index.json")?)?;
    let bytes = blob(&index["manifests"][0]["digest"])?;
    let manifest: Value = serde_json::from_slice(&bytes)?;
    let layers = manifest["layers"].as_array().into_iter().flatten();
    for part in layers.chain([&manifest["config"]]) {
        registry
            .put_blob(REPOSITORY, &blob(&part["digest"])?)
            .await?;
    }
    let digest = index["manifests"][0]["digest"].as_str().unwrap_or_default();
    let kind = manifest["mediaType"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    registry
        .put_manifest(REPOSITORY, digest, &Blob { kind, bytes })
        .await
}
