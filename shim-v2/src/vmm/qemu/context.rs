//! Step 1: [`Context`], the command line of QEMU as it grows, with what its helpers need; and the machine.

use crate::vmm::step::{StepExt, require};
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::{Acceleration, InstanceSpec};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

/// A QEMU that has not started.
pub(super) struct Context {
    /// Arguments of QEMU.
    pub(super) args: Vec<String>,
    /// The guest kernel's command line, by words.
    pub(super) kernel_words: Vec<String>,
    /// Files the jail must show beside those every instance needs.
    pub(super) read_only: Vec<PathBuf>,
    pub(super) read_write: Vec<PathBuf>,
    /// The socket on which virtiofsd waits for QEMU; bound here, so that nobody has to wait for it.
    pub(super) share_socket: Option<UnixListener>,
    /// Name of the socket on which vhost-device-vsock waits for QEMU.
    pub(super) vsock_socket: String,
    /// Taps that QEMU inherits, by their numbers.
    pub(super) taps: Vec<OwnedFd>,
    /// Where derived files are kept.
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
    made.step(format!("creating {}", files.cache.display()))?;

    let mut context = Context {
        args: Vec::new(),
        kernel_words: Vec::new(),
        read_only: vec![
            files.qemu.clone(),
            files.virtiofsd.clone(),
            files.vhost_device_vsock.clone(),
        ],
        read_write: Vec::new(),
        share_socket: None,
        vsock_socket: String::new(),
        taps: Vec::new(),
        cache: files.cache.clone(),
    };
    // acpi=off with rtc, pit and pic is the one set of timers that neither hangs nor waits two seconds (measured).
    context.option(
        "-M",
        "microvm,acpi=off,rtc=on,pit=on,pic=on,isa-serial=off,memory-backend=mem",
    );
    match spec.acceleration {
        // A thread for each CPU loses to the kernel patching its own text at boot: guests with two CPUs panic now and then.
        Acceleration::Tcg if spec.vcpus > 1 => context.option("-accel", "tcg,thread=single"),
        Acceleration::Tcg => context.option("-accel", "tcg"),
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
    // QEMU parses what the guest sends: no new processes, no privileges, whatever happens in it.
    context.option(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    Ok(context)
}
