//! A pod: conversion from RunPodSandbox's config to the runtime's options and the network, and the stored metadata.
//!
//! [`PodMetadata`] is the runtime's opaque metadata of a box: the CRI messages in their encoding, so that fields of a
//! newer kubelet survive a restart of the daemon.

use super::size::{limits, merge};
use super::{ConvertError, lsm, userns};
use crate::cni::{Bandwidth, DnsSettings, PodNetwork, PortMap};
use boxlite_config::cgroup::expand_slice;
use boxlite_config::dns;
use boxlite_config::pod::PodDefaults;
use boxlite_config::size::{self, SizeRequest};
use boxlite_proto::cri::v1::{
    LinuxContainerResources, NamespaceMode, PodSandboxConfig, PodSandboxMetadata, Protocol,
    UserNamespace,
};
use boxlite_proto::vmm::PodName;
use boxlite_runtime::BoxOptions;
use prost::Message;
use std::net::IpAddr;
use std::path::PathBuf;

/// Maximum length of a hostname in Linux, in bytes.
const MAX_HOSTNAME_BYTES: usize = 64;
/// Maximum length of a DNS label, in bytes (RFC 1123).
const MAX_LABEL_BYTES: usize = 63;
const MIB: u64 = 1 << 20;

/// Metadata that this crate stores for a pod.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct PodMetadata {
    /// Config of RunPodSandbox.
    #[prost(message, optional, tag = "1")]
    pub config: Option<PodSandboxConfig>,
    /// Requested runtime handler.
    #[prost(string, tag = "2")]
    pub runtime_handler: String,
    /// Addresses of the pod, the primary one first.
    #[prost(string, repeated, tag = "3")]
    pub addresses: Vec<String>,
    /// Duration of the CNI calls, in ms.
    #[prost(uint64, tag = "4")]
    pub network_ms: u64,
    /// True if passt serves the pod's network instead of CNI.
    #[prost(bool, tag = "5")]
    pub passt: bool,
}

impl PodMetadata {
    /// Creates the metadata of a pod without network. Validates required and unsupported fields.
    pub(crate) fn new(
        config: PodSandboxConfig,
        runtime_handler: String,
    ) -> Result<Self, ConvertError> {
        let metadata = config
            .metadata
            .as_ref()
            .ok_or(ConvertError::Missing("config.metadata"))?;
        if metadata.name.is_empty() {
            return Err(ConvertError::Missing("config.metadata.name"));
        }
        let security = config
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.as_ref());
        userns::check_namespaces(
            security.and_then(|security| security.namespace_options.as_ref()),
        )?;
        security.map(lsm::sandbox).transpose()?;
        for mapping in &config.port_mappings {
            port(mapping.host_port, mapping.container_port)?;
        }
        let record = Self {
            config: Some(config),
            runtime_handler,
            ..Self::default()
        };
        let hostname = record.hostname();
        if hostname.len() > MAX_HOSTNAME_BYTES
            || hostname
                .chars()
                .any(|c| c.is_control() || c == '/' || c.is_whitespace())
        {
            return Err(ConvertError::invalid(
                "config.hostname",
                hostname,
                "not a hostname",
            ));
        }
        if let Some(directory) = record.config.as_ref().map(|config| &config.log_directory)
            && !directory.is_empty()
            && !directory.starts_with('/')
        {
            return Err(ConvertError::invalid(
                "config.log_directory",
                directory.clone(),
                "must be an absolute path",
            ));
        }
        Ok(record)
    }

    /// Decodes the result of [`Self::encoded`]; unreadable metadata is empty, so that the pod can still be removed.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        Self::decode(bytes).unwrap_or_else(|error| {
            tracing::warn!(%error, "failed to decode pod metadata");
            Self::default()
        })
    }

    /// Returns the metadata in `bytes` with the values of UpdatePodSandboxResources: zero fields keep the old values.
    /// Unreadable metadata is not changed.
    pub(crate) fn updated(
        bytes: &[u8],
        resources: Option<&LinuxContainerResources>,
        overhead: Option<&LinuxContainerResources>,
    ) -> Vec<u8> {
        let Ok(mut record) = Self::decode(bytes) else {
            return bytes.to_vec();
        };
        let linux = record
            .config
            .get_or_insert_default()
            .linux
            .get_or_insert_default();
        if let Some(update) = resources {
            merge(linux.resources.get_or_insert_default(), update);
        }
        if let Some(update) = overhead {
            merge(linux.overhead.get_or_insert_default(), update);
        }
        record.encoded()
    }

    /// Encodes the metadata for storage in the runtime.
    pub(crate) fn encoded(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    /// Returns name, namespace, uid and attempt.
    pub(crate) fn metadata(&self) -> PodSandboxMetadata {
        self.config
            .as_ref()
            .and_then(|config| config.metadata.clone())
            .unwrap_or_default()
    }

    /// Returns the unique key of a pod. Its parts are escaped, so that no two pods share one.
    pub(crate) fn key(&self) -> String {
        key(&self.metadata())
    }

    /// Returns the pod's names for logs and traces.
    pub(crate) fn pod_name(&self) -> PodName {
        let metadata = self.metadata();
        PodName {
            namespace: metadata.namespace,
            name: metadata.name,
            uid: metadata.uid,
        }
    }

    /// Returns the hostname of the pod: from the config, the node's with host networking, or derived from the pod's name.
    pub(crate) fn hostname(&self) -> String {
        let wanted = self
            .config
            .as_ref()
            .map(|config| config.hostname.clone())
            .unwrap_or_default();
        if !wanted.is_empty() {
            return wanted;
        }
        // A kubelet sends no hostname for a pod in the node's network: agents identify the node by it.
        if self.host_network()
            && let Some(node) = node_hostname()
        {
            return node;
        }
        let mut label: String = self
            .metadata()
            .name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .take(MAX_LABEL_BYTES)
            .collect();
        label.truncate(label.trim_end_matches('-').len());
        if label.is_empty() {
            "pod".into()
        } else {
            label
        }
    }

    /// Returns whether the pod uses the host network.
    pub(crate) fn host_network(&self) -> bool {
        self.config
            .as_ref()
            .and_then(|config| config.linux.as_ref())
            .and_then(|linux| linux.security_context.as_ref())
            .and_then(|security| security.namespace_options.as_ref())
            .is_some_and(|options| options.network == NamespaceMode::Node as i32)
    }

    /// Returns whether privileged containers are allowed in the pod.
    pub(crate) fn is_privileged(&self) -> bool {
        self.config
            .as_ref()
            .and_then(|config| config.linux.as_ref())
            .and_then(|linux| linux.security_context.as_ref())
            .is_some_and(|security| security.privileged)
    }

    /// Returns the requested user namespace.
    pub(crate) fn userns(&self) -> Option<&UserNamespace> {
        let linux = self.config.as_ref()?.linux.as_ref()?;
        let options = linux
            .security_context
            .as_ref()?
            .namespace_options
            .as_ref()?;
        options.userns_options.as_ref()
    }

    /// Returns the pod's cgroup as a path, systemd's slices expanded; empty if the request has none.
    pub(crate) fn cgroup_parent(&self) -> String {
        self.config
            .as_ref()
            .and_then(|config| config.linux.as_ref())
            .map(|linux| expand_slice(&linux.cgroup_parent))
            .unwrap_or_default()
    }

    /// Sets the addresses.
    pub(crate) fn set_addresses(&mut self, addresses: &[IpAddr]) {
        self.addresses = addresses.iter().map(IpAddr::to_string).collect();
    }

    /// Returns the options of the pod's box.
    pub(crate) fn box_options(
        &self,
        id: &str,
        netns: Option<PathBuf>,
        defaults: &PodDefaults,
    ) -> Result<BoxOptions, ConvertError> {
        let linux = self
            .config
            .as_ref()
            .and_then(|config| config.linux.as_ref());
        let request = SizeRequest {
            limits: limits(linux.and_then(|linux| linux.resources.as_ref())),
            node_mib: size::node_mib(),
            ..SizeRequest::default()
        };
        let size = size::vm_size(&request, defaults)?;
        Ok(BoxOptions {
            id: id.to_owned(),
            name: self.key(),
            metadata: self.encoded(),
            pod: Some(self.pod_name()),
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            containers_bytes: size.containers_bytes,
            scratch_bytes: u64::from(defaults.scratch_mib) * MIB,
            hostname: self.hostname(),
            netns,
            host_network: self.host_network(),
            passt: self.passt,
            sysctls: linux
                .map(|linux| linux.sysctls.clone().into_iter().collect())
                .unwrap_or_default(),
            cgroup_parent: self.cgroup_parent(),
            vmm: None,
            debug_console: defaults.debug_console,
            shared_volume_writers: defaults.shared_volume_writers,
            vmm_ids: defaults.vmm_ids,
        })
    }

    /// Returns the pod's network for CNI; `ranges` are the node's pod CIDRs, if the kubelet has sent them.
    pub(crate) fn network(&self, id: &str, ranges: &[String]) -> Result<PodNetwork, ConvertError> {
        let none = PodSandboxConfig::default();
        let config = self.config.as_ref().unwrap_or(&none);
        let metadata = self.metadata();
        let mut port_mappings = Vec::new();
        for mapping in &config.port_mappings {
            let (host_port, container_port) = port(mapping.host_port, mapping.container_port)?;
            // A port without host port is informational.
            if host_port > 0 {
                port_mappings.push(PortMap {
                    host_port,
                    container_port,
                    protocol: match mapping.protocol() {
                        Protocol::Tcp => "tcp",
                        Protocol::Udp => "udp",
                        Protocol::Sctp => "sctp",
                    }
                    .into(),
                    host_ip: mapping.host_ip.clone(),
                });
            }
        }
        let rate = |key: &'static str| {
            config
                .annotations
                .get(key)
                .map(|text| quantity(key, text))
                .transpose()
        };
        let dns = config.dns_config.clone().unwrap_or_default();
        Ok(PodNetwork {
            sandbox_id: id.to_owned(),
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            port_mappings,
            bandwidth: Bandwidth::new(
                rate("kubernetes.io/ingress-bandwidth")?,
                rate("kubernetes.io/egress-bandwidth")?,
            ),
            ip_ranges: ranges.to_vec(),
            dns: DnsSettings {
                servers: dns.servers,
                searches: dns.searches,
                options: dns.options,
            },
            annotations: config.annotations.clone().into_iter().collect(),
            cgroup_parent: self.cgroup_parent(),
        })
    }

    /// Returns the pod's resolv.conf; `None` without DNS config, which means the node's.
    pub(crate) fn resolv_conf(&self) -> Option<String> {
        let dns = self.config.as_ref()?.dns_config.as_ref()?;
        dns::resolv_conf(&dns.servers, &dns.searches, &dns.options)
    }

    /// Returns the pod's hosts file, for containers without a hosts mount of the kubelet.
    pub(crate) fn hosts(&self) -> String {
        let mut text = String::from(
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
        );
        let hostname = self.hostname();
        for address in &self.addresses {
            text.push_str(&format!("{address}\t{hostname}\n"));
        }
        text
    }
}

/// Returns the hostname of the node.
fn node_hostname() -> Option<String> {
    let name = nix::unistd::gethostname().ok()?.into_string().ok()?;
    (!name.is_empty()).then_some(name)
}

/// `namespace/name/uid/attempt`.
pub(crate) fn key(metadata: &PodSandboxMetadata) -> String {
    let clean = |text: &str| text.replace('%', "%25").replace('/', "%2F");
    format!(
        "{}/{}/{}/{}",
        clean(&metadata.namespace),
        clean(&metadata.name),
        clean(&metadata.uid),
        metadata.attempt
    )
}

fn port(host: i32, container: i32) -> Result<(u16, u16), ConvertError> {
    let number = |port: i32| {
        u16::try_from(port).map_err(|_| {
            ConvertError::invalid("config.port_mappings", port.to_string(), "not a port")
        })
    };
    let pair = (number(host)?, number(container)?);
    if pair.0 > 0 && pair.1 == 0 {
        return Err(ConvertError::invalid(
            "config.port_mappings",
            "0",
            "not a container port",
        ));
    }
    Ok(pair)
}

/// Parses a Kubernetes quantity in bits per second: a decimal number with an optional suffix (k M G T, Ki Mi Gi Ti),
/// in the kubelet's range of 1k to 1P.
fn quantity(field: &'static str, text: &str) -> Result<u64, ConvertError> {
    let fail = |reason: &str| ConvertError::invalid(field, text, reason);
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let factor: u64 = match &text[digits..] {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return Err(fail("not a quantity such as 10M")),
    };
    let number: u64 = text[..digits]
        .parse()
        .map_err(|_| fail("not a quantity such as 10M"))?;
    number
        .checked_mul(factor)
        .filter(|rate| (1_000..=1_000_000_000_000_000).contains(rate))
        .ok_or_else(|| fail("must be 1k to 1P"))
}

#[cfg(test)]
mod tests;
