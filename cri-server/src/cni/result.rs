//! Result of ADD, parsed leniently: only fields that the CRI reports are read, the others are passed on unchanged.

use super::plugin::PluginError;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::net::IpAddr;

/// Fields of a result (CNI 0.3 to 1.1) that are read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CniResult {
    /// Created interfaces, on the host and in the namespace.
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    /// Addresses.
    #[serde(default)]
    pub ips: Vec<IpConfig>,
}

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Interface {
    pub name: String,
    #[serde(default)]
    pub mac: String,
    /// Path of the namespace; empty on the host.
    #[serde(default)]
    pub sandbox: String,
}

/// An address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IpConfig {
    /// CIDR.
    pub address: String,
    /// Index into `interfaces`.
    #[serde(default)]
    pub interface: Option<usize>,
}

impl CniResult {
    /// Reads the fields; one of the wrong type counts as absent.
    pub(crate) fn from_value(value: &Value) -> Self {
        fn list<T: serde::de::DeserializeOwned>(value: Option<&Value>) -> Vec<T> {
            value
                .and_then(Value::as_array)
                .map(|items| {
                    items
                        .iter()
                        .filter_map(|item| serde_json::from_value(item.clone()).ok())
                        .collect()
                })
                .unwrap_or_default()
        }
        Self {
            interfaces: list(value.get("interfaces")),
            ips: list(value.get("ips")),
        }
    }

    /// Returns the pod's addresses in the plugins' order: the pod's IP, then the additional ones.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.ips
            .iter()
            .filter(
                |ip| match ip.interface.and_then(|i| self.interfaces.get(i)) {
                    Some(interface) => !interface.sandbox.is_empty(),
                    None => true,
                },
            )
            .filter_map(|ip| ip.address.split('/').next()?.parse().ok())
    }
}

/// Parses the output of ADD; `None` without output.
pub(crate) fn parse_value(output: &[u8]) -> Result<Option<Value>, PluginError> {
    if output.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    match serde_json::from_slice(output) {
        Ok(value @ Value::Object(_)) => Ok(Some(value)),
        Ok(_) => Err(PluginError::NoObject),
        Err(source) => Err(PluginError::NoJson { source }),
    }
}
