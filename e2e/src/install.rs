//! [`Install`]: paths of the programs under test and their helpers.
//!
//! Set by the Makefile through the environment, with the Makefile's defaults otherwise. Checks that all exist; builds
//! nothing.

use crate::bail;
use crate::failure::Result;
use std::path::PathBuf;

/// Absolute paths of files and programs.
#[derive(Debug, Clone)]
pub(crate) struct Install {
    /// boxlite-cri.
    pub daemon: PathBuf,
    /// containerd-shim-boxlite-v2.
    pub shim: PathBuf,
    /// Guest agent.
    pub guest: PathBuf,
    /// Agent that attacks its host, beside the other one. Built by `make build` only.
    pub hostile_agent: PathBuf,
    /// Library with the guest kernel.
    pub libkrunfw: PathBuf,
    /// QEMU.
    pub qemu: PathBuf,
    /// Serves the shared directory to QEMU.
    pub virtiofsd: PathBuf,
    /// Serves vsock to QEMU.
    pub vhost_device_vsock: PathBuf,
    /// Serves the network of pods without CNI.
    pub passt: PathBuf,
    /// Debian's CNI plugins.
    pub cni: PathBuf,
    /// Debian's busybox, the only host program in the images' layers.
    pub busybox: PathBuf,
    /// Debian's docker-registry.
    pub registry: PathBuf,
}

/// Returns the directory of downloaded and built dependencies: `$BOXLITE_CACHE`, by default `~/.cache/boxlite-cri`.
pub(crate) fn cache() -> PathBuf {
    let home = || std::env::var_os("HOME").map_or_else(|| "/root".into(), PathBuf::from);
    std::env::var_os("BOXLITE_CACHE")
        .map_or_else(|| home().join(".cache/boxlite-cri"), PathBuf::from)
}

impl Install {
    /// Tells whether guests boot another kernel than that of `make tools`: the one of `make kernel`.
    pub(crate) fn has_built_kernel(&self) -> bool {
        std::env::var_os("BOXLITE_LIBKRUNFW").is_some()
    }

    /// Finds all paths. The error lists the missing ones.
    pub(crate) fn find() -> Result<Self> {
        let env = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let exe = std::env::current_exe()?;
        let bin = env("BOXLITE_BIN").unwrap_or_else(|| exe.parent().unwrap_or(&exe).to_owned());
        let cache = cache();
        let guest = "agent-debug/boxlite-guest";
        let install = Self {
            daemon: bin.join("boxlite-cri"),
            shim: bin.join("containerd-shim-boxlite-v2"),
            guest: env("BOXLITE_GUEST").unwrap_or_else(|| bin.join("..").join(guest)),
            hostile_agent: PathBuf::new(),
            libkrunfw: env("BOXLITE_LIBKRUNFW").unwrap_or_else(|| cache.join("lib/libkrunfw.so.5")),
            qemu: env("BOXLITE_QEMU").unwrap_or_else(|| "/usr/bin/qemu-system-x86_64".into()),
            virtiofsd: cache.join("tools/bin/virtiofsd"),
            vhost_device_vsock: cache.join("tools/bin/vhost-device-vsock"),
            passt: cache.join("tools/bin/passt"),
            cni: "/usr/lib/cni".into(),
            busybox: "/bin/busybox".into(),
            registry: "/usr/bin/docker-registry".into(),
        };
        for path in [
            &install.daemon,
            &install.shim,
            &install.guest,
            &install.libkrunfw,
            &install.qemu,
            &install.virtiofsd,
            &install.vhost_device_vsock,
            &install.passt,
            &install.cni,
            &install.busybox,
            &install.registry,
        ] {
            if !path.exists() {
                bail!("{} not found: run `make build`", path.display());
            }
        }
        let guest = install.guest.canonicalize()?;
        Ok(Self {
            hostile_agent: guest.with_file_name("boxlite-hostile-agent"),
            guest,
            ..install
        })
    }
}
