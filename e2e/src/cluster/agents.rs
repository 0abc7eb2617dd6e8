//! `make test-agents`: agent-sandbox of Kubernetes SIG Apps, its controller in a VM and its sandboxes in the RuntimeClass
//! `boxlite`; and the time from a SandboxClaim until it is Ready: without a pool, with the controller's pool of pods, and with
//! boxlite-cri's pool of VMs.
//!
//! Objects and manifests are those of agent-sandbox; only the image of the controller, which the project builds, is inserted.

use super::images::push_program;
use super::kubectl::Kubectl;
use super::pods::{self, IDLE};
use super::{Cluster, until};
use crate::bench::table::{Series, ms};
use crate::failure::{During, Result};
use crate::{ensure, same};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Section `[pool]` of boxlite-cri: VMs for pods without limits.
pub(super) const POOL: &str = "size = 1\nidle_seconds = 1\nshapes = [\"1x2048\"]";
/// Placeholder of the controller's image in the manifests.
const PLACEHOLDER: &str = "ko://sigs.k8s.io/agent-sandbox/cmd/agent-sandbox-controller";
/// Namespace of the controller in the manifests.
const SYSTEM: &str = "agent-sandbox-system";
/// API versions of a Sandbox and of the kinds around it.
const CORE: &str = "agents.x-k8s.io/v1alpha1";
const EXTENSIONS: &str = "extensions.agents.x-k8s.io/v1alpha1";
/// Pods that wait in the controller's pool.
const POOL_REPLICAS: usize = 1;
/// Time limit of each step.
const STEP_TIMEOUT: Duration = Duration::from_secs(240);
/// Time limit of `kubectl wait`.
const KUBECTL_WAIT_TIMEOUT: &str = "--timeout=200s";

/// Options of a run.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Claims of each kind that are measured.
    #[arg(long, default_value_t = 5)]
    claims: usize,
}

/// Runs all steps. Fails with the first that fails.
pub(super) async fn run(cluster: &Cluster, options: &Options) -> Result<bool> {
    let test = Agents {
        cluster,
        kubectl: cluster.plane.kubectl.clone(),
    };
    test.install().await.during("installation")?;
    println!("ok    the controller runs in a VM");
    test.sandbox().await.during("Sandbox")?;
    println!("ok    a Sandbox runs with another kernel than the node, and is removed");
    test.templates().await?;
    let mut rows = Vec::new();
    rows.push((
        "kubectl alone: apply, and wait for a Ready object",
        test.nothing(options).await?,
    ));
    for (name, template, source) in [
        ("no pool", "cold", Source::New),
        ("pool of pods (SandboxWarmPool)", "pods", Source::Pod),
        ("pool of VMs ([pool])", "vms", Source::Vm),
    ] {
        let claims = test.claims(template, source, options.claims);
        rows.push((name, claims.await.during(name)?));
        println!("ok    claims with {name}");
    }
    println!(
        "\nseconds from the creation of a SandboxClaim until it is Ready, by kubectl: median (all)"
    );
    for (name, times) in rows {
        let median = Series::new(times.clone()).median() / 1000.0;
        let all: Vec<_> = times
            .iter()
            .map(|ms| format!("{:.2}", ms / 1000.0))
            .collect();
        println!("{name:<50} {median:>6.2} ({})", all.join(", "));
    }
    Ok(true)
}

/// Origin of the pod that a claim gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// Made for the claim.
    New,
    /// From the controller's pool.
    Pod,
    /// Made for the claim, in a VM of boxlite-cri's pool.
    Vm,
}

struct Agents<'a> {
    cluster: &'a Cluster,
    kubectl: Kubectl,
}

impl Agents<'_> {
    /// Installs definitions, roles and the controller with its extensions, as agent-sandbox's manifests do.
    async fn install(&self) -> Result {
        let programs = &self.cluster.programs;
        let program = programs.program("agent-sandbox-controller");
        let image = push_program(&self.cluster.registry, &program).await?;
        let system = Kubectl {
            namespace: SYSTEM.into(),
            ..self.kubectl.clone()
        };
        let class = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass",
            "metadata": {"name": "boxlite"}, "handler": "boxlite"});
        self.kubectl.apply(&class).await?;
        for name in [
            "agents.x-k8s.io_sandboxes",
            "extensions.agents.x-k8s.io_sandboxclaims",
            "extensions.agents.x-k8s.io_sandboxtemplates",
            "extensions.agents.x-k8s.io_sandboxwarmpools",
            "controller",
            "rbac.generated",
            "extensions-rbac.generated",
            "extensions",
            "extensions.controller",
        ] {
            let path = programs.agents().join(format!("{name}.yaml"));
            let text = std::fs::read_to_string(&path).during(path.display())?;
            let text = text.replace(PLACEHOLDER, &image);
            let args = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
            let done = system.try_run(&args, text.as_bytes()).await?;
            ensure!(done.code == 0, "{name}: {}", done.stderr.trim());
        }
        let controller = "statefulset/agent-sandbox-controller";
        system
            .run(&["rollout", "status", controller, KUBECTL_WAIT_TIMEOUT])
            .await
            .map(drop)
    }

    /// A Sandbox, as the core controller makes it.
    async fn sandbox(&self) -> Result {
        let object = json!({"apiVersion": CORE, "kind": "Sandbox", "metadata": {"name": "alone"},
            "spec": {"podTemplate": {"spec": pod_spec(None)}}});
        self.kubectl.apply(&object).await?;
        self.ready("sandbox/alone").await?;
        let kernel = self.kubectl.run(&[
            "exec",
            "alone",
            "--",
            "cat",
            "/proc/sys/kernel/random/boot_id",
        ]);
        let node = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        ensure!(
            kernel.await? != node,
            "the sandbox runs on the node's kernel"
        );
        self.remove("sandbox/alone", "alone").await
    }

    /// Templates of the three kinds of claim, and the pool of one of them.
    async fn templates(&self) -> Result {
        for (name, memory) in [
            ("cold", Some("256Mi")),
            ("pods", Some("256Mi")),
            ("vms", None),
        ] {
            let object = json!({"apiVersion": EXTENSIONS, "kind": "SandboxTemplate",
                "metadata": {"name": name}, "spec": {"podTemplate": {"spec": pod_spec(memory)}}});
            self.kubectl.apply(&object).await?;
        }
        let pool = json!({"apiVersion": EXTENSIONS, "kind": "SandboxWarmPool", "metadata": {"name": "pods"},
            "spec": {"replicas": POOL_REPLICAS, "sandboxTemplateRef": {"name": "pods"}}});
        self.kubectl.apply(&pool).await
    }

    /// Measures the two calls of kubectl with an object that is Ready at once: the node.
    async fn nothing(&self, options: &Options) -> Result<Vec<f64>> {
        let mut times = Vec::new();
        for _ in 0..options.claims {
            let begun = Instant::now();
            let object =
                json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "unused"}});
            self.kubectl.apply(&object).await?;
            self.ready(&format!("node/{}", super::NODE)).await?;
            times.push(ms(begun.elapsed()));
        }
        Ok(times)
    }

    /// Measures claims of a template, one after another, each with a full pool, and removes them.
    async fn claims(&self, template: &str, source: Source, count: usize) -> Result<Vec<f64>> {
        let mut times = Vec::new();
        for n in 0..count {
            let (pods, hits) = self.full().await?;
            let name = format!("{template}-{n}");
            let object = json!({"apiVersion": EXTENSIONS, "kind": "SandboxClaim", "metadata": {"name": name},
                "spec": {"sandboxTemplateRef": {"name": template}}});
            let begun = Instant::now();
            self.kubectl.apply(&object).await?;
            self.ready(&format!("sandboxclaim/{name}")).await?;
            times.push(ms(begun.elapsed()));
            let pod = self.pod_of(&name).await?;
            same!(
                pods.contains(&pod),
                source == Source::Pod,
                "{name}: pod {pod} is from {pods:?}"
            );
            let taken = self.hits().await? > hits;
            // The pods of the controller's pool never come from the pool of VMs: they have a limit.
            same!(taken, source == Source::Vm, "{name} took a VM of the pool");
            let echo = self
                .kubectl
                .run(&["exec", &pod, "--", "echo", "here"])
                .await?;
            same!(echo, "here\n", "exec in {pod}");
            self.remove(&format!("sandboxclaim/{name}"), &pod).await?;
        }
        Ok(times)
    }

    /// Waits until both pools are full. Returns the names of the pods and the number of claimed VMs.
    async fn full(&self) -> Result<(Vec<String>, u64)> {
        let pods = until("a pod waits in the pool", STEP_TIMEOUT, || async {
            let pool = self
                .kubectl
                .json(&["get", "sandboxwarmpool", "pods"])
                .await?;
            same!(
                pool["status"]["readyReplicas"],
                POOL_REPLICAS,
                "{}",
                pool["status"]
            );
            let pods = self.kubectl.json(&["get", "pods"]).await?;
            let pods = pods["items"].as_array().into_iter().flatten();
            let waiting = pods.filter(|pod| owner(pod) == "SandboxWarmPool");
            let names: Vec<_> = waiting.map(name).collect();
            same!(names.len(), POOL_REPLICAS, "{names:?}");
            Ok(names)
        })
        .await?;
        until("a VM waits in the pool", STEP_TIMEOUT, || async {
            let waiting = self
                .cluster
                .worker
                .node
                .metric("boxlite_pool_warm_vms")
                .await?;
            ensure!(waiting == 1, "{waiting} wait");
            Ok(())
        })
        .await?;
        Ok((pods, self.hits().await?))
    }

    /// Returns how many pods got a VM of the pool.
    async fn hits(&self) -> Result<u64> {
        let node = &self.cluster.worker.node;
        node.metric("boxlite_pool_claims_total{result=\"hit\"}")
            .await
    }

    /// Returns the name of a claim's pod.
    async fn pod_of(&self, claim: &str) -> Result<String> {
        let sandbox = self.kubectl.json(&["get", "sandbox", claim]).await?;
        let adopted = &sandbox["metadata"]["annotations"]["agents.x-k8s.io/pod-name"];
        Ok(adopted.as_str().unwrap_or(claim).to_owned())
    }

    async fn ready(&self, object: &str) -> Result {
        self.kubectl
            .run(&[
                "wait",
                "--for=condition=Ready",
                object,
                KUBECTL_WAIT_TIMEOUT,
            ])
            .await
            .map(drop)
    }

    /// Removes an object and waits until its pod is gone.
    async fn remove(&self, object: &str, pod: &str) -> Result {
        self.kubectl.run(&["delete", object]).await?;
        self.kubectl
            .run(&[
                "wait",
                "--for=delete",
                &format!("pod/{pod}"),
                KUBECTL_WAIT_TIMEOUT,
            ])
            .await
            .map(drop)
    }
}

/// Returns the spec of a sandbox's pod, with a memory limit or without.
fn pod_spec(memory: Option<&str>) -> Value {
    let mut main = pods::container("main", IDLE);
    if let Some(memory) = memory {
        main["resources"] = json!({"limits": {"memory": memory}});
    }
    json!({"runtimeClassName": "boxlite", "terminationGracePeriodSeconds": 1, "containers": [main]})
}

fn name(object: &Value) -> String {
    let name = object["metadata"]["name"].as_str();
    name.unwrap_or_default().to_owned()
}

/// Returns the kind of an object's owner.
fn owner(object: &Value) -> &str {
    let kind = object["metadata"]["ownerReferences"][0]["kind"].as_str();
    kind.unwrap_or_default()
}
