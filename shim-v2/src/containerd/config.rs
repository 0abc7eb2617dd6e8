//! [`ShimConfig`]: the shim's TOML file under a containerd, with a default for every key.
//!
//! Found by the runtime options' `ConfigPath`, else by `BOXLITE_SHIM_CONFIG`, else at [`DEFAULT_PATH`], which may be
//! missing. boxlite-cri sends its own configuration instead; this file is not read then.

use crate::error::{Result, ShimError};
use boxlite_proto::probe::ProbeReport;
use boxlite_proto::vmm::{Acceleration, Installation, VmmKind};
use boxlite_runtime::filesystem_layout::FilesystemLayout;
use boxlite_runtime::vmm_probe;
use boxlite_sys::report::Report;
use serde::Deserialize;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Where the file is when nobody says otherwise.
pub const DEFAULT_PATH: &str = "/etc/boxlite/shim.toml";
/// Environment variable that names another file; `start` sets it for its daemon.
pub const PATH_VARIABLE: &str = "BOXLITE_SHIM_CONFIG";
/// Largest file read, in bytes.
const FILE_LIMIT: u64 = 1 << 20;
/// Debian's place of the guest kernel.
const DEBIAN_KERNEL: &str = "/usr/lib/x86_64-linux-gnu/libkrunfw.so.5";
/// Only its length matters to the probe: no socket is made.
const PROBE_STATE: &str = "/run/boxlite";

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShimConfig {
    /// `auto`, `krun` or `qemu`. Default auto: what the hardware can.
    pub vmm: String,
    /// `auto`, `tcg` or `kvm`: how QEMU runs guest code. Default auto.
    pub acceleration: String,
    /// Annotations that a pod may use, by full name. Default none.
    pub allowed_annotations: Vec<String>,
    /// Programs and files of the installation.
    pub paths: Paths,
    /// Sizes of a pod's VM.
    pub pod: Pod,
}

/// Programs and files.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Paths {
    /// The static agent. Default `../libexec/boxlite/boxlite-guest` beside the shim's directory.
    pub guest: PathBuf,
    /// Guest kernel. Default `../lib/boxlite/libkrunfw.so.5` where it is there, else Debian's.
    pub libkrunfw: PathBuf,
    /// QEMU. Default /usr/bin/qemu-system-x86_64.
    pub qemu: PathBuf,
    /// Share server for QEMU. Default beside the agent.
    pub virtiofsd: PathBuf,
    /// vsock device for QEMU. Default beside the agent.
    pub vhost_device_vsock: PathBuf,
    /// What is derived from these once and kept. Default /var/lib/boxlite/cache.
    pub cache: PathBuf,
}

/// Sizes; the same keys as boxlite-cri's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pod {
    /// Virtual CPUs of a pod without CPU limit. Default 1.
    pub vcpus: u8,
    /// Memory in MiB for the containers of a pod without memory limit. Default 256.
    pub memory_mib: u32,
    /// MiB added for guest kernel and agent. Default 64.
    pub overhead_mib: u32,
    /// Scratch disk in MiB, sparse. Default 10240.
    pub scratch_mib: u32,
    /// Kernel messages on the console. Default false.
    pub debug_console: bool,
}

impl Default for ShimConfig {
    fn default() -> Self {
        Self {
            vmm: "auto".to_owned(),
            acceleration: "auto".to_owned(),
            allowed_annotations: Vec::new(),
            paths: Paths::default(),
            pod: Pod::default(),
        }
    }
}

impl Default for Paths {
    fn default() -> Self {
        // <prefix>/bin/containerd-shim-boxlite-v2, as `make install` puts it.
        let prefix = std::env::current_exe()
            .ok()
            .and_then(|exe| Some(exe.parent()?.parent()?.to_owned()))
            .unwrap_or_else(|| PathBuf::from("/usr/local"));
        let programs = prefix.join("libexec/boxlite");
        let kernel = prefix.join("lib/boxlite/libkrunfw.so.5");
        Self {
            guest: programs.join("boxlite-guest"),
            libkrunfw: if kernel.exists() {
                kernel
            } else {
                DEBIAN_KERNEL.into()
            },
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            virtiofsd: programs.join("virtiofsd"),
            vhost_device_vsock: programs.join("vhost-device-vsock"),
            cache: "/var/lib/boxlite/cache".into(),
        }
    }
}

impl Default for Pod {
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory_mib: 256,
            overhead_mib: 64,
            scratch_mib: 10240,
            debug_console: false,
        }
    }
}

fn invalid(path: &Path, reason: impl std::fmt::Display) -> ShimError {
    ShimError::Invalid {
        field: "shim configuration",
        reason: format!("{}: {reason}", path.display()),
    }
}

impl ShimConfig {
    /// Reads the file that the environment names, or the default one.
    ///
    /// # Errors
    /// Io for a named file that cannot be read, Invalid naming file and key.
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
        let read = ShimError::io("read", path.display());
        let text = std::fs::metadata(path)
            .and_then(|about| match about.len() > FILE_LIMIT {
                true => Err(std::io::ErrorKind::FileTooLarge.into()),
                false => std::fs::read_to_string(path),
            })
            .map_err(read)?;
        Self::parse(&text, path)
    }

    /// Reads TOML; `path` is for messages.
    ///
    /// # Errors
    /// Invalid, naming file and key.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let config: Self =
            toml::from_str(text).map_err(|error| invalid(path, error.to_string().trim_end()))?;
        let one_of = |key: &str, value: &str, known: &[&str]| match known.contains(&value) {
            true => Ok(()),
            false => Err(invalid(
                path,
                format!("{key} = {value:?}: one of {}", known.join(", ")),
            )),
        };
        one_of("vmm", &config.vmm, &["auto", "krun", "qemu"])?;
        one_of(
            "acceleration",
            &config.acceleration,
            &["auto", "tcg", "kvm"],
        )?;
        for name in &config.allowed_annotations {
            one_of("allowed_annotations", name, &super::annotations::NAMES)?;
        }
        let paths = &config.paths;
        for (key, value) in [
            ("paths.guest", &paths.guest),
            ("paths.libkrunfw", &paths.libkrunfw),
            ("paths.qemu", &paths.qemu),
            ("paths.virtiofsd", &paths.virtiofsd),
            ("paths.vhost_device_vsock", &paths.vhost_device_vsock),
            ("paths.cache", &paths.cache),
        ] {
            if !value.is_absolute() {
                return Err(invalid(path, format!("{key} = {value:?}: not absolute")));
            }
        }
        if config.pod.vcpus == 0 {
            return Err(invalid(path, "pod.vcpus = 0: at least 1"));
        }
        Ok(config)
    }

    /// As the VM's description wants them.
    pub fn installation(&self) -> Installation {
        let paths = self.paths.clone();
        Installation {
            guest: paths.guest,
            libkrunfw: paths.libkrunfw,
            qemu: paths.qemu,
            virtiofsd: paths.virtiofsd,
            vhost_device_vsock: paths.vhost_device_vsock,
            cache: paths.cache,
        }
    }

    /// The VMM of a pod that asked for this one, and how it runs guest code. `auto` is found out by running some, once per
    /// boot; the answer is kept in the cache.
    ///
    /// # Errors
    /// When the shim's own program is not there to be asked.
    pub async fn choose(&self, asked: Option<VmmKind>) -> Result<(VmmKind, Acceleration)> {
        let wish = asked.or(match self.vmm.as_str() {
            "krun" => Some(VmmKind::Krun),
            "qemu" => Some(VmmKind::Qemu),
            _ => None,
        });
        let told = match self.acceleration.as_str() {
            "kvm" => Some(Acceleration::Kvm),
            "tcg" => Some(Acceleration::Tcg),
            _ => None,
        };
        if let (Some(kind), Some(acceleration)) = (&wish, told) {
            return Ok((kind.clone(), acceleration));
        }
        if wish == Some(VmmKind::Krun) {
            return Ok((VmmKind::Krun, Acceleration::Kvm));
        }
        let report = self.probe().await?;
        let choice = vmm_probe::choose(wish.as_ref(), &report);
        tracing::info!(%choice, "vmm");
        Ok((choice.kind, told.unwrap_or(choice.acceleration)))
    }

    async fn probe(&self) -> Result<ProbeReport> {
        let cache = &self.paths.cache;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(cache)
            .map_err(ShimError::io("create", cache.display()))?;
        let failed = |error: &boxlite_runtime::RuntimeError| ShimError::Invalid {
            field: "vmm",
            reason: Report(error).to_string(),
        };
        let layout =
            FilesystemLayout::new(cache, Path::new(PROBE_STATE)).map_err(|error| failed(&error))?;
        let program =
            std::env::current_exe().map_err(ShimError::io("find", "the shim's own program"))?;
        vmm_probe::probe(&program, &layout)
            .await
            .map_err(|error| failed(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ShimConfig> {
        ShimConfig::parse(text, Path::new("/etc/x.toml"))
    }

    #[test]
    fn an_empty_file_is_the_default_and_allows_no_annotation() {
        let config = parse("").expect("valid");
        assert_eq!(config, ShimConfig::default());
        assert!(config.allowed_annotations.is_empty());
    }

    #[test]
    fn a_mistake_is_named_with_file_and_key() {
        for (text, words) in [
            ("vmmm = 'qemu'", ["/etc/x.toml", "vmmm"]),
            ("vmm = 'xen'", ["vmm = \"xen\"", "krun"]),
            ("[pod]\nvcpu = 1", ["vcpu", "vcpus"]),
            ("[pod]\nvcpus = 0", ["pod.vcpus", "at least 1"]),
            ("[paths]\nguest = 'x'", ["paths.guest", "not absolute"]),
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

    #[tokio::test]
    async fn a_named_vmm_needs_no_probe() {
        let config = parse("vmm = 'qemu'\nacceleration = 'tcg'").expect("valid");
        let chosen = config.choose(None).await.expect("no probe");
        assert_eq!(chosen, (VmmKind::Qemu, Acceleration::Tcg));
        let other = parse("vmm = 'krun'\nacceleration = 'tcg'").expect("valid");
        let asked = other.choose(Some(VmmKind::Qemu)).await.expect("no probe");
        assert_eq!(asked, chosen, "the pod's own wish");
    }
}
