//! Pod objects of the cases: a busybox container that runs a script, without restarts and with a short grace period unless the
//! case sets other values.

use super::images::BUSYBOX;
use serde_json::{Value, json};

/// Returns a container that runs a shell script.
pub(crate) fn container(name: &str, script: &str) -> Value {
    json!({"name": name, "image": BUSYBOX, "command": ["sh", "-c", script]})
}

/// Returns a pod of these containers.
pub(crate) fn pod(name: &str, containers: &[Value]) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": containers},
    })
}

/// Returns a pod whose only container `main` runs a shell script.
pub(crate) fn script(name: &str, script: &str) -> Value {
    pod(name, &[container("main", script)])
}

/// Script of a container that runs until it is stopped.
pub(crate) const IDLE: &str = "trap 'exit 0' TERM; sleep infinity & wait";
