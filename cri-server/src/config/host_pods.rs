//! `[host_pods]`: pods that the node's own containerd runs, without a VM. Keys and defaults only; [`crate::host_pods`] has the
//! policy.

use super::Mistake;
use boxlite_config::section::Section;
use boxlite_config::value;
use std::path::PathBuf;
use toml::Value;

/// Longest name of a namespace, in bytes (a DNS label).
const MAX_NAMESPACE_BYTES: usize = 63;

/// Pods without a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HostPodsConfig {
    /// CRI socket of the node's containerd; `None` runs every pod in a VM. Default none: such pods share the host's kernel.
    pub endpoint: Option<PathBuf>,
    /// Runtime handlers whose pods containerd runs. Default none: each exception is named by the operator.
    pub handlers: Vec<String>,
    /// Namespaces whose pods containerd runs if they request host namespaces or privileges. Default none.
    pub namespaces: Vec<String>,
}

impl HostPodsConfig {
    pub(super) fn read(mut section: Section, mistakes: &mut Vec<Mistake>) -> Self {
        let host_pods = Self {
            endpoint: section.take("endpoint", None, endpoint),
            handlers: section.take("handlers", Vec::new(), |v| match v.as_array() {
                Some(list) if list.is_empty() => Ok(Vec::new()),
                _ => value::handlers(v),
            }),
            namespaces: section.take("namespaces", Vec::new(), namespaces),
        };
        section.finish(mistakes);
        host_pods
    }

    /// Returns the contradictions to the handlers of VMs and to the daemon's socket.
    pub(super) fn conflicts(&self, runtime_handlers: &[String], listen: &PathBuf) -> Vec<Mistake> {
        let mut conflicts: Vec<Mistake> = self
            .handlers
            .iter()
            .filter(|handler| runtime_handlers.contains(handler))
            .map(|handler| Mistake {
                key: "host_pods.handlers".into(),
                value: format!("{handler:?}"),
                reason: "must not be in runtime_handlers, too".into(),
            })
            .collect();
        if self.endpoint.as_ref() == Some(listen) {
            conflicts.push(Mistake {
                key: "host_pods.endpoint".into(),
                value: format!("{listen:?}"),
                reason: "must differ from listen".into(),
            });
        }
        conflicts
    }
}

/// `unix:///path`, `/path` or `off`.
fn endpoint(value: &Value) -> Result<Option<PathBuf>, String> {
    match value::text(value)? {
        "off" => Ok(None),
        text => value::socket_path(text)
            .map(Some)
            .map_err(|reason| format!("{reason}, or off")),
    }
}

fn namespaces(value: &Value) -> Result<Vec<String>, String> {
    let list = value.as_array().ok_or("must be a list of strings")?;
    list.iter()
        .map(|entry| {
            let name = value::text(entry)?;
            let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            let valid =
                (1..=MAX_NAMESPACE_BYTES).contains(&name.len()) && name.chars().all(allowed);
            match valid {
                true => Ok(name.to_owned()),
                false => Err(format!("{name:?} is not a valid namespace")),
            }
        })
        .collect()
}
