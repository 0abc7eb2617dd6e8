//! Step 1: [`Context`], the growing command line of QEMU and the needs of its helpers; and the machine type.

use crate::vmm::step::{StepExt, require};
use boxlite_config::budget::TCG_BUFFER_MIB;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::{Acceleration, InstanceSpec};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

/// A QEMU that has not been started.
#[derive(Default)]
pub(super) struct Context {
    /// Arguments of QEMU.
    pub(super) args: Vec<String>,
    /// Words of the guest kernel's command line.
    pub(super) kernel_words: Vec<String>,
    /// Files needed in the jail in addition to those of every instance.
    pub(super) read_only: Vec<PathBuf>,
    pub(super) read_write: Vec<PathBuf>,
    /// Listening socket of virtiofsd. Bound here, so that QEMU can connect without waiting.
    pub(super) share_socket: Option<UnixListener>,
    /// Name of the socket on which vhost-device-vsock listens.
    pub(super) vsock_socket: String,
    /// Taps, and the socket of passt, inherited by QEMU under their descriptor numbers.
    pub(super) nics: Vec<OwnedFd>,
    /// Directory of derived files.
    pub(super) cache: PathBuf,
}

impl Context {
    /// Adds an option and its value.
    pub(super) fn option(&mut self, name: &str, value: impl Into<String>) {
        self.args.push(name.to_owned());
        self.args.push(value.into());
    }
}

pub(super) fn create(spec: &InstanceSpec) -> BoxliteResult<Context> {
    let files = &spec.installation;
    require("libkrunfw", &files.libkrunfw)?;
    require("QEMU", &files.qemu)?;
    require("virtiofsd", &files.virtiofsd)?;
    require("vhost-device-vsock", &files.vhost_device_vsock)?;
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&files.cache);
    made.step(format!("create {}", files.cache.display()))?;

    let mut context = Context {
        read_only: vec![
            files.qemu.clone(),
            files.virtiofsd.clone(),
            files.vhost_device_vsock.clone(),
        ],
        cache: files.cache.clone(),
        ..Context::default()
    };
    // acpi=off with rtc, pit and pic is a set of timers that neither hangs nor waits two seconds (measured).
    context.option(
        "-M",
        "microvm,acpi=off,rtc=on,pit=on,pic=on,isa-serial=off,memory-backend=mem,\
         dump-guest-core=off",
    );
    match spec.acceleration {
        // With a thread per CPU, guests with two CPUs occasionally panic at boot when the kernel patches its own text.
        Acceleration::Tcg => {
            let thread = if spec.vcpus > 1 { ",thread=single" } else { "" };
            context.option("-accel", format!("tcg{thread},tb-size={TCG_BUFFER_MIB}"));
        }
        Acceleration::Kvm => {
            context.option("-accel", "kvm");
            context.read_write.push(PathBuf::from("/dev/kvm"));
        }
    }
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        context.args.push(flag.to_owned());
    }
    context.option("-display", "none");
    context.option(
        "-name",
        format!(
            "boxlite-{}",
            spec.id
                .chars()
                .filter(char::is_ascii_alphanumeric)
                .take(12)
                .collect::<String>()
        ),
    );
    // QEMU parses guest input: it must not start processes or raise privileges.
    context.option(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    Ok(context)
}

#[cfg(test)]
mod tests {
    use super::*;
    use boxlite_proto::vmm::{Installation, VmmKind};

    /// Returns the value of `-accel`.
    fn accel(vcpus: u8, acceleration: Acceleration) -> String {
        let directory = tempfile::tempdir().expect("directory");
        let file = directory.path().join("program");
        fs::write(&file, "").expect("program");
        let spec = InstanceSpec {
            vcpus,
            acceleration,
            installation: Installation {
                guest: file.clone(),
                libkrunfw: file.clone(),
                qemu: file.clone(),
                virtiofsd: file.clone(),
                vhost_device_vsock: file.clone(),
                passt: file,
                cache: directory.path().join("cache"),
            },
            ..crate::vmm::tests::spec(VmmKind::Qemu)
        };
        let args = create(&spec).expect("created").args;
        let index = args.iter().position(|arg| arg == "-accel");
        args[index.expect("-accel") + 1].clone()
    }

    /// QEMU's default is up to 1 GiB, which every pod would fill.
    #[test]
    fn create_bounds_the_translated_code() {
        assert_eq!(accel(1, Acceleration::Tcg), "tcg,tb-size=128");
        assert_eq!(accel(2, Acceleration::Tcg), "tcg,thread=single,tb-size=128");
        assert_eq!(accel(2, Acceleration::Kvm), "kvm");
    }
}
