//! [`ClusterContext`]: the cluster in which the project's cases run, with the waits that they share, and the clean-up and leak
//! check after each.

use super::Cluster;
use super::kubectl::Kubectl;
use crate::cluster::until;
use crate::context::Backend;
use crate::failure::Result;
use crate::leak::LeakSnapshot;
use crate::runner::TestEnv;
use crate::service::Service;
use crate::{bail, ensure};
use k8s_cri::v1::{PodSandboxState, RemovePodSandboxRequest};
use serde_json::{Value, json};
use std::time::Duration;

/// Namespace of the cases.
const NAMESPACE: &str = "cases";
/// Limit until a pod runs: a VM boots under emulation beside other work.
pub(crate) const POD_TIMEOUT: Duration = Duration::from_secs(150);
/// Time for the kubelet's own clean-up of a deleted pod.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Kinds of object that cases create and the clean-up removes, owners first.
const KINDS: &str = "cronjobs,deployments,statefulsets,jobs,pods,services,secrets,persistentvolumeclaims,persistentvolumes";

/// Argument of every case.
pub(crate) struct ClusterContext {
    /// The cluster.
    pub cluster: Cluster,
    /// kubectl in the cases' namespace.
    pub kubectl: Kubectl,
}

impl ClusterContext {
    /// Creates the namespace of the cases.
    pub(crate) async fn build(cluster: Cluster) -> Result<Self> {
        let mut kubectl = cluster.plane.kubectl.clone();
        kubectl.namespace = NAMESPACE.into();
        kubectl.run(&["create", "namespace", NAMESPACE]).await?;
        until("the default service account", POD_TIMEOUT, || async {
            kubectl.run(&["get", "serviceaccount", "default"]).await?;
            kubectl.run(&["get", "configmap", "kube-root-ca.crt"]).await
        })
        .await?;
        Ok(Self { cluster, kubectl })
    }

    /// Returns a pod object.
    pub(crate) async fn pod(&self, name: &str) -> Result<Value> {
        self.kubectl.json(&["get", "pod", name]).await
    }

    /// Creates a pod and waits until it is Ready.
    pub(crate) async fn run_pod(&self, pod: &Value) -> Result<Value> {
        self.kubectl.apply(pod).await?;
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        self.ready(name).await
    }

    /// Waits until a pod is Ready. Fails at once if it ended.
    pub(crate) async fn ready(&self, name: &str) -> Result<Value> {
        let ready = self.wait(name, "is Ready", |pod| {
            let ended = ["Succeeded", "Failed"].contains(&phase(pod));
            ended || super::condition(pod, "Ready") == "True"
        });
        let pod = ready.await?;
        ensure!(
            phase(&pod) == "Running",
            "pod {name} ended: {}",
            pod["status"]
        );
        Ok(pod)
    }

    /// Creates a pod and waits until it has ended. Returns the object with its final status.
    pub(crate) async fn finish_pod(&self, pod: &Value) -> Result<Value> {
        self.kubectl.apply(pod).await?;
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        self.wait(name, "has ended", |pod| {
            ["Succeeded", "Failed"].contains(&phase(pod))
        })
        .await
    }

    /// Waits until a condition holds for a pod.
    pub(crate) async fn wait(
        &self,
        name: &str,
        what: &str,
        holds: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let title = format!("pod {name} {what}");
        let waited = until(&title, POD_TIMEOUT, || async {
            let pod = self.pod(name).await?;
            ensure!(holds(&pod), "{}", pod["status"]);
            Ok(pod)
        });
        match waited.await {
            Ok(pod) => Ok(pod),
            Err(failure) => bail!("{failure}\nevents: {}", self.events(name).await?),
        }
    }

    /// Returns reason and message of the events of a pod, oldest first.
    pub(crate) async fn events(&self, name: &str) -> Result<String> {
        let field = format!("--field-selector=involvedObject.name={name}");
        let list = self.kubectl.json(&["get", "events", &field]).await?;
        let lines = list["items"].as_array().into_iter().flatten().map(|e| {
            let text = |key: &str| e[key].as_str().unwrap_or_default().to_owned();
            format!("{}: {}", text("reason"), text("message"))
        });
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }

    /// Runs a shell script in a container and returns its output.
    pub(crate) async fn exec(&self, pod: &str, script: &str) -> Result<String> {
        self.kubectl
            .run(&["exec", pod, "--", "sh", "-c", script])
            .await
    }

    /// Removes the stopped sandboxes, as the kubelet does once a minute, and fails if others exist.
    async fn remove_sandboxes(&self) -> Result {
        let mut client = self.cluster.worker.node.cri.runtime();
        for pod in self.cluster.worker.node.pods().await? {
            ensure!(
                pod.state() == PodSandboxState::SandboxNotready,
                "sandbox {} runs",
                pod.id
            );
            let request = RemovePodSandboxRequest {
                pod_sandbox_id: pod.id,
            };
            client.remove_pod_sandbox(request).await?;
        }
        Ok(())
    }

    /// Returns the log of a pod's only container.
    pub(crate) async fn logs(&self, pod: &str) -> Result<String> {
        self.kubectl.run(&["logs", pod]).await
    }
}

/// Returns a pod's phase.
pub(crate) fn phase(pod: &Value) -> &str {
    pod["status"]["phase"].as_str().unwrap_or_default()
}

/// Returns the status of a container by name.
pub(crate) fn container<'a>(pod: &'a Value, name: &str) -> &'a Value {
    let lists = [
        "containerStatuses",
        "initContainerStatuses",
        "ephemeralContainerStatuses",
    ];
    lists
        .iter()
        .filter_map(|list| pod["status"][*list].as_array())
        .flatten()
        .find(|c| c["name"] == name)
        .unwrap_or(&Value::Null)
}

/// Returns the number of restarts of all containers of a pod.
pub(crate) fn restarts(pod: &Value) -> i64 {
    let statuses = pod["status"]["containerStatuses"].as_array();
    statuses
        .into_iter()
        .flatten()
        .filter_map(|c| c["restartCount"].as_i64())
        .sum()
}

impl TestEnv for ClusterContext {
    type Before = LeakSnapshot;

    fn backend(&self) -> Backend {
        Backend::Qemu
    }

    fn daemon(&self) -> &Service {
        self.cluster.worker.node.service()
    }

    fn before(&self) -> Result<LeakSnapshot> {
        LeakSnapshot::take(&self.cluster.worker.node)
    }

    async fn after(&self, before: LeakSnapshot, _failed: bool) -> Result {
        self.kubectl
            .run(&[
                "delete",
                KINDS,
                "--all",
                "--grace-period=1",
                "--ignore-not-found",
            ])
            .await?;
        self.kubectl
            .run(&["delete", "configmaps", "-l", "e2e=case"])
            .await?;
        self.kubectl.run(&["delete", "events", "--all"]).await?;
        self.cluster.worker.restore_kubelet().await?;
        let node = &self.cluster.worker.node;
        until("no sandbox remains", SETTLE_TIMEOUT, || {
            self.remove_sandboxes()
        })
        .await?;
        before.restored_within(node, SETTLE_TIMEOUT).await.map(drop)
    }
}

/// Returns the patch of a container's memory limit, as a resize sets it.
pub(crate) fn memory(limit: &str) -> Value {
    json!({"requests": {"memory": limit}, "limits": {"memory": limit}})
}
