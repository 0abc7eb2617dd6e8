//! Input of a plugin for one pod: environment, CNI_ARGS, and the JSON on its standard input.
//!
//! Data only: `plugin` runs programs, `record` stores the result.

use super::INTERFACE;
use super::conf::{NetworkConf, PluginConf};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Properties of a pod that plugins receive. Stored in the record, so that DEL passes the same values as ADD.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PodNetwork {
    /// CNI_CONTAINERID.
    pub sandbox_id: String,
    /// Pod name.
    pub name: String,
    /// Pod namespace.
    pub namespace: String,
    /// Pod UID.
    pub uid: String,
    /// Ports of the host that lead into the pod.
    pub port_mappings: Vec<PortMap>,
    /// Limits from the pod's annotations.
    pub bandwidth: Option<Bandwidth>,
    /// The node's pod CIDRs, if the kubelet has sent them.
    pub ip_ranges: Vec<String>,
    /// Name servers, searches and options for plugins with the `dns` capability.
    pub dns: DnsSettings,
    /// The pod's annotations, for plugins with containerd's capability of that name.
    pub annotations: BTreeMap<String, String>,
    /// Cgroup parent of the pod, for plugins with `cgroupPath`.
    pub cgroup_parent: String,
}

/// `dns` capability.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct DnsSettings {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// `portMappings` capability; field names are the protocol's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PortMap {
    pub host_port: u16,
    pub container_port: u16,
    /// tcp, udp or sctp.
    pub protocol: String,
    #[serde(rename = "hostIP", default, skip_serializing_if = "String::is_empty")]
    pub host_ip: String,
}

/// `bandwidth` capability: rates in bits per second, bursts in bits; 0 means unlimited.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Bandwidth {
    pub ingress_rate: u64,
    pub ingress_burst: u64,
    pub egress_rate: u64,
    pub egress_burst: u64,
}

/// Maximum burst that the bandwidth plugin accepts, in bits: 2^32 - 1 bytes, according to its source.
const MAX_BURST_BITS: u64 = i32::MAX as u64;

impl Bandwidth {
    /// Converts rates in bits per second; `None` if neither is limited.
    pub(crate) fn new(ingress: Option<u64>, egress: Option<u64>) -> Option<Self> {
        let burst = |rate: Option<u64>| rate.map_or(0, |_| MAX_BURST_BITS);
        (ingress.is_some() || egress.is_some()).then(|| Self {
            ingress_rate: ingress.unwrap_or(0),
            ingress_burst: burst(ingress),
            egress_rate: egress.unwrap_or(0),
            egress_burst: burst(egress),
        })
    }
}

/// Returns the environment of a plugin except CNI_PATH.
pub(crate) fn environment(
    command: &str,
    pod: &PodNetwork,
    netns: &str,
) -> Vec<(&'static str, String)> {
    // CNI_ARGS is a list of `key=value` separated by `;`. Kubernetes names contain neither character; names of other clients
    // must not inject an entry.
    let plain = |text: &str| text.replace([';', '='], "_");
    let args = format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
        plain(&pod.namespace),
        plain(&pod.name),
        plain(&pod.sandbox_id),
        plain(&pod.uid),
    );
    vec![
        ("CNI_COMMAND", command.to_owned()),
        ("CNI_CONTAINERID", pod.sandbox_id.clone()),
        ("CNI_NETNS", netns.to_owned()),
        ("CNI_IFNAME", INTERFACE.to_owned()),
        ("CNI_ARGS", args),
    ]
}

/// Returns the standard input of one plugin: its object with the network's name and version, the values for its
/// `capabilities`, and the result of the previous plugin.
pub(crate) fn input(
    network: &NetworkConf,
    plugin: &PluginConf,
    pod: &PodNetwork,
    previous: Option<&Value>,
) -> Value {
    let mut object = plugin.object.clone();
    object.insert("name".into(), json!(network.name));
    object.insert("cniVersion".into(), json!(network.cni_version));
    let runtime = runtime_config(plugin, pod);
    if !runtime.is_empty() {
        object.insert("runtimeConfig".into(), Value::Object(runtime));
    }
    if let Some(previous) = previous {
        object.insert("prevResult".into(), previous.clone());
    }
    Value::Object(object)
}

/// Returns the standard input of one plugin for GC: its object, and the live attachments of this network. The plugin may
/// free all others.
pub(crate) fn gc_input(network: &NetworkConf, plugin: &PluginConf, alive: &[String]) -> Value {
    let mut object = plugin.object.clone();
    object.insert("name".into(), json!(network.name));
    object.insert("cniVersion".into(), json!(network.cni_version));
    let attachments: Vec<_> = alive
        .iter()
        .map(|sandbox| json!({"containerID": sandbox, "ifname": INTERFACE}))
        .collect();
    object.insert("cni.dev/valid-attachments".into(), json!(attachments));
    Value::Object(object)
}

fn runtime_config(plugin: &PluginConf, pod: &PodNetwork) -> Map<String, Value> {
    let mut config = Map::new();
    for capability in &plugin.capabilities {
        let value = match capability.as_str() {
            "portMappings" if !pod.port_mappings.is_empty() => json!(pod.port_mappings),
            "bandwidth" => match &pod.bandwidth {
                Some(bandwidth) => json!(bandwidth),
                None => continue,
            },
            "ipRanges" if !pod.ip_ranges.is_empty() => Value::Array(
                pod.ip_ranges
                    .iter()
                    .map(|range| json!([{ "subnet": range }]))
                    .collect(),
            ),
            "dns" if pod.dns != DnsSettings::default() => json!(pod.dns),
            "aliases" if !pod.name.is_empty() => json!([pod.name]),
            "cgroupPath" if !pod.cgroup_parent.is_empty() => json!(pod.cgroup_parent),
            "io.kubernetes.cri.pod-annotations" if !pod.annotations.is_empty() => {
                json!(pod.annotations)
            }
            _ => continue,
        };
        config.insert(capability.clone(), value);
    }
    config
}
