//! [`Install`]: where the programs under test and their helpers are.
//!
//! Given by the Makefile in the environment, with the places it would choose as defaults. Checks that all are there,
//! builds nothing.

use crate::bail;
use crate::outcome::Result;
use std::path::PathBuf;

/// Files and programs, all absolute.
#[derive(Debug, Clone)]
pub struct Install {
    /// The daemon.
    pub daemon: PathBuf,
    /// containerd-shim-boxlite-v2.
    pub shim: PathBuf,
    /// The agent.
    pub guest: PathBuf,
    /// The guest kernel.
    pub libkrunfw: PathBuf,
    /// QEMU.
    pub qemu: PathBuf,
    /// Serves the share to QEMU.
    pub virtiofsd: PathBuf,
    /// Serves vsock to QEMU.
    pub vhost_device_vsock: PathBuf,
    /// Debian's CNI plugins.
    pub cni: PathBuf,
    /// What of an image's layers is ever taken from this machine.
    pub busybox: PathBuf,
    /// Debian's registry.
    pub registry: PathBuf,
}

impl Install {
    /// Finds everything or names what is missing.
    pub fn find() -> Result<Self> {
        let env = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let exe = std::env::current_exe()?;
        let bin = env("BOXLITE_BIN").unwrap_or_else(|| exe.parent().unwrap_or(&exe).to_owned());
        let home = env("HOME").unwrap_or_else(|| "/root".into());
        let cache = env("BOXLITE_CACHE").unwrap_or_else(|| home.join(".cache/boxlite-cri"));
        let guest = "x86_64-unknown-linux-gnu/agent-debug/boxlite-guest";
        let install = Self {
            daemon: bin.join("boxlite-cri"),
            shim: bin.join("containerd-shim-boxlite-v2"),
            guest: env("BOXLITE_GUEST").unwrap_or_else(|| bin.join("..").join(guest)),
            libkrunfw: cache.join("lib/libkrunfw.so.5"),
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            virtiofsd: cache.join("tools/bin/virtiofsd"),
            vhost_device_vsock: cache.join("tools/bin/vhost-device-vsock"),
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
            &install.cni,
            &install.busybox,
            &install.registry,
        ] {
            if !path.exists() {
                bail!(
                    "{} is missing: `make build` makes or installs it",
                    path.display()
                );
            }
        }
        Ok(Self {
            guest: install.guest.canonicalize()?,
            ..install
        })
    }
}
