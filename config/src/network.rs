//! [`NetworkSettings`]: network of pods without CNI, the `[network]` section.

use crate::section::{Mistake, Section};
use toml::Value;

/// Network of a pod that no CNI plugin serves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WithoutCni {
    /// Loopback only under containerd; boxlite-cri refuses the pod.
    #[default]
    None,
    /// Outgoing connections through the node, by passt.
    Passt,
}

impl WithoutCni {
    /// Returns the name in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Passt => "passt",
        }
    }

    fn read(value: &Value) -> Result<Self, String> {
        [Self::None, Self::Passt]
            .into_iter()
            .find(|network| value.as_str() == Some(network.name()))
            .ok_or_else(|| "must be none or passt".into())
    }
}

/// Network of pods without CNI.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetworkSettings {
    /// Network of a pod that no CNI plugin serves. Default none: a pod reaches the node's network only if the operator says so.
    pub without_cni: WithoutCni,
}

impl NetworkSettings {
    /// Reads the whole section.
    pub fn read(mut section: Section, mistakes: &mut Vec<Mistake>) -> Self {
        let default = Self::default();
        let settings = Self {
            without_cni: section.take("without_cni", default.without_cni, WithoutCni::read),
        };
        section.finish(mistakes);
        settings
    }
}
