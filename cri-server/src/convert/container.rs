//! A container: conversion from CreateContainer's config to the runtime's options, and the stored metadata.

use super::ConvertError;
use super::sandbox::PodMetadata;
use super::signal;
use super::size;
use super::spec::{self, Source};
use boxlite_proto::cri::v1::{ContainerConfig, LinuxContainerResources, Mount, NamespaceMode};
use boxlite_runtime::images::ImageRecord;
use boxlite_runtime::{ContainerOptions, PidMode};
use prost::Message;
use std::path::{Component, Path, PathBuf};

/// Metadata that this crate stores for a container. It excludes the environment, which may be secret and is not
/// returned.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ContainerMetadata {
    /// Config of CreateContainer without `envs`.
    #[prost(message, optional, tag = "1")]
    pub config: Option<ContainerConfig>,
    /// Digest reference of the image, or its id.
    #[prost(string, tag = "2")]
    pub image_ref: String,
    /// Linux number of the stop signal.
    #[prost(uint32, tag = "3")]
    pub stop_signal: u32,
    /// Absolute path of the log; empty without log.
    #[prost(string, tag = "4")]
    pub log_path: String,
}

impl ContainerMetadata {
    /// Decodes stored metadata; unreadable metadata is empty, so that the container can still be removed.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        Self::decode(bytes).unwrap_or_else(|error| {
            tracing::warn!(%error, "failed to decode container metadata");
            Self::default()
        })
    }

    /// Returns the config, empty if it is lost.
    pub(crate) fn config(&self) -> ContainerConfig {
        self.config.clone().unwrap_or_default()
    }

    /// Returns the current resources.
    pub(crate) fn resources(&self) -> Option<LinuxContainerResources> {
        self.config.as_ref()?.linux.as_ref()?.resources.clone()
    }

    /// Returns the metadata in `bytes` with updated resources: zero fields keep the old values. Unreadable metadata
    /// is not changed.
    pub(crate) fn updated(bytes: &[u8], update: &LinuxContainerResources) -> Vec<u8> {
        let Ok(mut record) = Self::decode(bytes) else {
            return bytes.to_vec();
        };
        let config = record.config.get_or_insert_default();
        let have = config
            .linux
            .get_or_insert_default()
            .resources
            .get_or_insert_default();
        size::merge(have, update);
        record.encode_to_vec()
    }
}

/// Validates the fields that depend neither on the pod nor on the image.
pub(crate) fn validate(config: &ContainerConfig) -> Result<(), ConvertError> {
    let metadata = config
        .metadata
        .as_ref()
        .ok_or(ConvertError::Missing("config.metadata"))?;
    if metadata.name.is_empty() {
        return Err(ConvertError::Missing("config.metadata.name"));
    }
    match &config.image {
        Some(image) if !image.image.is_empty() => Ok(()),
        _ => Err(ConvertError::Missing("config.image.image")),
    }
}

/// Returns the unique name within the pod.
pub(crate) fn key(config: &ContainerConfig) -> String {
    let metadata = config.metadata.clone().unwrap_or_default();
    format!(
        "{}/{}",
        metadata.name.replace('%', "%25").replace('/', "%2F"),
        metadata.attempt
    )
}

/// Returns the image reference of an image mount.
pub(crate) fn image_volume(mount: &Mount) -> Option<String> {
    spec::image_source(mount).map(|image| image.image.clone())
}

/// Converts a container to the runtime's options. Image mounts have the image's ID in `image_ref`.
pub(crate) fn options(
    id: &str,
    sandbox_id: &str,
    sandbox: &PodMetadata,
    config: ContainerConfig,
    image: &ImageRecord,
    files: &Path,
) -> Result<ContainerOptions, ConvertError> {
    validate(&config)?;
    let spec = spec::spec(Source {
        config: &config,
        sandbox,
        sandbox_id,
        image: &image.config,
        files,
    })?;
    let log_path = log_path(sandbox, &config)?;
    let security = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    let namespaces = security
        .and_then(|security| security.namespace_options.clone())
        .unwrap_or_default();
    let stop_signal = signal::from_cri(config.stop_signal)
        .or_else(|| spec::image_stop_signal(&image.config))
        .unwrap_or(signal::TERM);
    let mut kept = config.clone();
    kept.envs.clear();
    let record = ContainerMetadata {
        config: Some(kept),
        image_ref: image.repo_digests.first().unwrap_or(&image.id).clone(),
        stop_signal,
        log_path: log_path
            .as_ref()
            .map(|path| path.to_string_lossy().into_owned())
            .unwrap_or_default(),
    };
    Ok(ContainerOptions {
        id: id.to_owned(),
        name: key(&config),
        image_id: image.id.clone(),
        spec,
        metadata: record.encode_to_vec(),
        log_path,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        pid_mode: pid_mode(namespaces.pid),
        pid_target: namespaces.target_id,
        read_only_rootfs: security.is_some_and(|security| security.readonly_rootfs),
    })
}

fn pid_mode(mode: i32) -> PidMode {
    match NamespaceMode::try_from(mode) {
        Ok(NamespaceMode::Pod) => PidMode::Pod,
        Ok(NamespaceMode::Target) => PidMode::Target,
        Ok(NamespaceMode::Node) => PidMode::Node,
        _ => PidMode::Container,
    }
}

/// Returns `log_directory` + `log_path` if the request has both; a path outside the directory is an error.
fn log_path(
    sandbox: &PodMetadata,
    config: &ContainerConfig,
) -> Result<Option<PathBuf>, ConvertError> {
    let directory = sandbox
        .config
        .as_ref()
        .map(|pod| pod.log_directory.as_str())
        .unwrap_or_default();
    if directory.is_empty() || config.log_path.is_empty() {
        return Ok(None);
    }
    let relative = Path::new(&config.log_path);
    let inside = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !inside || config.log_path.contains('\0') {
        return Err(ConvertError::invalid(
            "config.log_path",
            config.log_path.clone(),
            "must be a path below log_directory",
        ));
    }
    Ok(Some(Path::new(directory).join(relative)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use boxlite_proto::cri::v1::PodSandboxConfig;

    fn pod(directory: &str) -> PodMetadata {
        PodMetadata {
            config: Some(PodSandboxConfig {
                log_directory: directory.into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn path(directory: &str, log: &str) -> Result<Option<PathBuf>, ConvertError> {
        log_path(
            &pod(directory),
            &ContainerConfig {
                log_path: log.into(),
                ..Default::default()
            },
        )
    }

    #[test]
    fn log_path_is_below_the_log_directory() {
        assert_eq!(
            path("/var/log/pods/x", "web/0.log"),
            Ok(Some("/var/log/pods/x/web/0.log".into()))
        );
        assert_eq!(path("", "web/0.log"), Ok(None));
        assert_eq!(path("/var/log", ""), Ok(None));
        assert!(path("/var/log", "../x").is_err());
        assert!(path("/var/log", "/etc/passwd").is_err());
        assert!(path("/var/log", "a/../../x").is_err());
    }

    #[test]
    fn update_keeps_zero_fields() {
        let resources = |cpu_shares, memory_limit_in_bytes| LinuxContainerResources {
            cpu_shares,
            memory_limit_in_bytes,
            ..Default::default()
        };
        let first = ContainerMetadata::updated(&[], &resources(2, 0));
        let record =
            ContainerMetadata::from_bytes(&ContainerMetadata::updated(&first, &resources(0, 9)));
        assert_eq!(record.resources(), Some(resources(2, 9)));
        let unreadable = [0xff; 3];
        assert_eq!(
            ContainerMetadata::updated(&unreadable, &resources(1, 1)),
            unreadable
        );
    }

    #[test]
    fn pid_mode_converts_every_value() {
        assert_eq!(pid_mode(0), PidMode::Pod);
        assert_eq!(pid_mode(1), PidMode::Container);
        assert_eq!(pid_mode(2), PidMode::Node);
        assert_eq!(pid_mode(3), PidMode::Target);
    }

    #[test]
    fn missing_required_fields_are_named() {
        assert_eq!(
            validate(&ContainerConfig::default()),
            Err(ConvertError::Missing("config.metadata"))
        );
    }
}
