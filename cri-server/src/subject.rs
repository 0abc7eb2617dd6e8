//! The pod of a call, for its log lines and its span.
//!
//! [`crate::server`] opens both before it knows the request; a handler adds the names as soon as it has found the pod.

use boxlite_proto::vmm::PodName;
use boxlite_runtime::LiteBox;
use boxlite_telemetry::span::set_current;

/// Adds the names of `pod` to the current call.
pub(crate) fn record_pod_name(pod: &PodName) {
    let call = tracing::Span::current();
    call.record("namespace", &pod.namespace);
    call.record("pod", &pod.name);
    set_current("k8s.namespace.name", &pod.namespace);
    set_current("k8s.pod.name", &pod.name);
    set_current("k8s.pod.uid", &pod.uid);
}

/// Adds the names of a box's pod to the current call, if they are known.
pub(crate) fn record_pod(pod: &LiteBox) {
    if let Some(pod) = pod.pod() {
        record_pod_name(pod);
    }
}
