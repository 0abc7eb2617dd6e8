//! [`ShimConfig`]: the shim's TOML file under containerd, with a default for every key.
//!
//! Named by the runtime options' `ConfigPath`, else by `BOXLITE_SHIM_CONFIG`, else [`DEFAULT_PATH`], which may be missing.
//! boxlite-cri sends its own configuration instead, and this file is not read. `[paths]`, `[pod]` and the VMM are
//! boxlite-config's, the same as in boxlite-cri's file.

use super::annotations;
use crate::error::{Result, ShimError};
use crate::probe;
use boxlite_config::network::NetworkSettings;
use boxlite_config::paths::Paths;
use boxlite_config::pod::PodDefaults;
use boxlite_config::section::{self, ConfigError, Mistake, Section};
use boxlite_config::value;
use boxlite_config::vmm::VmmSettings;
use boxlite_config::vmm_probe::{self, ProbeCache};
use boxlite_proto::probe::ProbeReport;
use boxlite_proto::vmm::{Acceleration, Installation, VmmKind};
use boxlite_sys::report::Report;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Configuration file if none is named.
pub const DEFAULT_PATH: &str = "/etc/boxlite/shim.toml";
/// Environment variable that names another file; `start` sets it for its daemon.
pub const PATH_VARIABLE: &str = "BOXLITE_SHIM_CONFIG";
/// Default directory of derived files.
const DEFAULT_CACHE: &str = "/var/lib/boxlite/cache";
/// File below `paths.cache` that keeps the answer of the probe.
const PROBE_FILE: &str = "vmm-probe.json";

/// Everything an operator may set for the shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShimConfig {
    /// VMM and acceleration. Default auto.
    pub vmm: VmmSettings,
    /// Annotations that a pod may use, by full name. Default none.
    pub allowed_annotations: Vec<String>,
    /// Programs and files of the installation.
    pub paths: Paths,
    /// Derived files and the probe's answer, `paths.cache`. Default /var/lib/boxlite/cache.
    pub cache: PathBuf,
    /// Defaults of a pod's VM.
    pub pod: PodDefaults,
    /// Network of a pod without a network namespace.
    pub network: NetworkSettings,
}

impl Default for ShimConfig {
    fn default() -> Self {
        Self {
            vmm: VmmSettings::default(),
            allowed_annotations: Vec::new(),
            paths: Paths::default(),
            cache: DEFAULT_CACHE.into(),
            pod: PodDefaults::default(),
            network: NetworkSettings::default(),
        }
    }
}

fn invalid(error: &ConfigError) -> ShimError {
    ShimError::Invalid {
        field: "shim configuration",
        reason: Report(error).to_string(),
    }
}

impl ShimConfig {
    /// Reads the file that the environment names, or the default one.
    ///
    /// # Errors
    /// Invalid if a named file cannot be read, or with every mistake in it.
    pub fn find() -> Result<Self> {
        match std::env::var_os(PATH_VARIABLE).filter(|path| !path.is_empty()) {
            Some(path) => Self::load(Path::new(&path)),
            None if Path::new(DEFAULT_PATH).exists() => Self::load(Path::new(DEFAULT_PATH)),
            None => Ok(Self::default()),
        }
    }

    /// Reads one file.
    ///
    /// # Errors
    /// See [`ShimConfig::find`].
    pub fn load(path: &Path) -> Result<Self> {
        section::load(path, Self::read).map_err(|error| invalid(&error))
    }

    /// Parses TOML; `path` appears in messages only.
    ///
    /// # Errors
    /// Invalid, with every mistake by key and value.
    #[cfg(test)]
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        section::parse(text, path, Self::read).map_err(|error| invalid(&error))
    }

    fn read(mut top: Section, mistakes: &mut Vec<Mistake>) -> Self {
        let default = Self::default();
        let mut files = top.section("paths");
        let paths = Paths::read(&mut files);
        let cache = files.take("cache", default.cache, value::absolute);
        files.finish(mistakes);
        let config = Self {
            vmm: VmmSettings::read(&mut top),
            allowed_annotations: top.take("allowed_annotations", Vec::new(), |value| {
                value::list_of(value, &annotations::NAMES)
            }),
            paths,
            cache,
            pod: PodDefaults::read(top.section("pod"), mistakes),
            network: NetworkSettings::read(top.section("network"), mistakes),
        };
        top.finish(mistakes);
        config
    }

    /// Returns the configured files and programs of a VM.
    pub fn installation(&self) -> Installation {
        self.paths.installation(self.cache.clone())
    }

    /// Returns the VMM of a pod that requests `requested`, and how it runs guest code. `auto` runs some guest code, once per
    /// boot; the answer is kept in the cache.
    ///
    /// # Errors
    /// If the probe cannot be run.
    pub async fn choose(&self, requested: Option<VmmKind>) -> Result<(VmmKind, Acceleration)> {
        let kind = requested.or_else(|| self.vmm.kind.clone());
        let acceleration = self.vmm.acceleration;
        if let (Some(kind), Some(acceleration)) = (&kind, acceleration) {
            return Ok((kind.clone(), acceleration));
        }
        if kind == Some(VmmKind::Krun) {
            return Ok((VmmKind::Krun, Acceleration::Kvm));
        }
        let report = self.probe().await?;
        let choice = vmm_probe::choose(kind.as_ref(), &report);
        tracing::info!(%choice, "VMM chosen");
        Ok((choice.kind, acceleration.unwrap_or(choice.acceleration)))
    }

    async fn probe(&self) -> Result<ProbeReport> {
        let cache = &self.cache;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(cache)
            .map_err(ShimError::io("create", cache.display()))?;
        let program =
            std::env::current_exe().map_err(ShimError::io("find", "the shim's own program"))?;
        let cache = ProbeCache::new(cache.join(PROBE_FILE), &program)
            .map_err(ShimError::io("read", program.display()))?;
        if let Some(report) = cache.get() {
            return Ok(report);
        }
        let probed = tokio::task::spawn_blocking(probe::report).await;
        let report = probed.unwrap_or_else(vmm_probe::failed_probe);
        if let Err(error) = cache.put(&report) {
            tracing::debug!(%error, "failed to cache the probe's answer");
        }
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ShimConfig> {
        ShimConfig::parse(text, Path::new("/etc/x.toml"))
    }

    #[test]
    fn empty_file_is_the_default_and_allows_no_annotation() {
        let config = parse("").expect("valid");
        assert_eq!(config, ShimConfig::default());
        assert!(config.allowed_annotations.is_empty());
    }

    #[test]
    fn mistake_is_reported_with_file_and_key() {
        for (text, words) in [
            ("vmmm = 'qemu'", ["/etc/x.toml", "vmmm"]),
            ("vmm = 'xen'", ["vmm = \"xen\"", "krun"]),
            ("[pod]\nvcpu = 1", ["vcpu", "vcpus"]),
            ("[pod]\nvcpus = 0", ["pod.vcpus = 0", "from 1 to 64"]),
            ("[paths]\nguest = 'x'", ["paths.guest", "absolute"]),
            (
                "allowed_annotations = ['io.boxlite.x']",
                ["io.boxlite.x", "io.boxlite.vmm"],
            ),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(
                words.iter().all(|word| error.contains(word)),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn parse_reports_every_mistake_at_once() {
        let text =
            "vmm = 'xen'\nnope = 1\n[pod]\nvcpus = 255\nmemory_mib = 0\n[paths]\ncache = 'x'";
        let error = parse(text).expect_err("five mistakes").to_string();
        for line in [
            "vmm = \"xen\": must be auto, krun or qemu",
            "nope = 1: unknown key",
            "pod.vcpus = 255: must be an integer from 1 to 64",
            "pod.memory_mib = 0: must be an integer from 64 to 1048576",
            "paths.cache = \"x\": must be an absolute path",
        ] {
            assert!(error.contains(line), "{line} is missing: {error}");
        }
    }

    #[tokio::test]
    async fn configured_vmm_and_acceleration_need_no_probe() {
        let config = parse("vmm = 'qemu'\nacceleration = 'tcg'").expect("valid");
        let chosen = config.choose(None).await.expect("no probe");
        assert_eq!(chosen, (VmmKind::Qemu, Acceleration::Tcg));
        let other = parse("vmm = 'krun'\nacceleration = 'tcg'").expect("valid");
        let requested = other.choose(Some(VmmKind::Qemu)).await.expect("no probe");
        assert_eq!(requested, chosen, "the pod's annotation");
    }
}
