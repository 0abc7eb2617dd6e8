//! [`ApiServer`]: the few requests to the API server, as the pod's service account. [`Cluster`] abstracts them for tests.

use crate::error::{FileContext, InstallError, Result};
use boxlite_sys::calendar::rfc3339;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Label of nodes that run pods of the RuntimeClass.
pub(crate) const LABEL: &str = "io.boxlite/runtime";
/// Annotation with the state of the installation: `installing`, `ready`, `failed` or `removed`.
pub(crate) const STATE: &str = "io.boxlite/installer";
/// Annotation that requests the removal.
pub(crate) const UNINSTALL: &str = "io.boxlite/uninstall";
/// Directory of the pod's service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest message of an event that the API server accepts.
const MAX_EVENT_CHARS: usize = 1024;

/// Parts of a node object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct NodeInfo {
    pub name: String,
    pub uid: String,
    pub runtime_version: String,
    pub kernel_version: String,
    /// Names of the runtime handlers; `None` if the kubelet reports none.
    pub handlers: Option<Vec<String>>,
    pub labeled: bool,
    pub state: Option<String>,
    pub uninstall: bool,
}

impl NodeInfo {
    /// Reads a node object.
    pub(crate) fn parse(node: &Value) -> Self {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let metadata = &node["metadata"];
        let handlers = node["status"]["runtimeHandlers"].as_array();
        Self {
            name: text(&metadata["name"]).unwrap_or_default(),
            uid: text(&metadata["uid"]).unwrap_or_default(),
            runtime_version: text(&node["status"]["nodeInfo"]["containerRuntimeVersion"])
                .unwrap_or_default(),
            kernel_version: text(&node["status"]["nodeInfo"]["kernelVersion"]).unwrap_or_default(),
            handlers: handlers.map(|list| list.iter().filter_map(|h| text(&h["name"])).collect()),
            labeled: metadata["labels"][LABEL] == "true",
            state: text(&metadata["annotations"][STATE]),
            uninstall: metadata["annotations"][UNINSTALL] == "true",
        }
    }
}

/// Change of a node's label or annotation: a key, and its value or `None` for removal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Label(Option<&'static str>),
    State(Option<&'static str>),
    Uninstall(Option<&'static str>),
}

/// Returns the merge patch for changes.
fn patch(changes: &[Change]) -> Value {
    let mut patch = json!({ "metadata": { "labels": {}, "annotations": {} } });
    for change in changes {
        let (kind, key, value) = match change {
            Change::Label(value) => ("labels", LABEL, value),
            Change::State(value) => ("annotations", STATE, value),
            Change::Uninstall(value) => ("annotations", UNINSTALL, value),
        };
        patch["metadata"][kind][key] = json!(value);
    }
    patch
}

/// Kind of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EventKind {
    Installed,
    InstallFailed,
    Removed,
    RemoveFailed,
}

impl EventKind {
    fn kind(self) -> &'static str {
        match self {
            Self::Installed | Self::Removed => "Normal",
            Self::InstallFailed | Self::RemoveFailed => "Warning",
        }
    }

    fn reason(self) -> &'static str {
        match self {
            Self::Installed => "BoxliteInstalled",
            Self::InstallFailed => "BoxliteInstallFailed",
            Self::Removed => "BoxliteRemoved",
            Self::RemoveFailed => "BoxliteRemoveFailed",
        }
    }
}

/// Requests about nodes.
pub(crate) trait Cluster {
    /// Returns a node.
    async fn node(&self, name: &str) -> Result<NodeInfo>;
    /// Returns all nodes.
    async fn nodes(&self) -> Result<Vec<NodeInfo>>;
    /// Changes labels and annotations of a node.
    async fn change(&self, name: &str, changes: &[Change]) -> Result<()>;
    /// Creates an event of a node.
    async fn event(&self, node: &NodeInfo, kind: EventKind, message: &str) -> Result<()>;
    /// Deletes a DaemonSet with its pods. Returns false if it does not exist.
    async fn delete_daemon_set(&self, namespace: &str, name: &str) -> Result<bool>;
}

/// API server of the pod's cluster.
pub(crate) struct ApiServer {
    client: reqwest::Client,
    url: String,
}

impl ApiServer {
    /// Connects to the server that the environment names.
    pub(crate) fn from_environment() -> Result<Self> {
        let variable = |name| std::env::var(name).map_err(|_| InstallError::Environment { name });
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        let port = variable("KUBERNETES_SERVICE_PORT")?;
        let host = if host.contains(':') {
            format!("[{host}]")
        } else {
            host
        };
        let ca = Path::new(ACCOUNT).join("ca.crt");
        let pem = fs::read(&ca).file("read", &ca)?;
        let failed = |source| InstallError::Api {
            action: "prepare the client".into(),
            source,
        };
        let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(failed)?;
        let client = reqwest::Client::builder()
            .no_proxy()
            .tls_certs_only(certificates)
            .timeout(REQUEST_TIMEOUT)
            .build()
            .map_err(failed)?;
        Ok(Self {
            client,
            url: format!("https://{host}:{port}"),
        })
    }

    /// Sends a request. Returns the status 404 as `None`.
    async fn send(
        &self,
        action: &str,
        method: reqwest::Method,
        path: &str,
        body: Option<(&'static str, Value)>,
    ) -> Result<Option<Value>> {
        // Read for each request: the kubelet rotates it.
        let token = Path::new(ACCOUNT).join("token");
        let token = fs::read_to_string(&token).file("read", &token)?;
        let mut request = self
            .client
            .request(method, format!("{}{path}", self.url))
            .bearer_auth(token.trim());
        if let Some((kind, body)) = body {
            request = request.header("Content-Type", kind).body(body.to_string());
        }
        let failed = |source| InstallError::Api {
            action: action.to_owned(),
            source,
        };
        let answer = request.send().await.map_err(failed)?;
        let status = answer.status();
        let text = answer.text().await.map_err(failed)?;
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        if status == 404 {
            return Ok(None);
        }
        if !status.is_success() {
            return Err(InstallError::Refused {
                action: action.to_owned(),
                status: status.as_u16(),
                message: value["message"].as_str().unwrap_or(&text).to_owned(),
            });
        }
        Ok(Some(value))
    }
}

/// Turns an object that does not exist into an error.
fn found(action: &str, value: Option<Value>) -> Result<Value> {
    value.ok_or_else(|| InstallError::Refused {
        action: action.to_owned(),
        status: 404,
        message: "not found".into(),
    })
}

impl Cluster for ApiServer {
    async fn node(&self, name: &str) -> Result<NodeInfo> {
        let action = format!("read node {name}");
        let path = format!("/api/v1/nodes/{name}");
        let node = self
            .send(&action, reqwest::Method::GET, &path, None)
            .await?;
        Ok(NodeInfo::parse(&found(&action, node)?))
    }

    async fn nodes(&self) -> Result<Vec<NodeInfo>> {
        let action = "list nodes";
        let list = self
            .send(action, reqwest::Method::GET, "/api/v1/nodes", None)
            .await?;
        let list = found(action, list)?;
        let items = list["items"].as_array().into_iter().flatten();
        Ok(items.map(NodeInfo::parse).collect())
    }

    async fn change(&self, name: &str, changes: &[Change]) -> Result<()> {
        let action = format!("label node {name}");
        let path = format!("/api/v1/nodes/{name}");
        let body = Some(("application/merge-patch+json", patch(changes)));
        let node = self
            .send(&action, reqwest::Method::PATCH, &path, body)
            .await?;
        found(&action, node).map(drop)
    }

    async fn event(&self, node: &NodeInfo, kind: EventKind, message: &str) -> Result<()> {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let event = event(node, kind, message, since);
        let body = Some(("application/json", event));
        let path = "/api/v1/namespaces/default/events";
        let action = "create event";
        let event = self.send(action, reqwest::Method::POST, path, body).await?;
        found(action, event).map(drop)
    }

    async fn delete_daemon_set(&self, namespace: &str, name: &str) -> Result<bool> {
        let action = format!("delete DaemonSet {namespace}/{name}");
        let path = format!("/apis/apps/v1/namespaces/{namespace}/daemonsets/{name}");
        // The object remains until its pods are gone.
        let options = json!({ "propagationPolicy": "Foreground" });
        let body = Some(("application/json", options));
        let answer = self
            .send(&action, reqwest::Method::DELETE, &path, body)
            .await?;
        Ok(answer.is_some())
    }
}

/// Returns an event object. The name is unique by time, as client-go's.
fn event(node: &NodeInfo, kind: EventKind, message: &str, now: Duration) -> Value {
    let time = rfc3339(now.as_secs());
    let message: String = message.chars().take(MAX_EVENT_CHARS).collect();
    json!({
        "apiVersion": "v1", "kind": "Event",
        "metadata": { "name": format!("{}.{:x}", node.name, now.as_nanos()), "namespace": "default" },
        // The kubelet names itself by its node's name as uid; kubectl describe node looks for either.
        "involvedObject": { "apiVersion": "v1", "kind": "Node", "name": node.name, "uid": node.uid },
        "type": kind.kind(), "reason": kind.reason(), "message": message, "count": 1,
        "source": { "component": "boxlite-installer", "host": node.name },
        "firstTimestamp": time, "lastTimestamp": time,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_info_reads_handlers_labels_and_annotations() {
        let node = json!({
            "metadata": { "name": "n", "uid": "u", "labels": { LABEL: "true" },
                "annotations": { STATE: "ready", UNINSTALL: "true" } },
            "status": { "nodeInfo": { "containerRuntimeVersion": "containerd://2.1.9" },
                "runtimeHandlers": [{ "name": "" }, { "name": "boxlite" }] },
        });
        let info = NodeInfo::parse(&node);
        assert_eq!(info.handlers, Some(vec![String::new(), "boxlite".into()]));
        assert!(info.labeled && info.uninstall);
        assert_eq!(info.state.as_deref(), Some("ready"));
        let bare = NodeInfo::parse(&json!({ "metadata": { "name": "n" } }));
        assert_eq!(bare.handlers, None);
        assert!(!bare.labeled && !bare.uninstall);
    }

    #[test]
    fn patch_removes_a_label_by_null() {
        let patch = patch(&[Change::Label(None), Change::State(Some("removed"))]);
        assert_eq!(patch["metadata"]["labels"], json!({ LABEL: null }));
        assert_eq!(
            patch["metadata"]["annotations"],
            json!({ STATE: "removed" })
        );
    }

    #[test]
    fn event_is_bounded_and_names_the_node() {
        let node = NodeInfo {
            name: "n".into(),
            ..NodeInfo::default()
        };
        let event = event(
            &node,
            EventKind::InstallFailed,
            &"x".repeat(5000),
            Duration::from_secs(1_795_814_345),
        );
        assert_eq!(
            event["message"].as_str().map(str::len),
            Some(MAX_EVENT_CHARS)
        );
        assert_eq!(event["type"], "Warning");
        assert_eq!(event["involvedObject"]["name"], "n");
        assert_eq!(event["firstTimestamp"], "2026-11-27T21:19:05Z");
    }
}
