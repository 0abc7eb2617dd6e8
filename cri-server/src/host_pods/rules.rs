//! [`Rules`]: selects the pods that run without a VM.

use crate::config::HostPodsConfig;
use boxlite_proto::cri::v1::{NamespaceMode, PodSandboxConfig};
use std::fmt;

/// The configured rules.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    handlers: Vec<String>,
    namespaces: Vec<String>,
}

/// Reason why a pod runs without a VM, as printed in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Rule {
    /// Its runtime handler is listed.
    Handler(String),
    /// Its namespace is listed, and it requests this of the host.
    Namespace {
        namespace: String,
        request: &'static str,
    },
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Handler(handler) => write!(f, "host_pods.handlers lists {handler:?}"),
            Self::Namespace { namespace, request } => write!(
                f,
                "host_pods.namespaces lists {namespace:?} and the pod requests {request}"
            ),
        }
    }
}

impl Rules {
    pub(super) fn new(config: &HostPodsConfig) -> Self {
        Self {
            handlers: config.handlers.clone(),
            namespaces: config.namespaces.clone(),
        }
    }

    /// Returns the listed handlers.
    pub(super) fn handlers(&self) -> &[String] {
        &self.handlers
    }

    /// Returns the rule that selects a pod, or `None` if it gets a VM. A pod that names a handler outside the list requests
    /// a VM explicitly and gets one.
    pub(super) fn select(&self, config: &PodSandboxConfig, handler: &str) -> Option<Rule> {
        if self.handlers.iter().any(|listed| listed == handler) {
            return Some(Rule::Handler(handler.to_owned()));
        }
        if !handler.is_empty() {
            return None;
        }
        let namespace = &config.metadata.as_ref()?.namespace;
        if !self.namespaces.contains(namespace) {
            return None;
        }
        Some(Rule::Namespace {
            namespace: namespace.clone(),
            request: host_request(config)?,
        })
    }
}

/// Returns the part of the host that the pod requests.
fn host_request(config: &PodSandboxConfig) -> Option<&'static str> {
    let security = config.linux.as_ref()?.security_context.as_ref()?;
    if security.privileged {
        return Some("privileges");
    }
    let namespaces = security.namespace_options.as_ref()?;
    let node = NamespaceMode::Node as i32;
    [
        (namespaces.network, "the host's network"),
        (namespaces.pid, "the host's PID namespace"),
        (namespaces.ipc, "the host's IPC namespace"),
    ]
    .into_iter()
    .find(|(mode, _)| *mode == node)
    .map(|(_, request)| request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use boxlite_proto::cri::v1::{
        LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption, PodSandboxMetadata,
    };

    fn pod(namespace: &str, security: LinuxSandboxSecurityContext) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                namespace: namespace.into(),
                ..Default::default()
            }),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn node(network: i32, pid: i32, ipc: i32) -> LinuxSandboxSecurityContext {
        LinuxSandboxSecurityContext {
            namespace_options: Some(NamespaceOption {
                network,
                pid,
                ipc,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn rules() -> Rules {
        Rules {
            handlers: vec!["runc".into()],
            namespaces: vec!["kube-system".into()],
        }
    }

    #[test]
    fn select_by_handler_ignores_namespace_and_privileges() {
        let plain = pod("default", node(0, 0, 0));
        assert_eq!(
            rules().select(&plain, "runc"),
            Some(Rule::Handler("runc".into()))
        );
        for handler in ["", "boxlite", "run", "runc2"] {
            assert_eq!(rules().select(&plain, handler), None, "{handler}");
        }
    }

    #[test]
    fn select_by_namespace_needs_a_request_for_the_host() {
        let privileged = LinuxSandboxSecurityContext {
            privileged: true,
            ..Default::default()
        };
        for (security, request) in [
            (node(2, 0, 0), Some("the host's network")),
            (node(0, 2, 0), Some("the host's PID namespace")),
            (node(0, 0, 2), Some("the host's IPC namespace")),
            (privileged, Some("privileges")),
            // The modes POD, CONTAINER and TARGET, and a pod without options.
            (node(0, 1, 1), None),
            (node(0, 3, 0), None),
            (LinuxSandboxSecurityContext::default(), None),
        ] {
            let expected = request.map(|request| Rule::Namespace {
                namespace: "kube-system".into(),
                request,
            });
            let found = rules().select(&pod("kube-system", security.clone()), "");
            assert_eq!(found, expected);
            assert_eq!(rules().select(&pod("default", security.clone()), ""), None);
            let explicit = rules().select(&pod("kube-system", security), "boxlite");
            assert_eq!(explicit, None, "an explicit request for a VM");
        }
        assert_eq!(rules().select(&PodSandboxConfig::default(), ""), None);
    }
}
