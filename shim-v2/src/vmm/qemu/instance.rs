//! Step 8: what the jail must show; helpers and QEMU started and watched.
//!
//! Nothing here restarts anything: a pod whose share or vsock is gone is dead, and the shim hears of it at once.

use super::context::Context;
use super::{shares, vsock};
use crate::jail::{self, HostFiles};
use crate::vmm::step::StepExt;
use crate::vmm::{VmmInstance, VmmInstanceImpl};
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::exit::ExitCode;
use boxlite_proto::vmm::InstanceSpec;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::wait::{WaitStatus, wait};
use std::convert::Infallible;
use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Time vhost-device-vsock gets to listen. It takes 5 ms; a loaded host a hundred times that.
const HELPER_LIMIT: Duration = Duration::from_secs(10);
/// Time between two looks at the socket.
const HELPER_STEP: Duration = Duration::from_millis(2);
/// Time between the first helper's leave and QEMU's own end; less than the two seconds in which a death must be known.
const END_LIMIT: Duration = Duration::from_secs(1);
/// Flag of a listening socket in /proc/net/unix (__SO_ACCEPTCON).
const LISTENING: &str = "00010000";
/// Programs and their libraries, QEMU's firmware.
const SYSTEM: [&str; 1] = ["/usr"];
const SYSTEM_LINKS: [&str; 6] = [
    "/bin",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/sbin",
];

struct QemuInstance {
    context: Context,
    spec: InstanceSpec,
}

pub(super) fn create(context: Context, spec: InstanceSpec) -> VmmInstance {
    VmmInstance::new(QemuInstance { context, spec })
}

impl VmmInstanceImpl for QemuInstance {
    fn host_files(&self) -> HostFiles {
        let mut read_only: Vec<PathBuf> = SYSTEM.map(PathBuf::from).to_vec();
        let beyond = |path: &&PathBuf| !SYSTEM.iter().any(|known| path.starts_with(known));
        read_only.extend(self.context.read_only.iter().filter(beyond).cloned());
        HostFiles {
            read_only,
            optional: SYSTEM_LINKS.map(PathBuf::from).to_vec(),
            read_write: self.context.read_write.clone(),
            share: self.spec.share_dir.clone(),
            work_dir: self.spec.work_dir.clone(),
        }
    }

    fn enter(self: Box<Self>) -> BoxliteResult<Infallible> {
        let files = &self.spec.installation;
        let socket = self.context.vsock_socket.as_str();
        let _virtiofsd = self.start_virtiofsd()?;
        let mut vsock = start(
            "vhost-device-vsock",
            &files.vhost_device_vsock,
            &vsock::device_args(socket),
        )?;
        wait_listening(&mut vsock, socket)?;
        // QEMU and this process need none from here on.
        jail::drop_all_capabilities().step("dropping capabilities")?;
        let mut args = self.context.args.clone();
        args.extend(["-append".to_owned(), self.context.kernel_words.join(" ")]);
        for tap in &self.context.taps {
            inherit(tap, true)?;
        }
        let mut command = Command::new(&files.qemu);
        command.args(args).env_clear().stdin(Stdio::null());
        let mut qemu = command.spawn().step("starting QEMU")?;
        watch(&mut qemu)
    }
}

impl QemuInstance {
    fn start_virtiofsd(&self) -> BoxliteResult<Child> {
        let missing = || std::io::Error::other("no socket");
        let socket = self
            .context
            .share_socket
            .as_ref()
            .ok_or_else(missing)
            .step("starting virtiofsd")?;
        let args = shares::virtiofsd_args(&self.spec.share_dir, socket.as_raw_fd());
        inherit(socket, true)?;
        let child = start("virtiofsd", &self.spec.installation.virtiofsd, &args)?;
        inherit(socket, false)?;
        Ok(child)
    }
}

fn start(name: &str, program: &Path, args: &[String]) -> BoxliteResult<Child> {
    let mut command = Command::new(program);
    // Their output belongs to the vmm child's messages, not to the console.
    command
        .args(args)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command.spawn().step(format!("starting {name}"))
}

/// Lets the next child inherit a descriptor under its number, or not any more. This process has one thread.
fn inherit(fd: impl AsFd, yes: bool) -> BoxliteResult<()> {
    let flags = if yes {
        FdFlag::empty()
    } else {
        FdFlag::FD_CLOEXEC
    };
    fcntl(fd, FcntlArg::F_SETFD(flags))
        .map(drop)
        .step("marking a descriptor for inheritance")
}

/// Waits until `child` listens on `socket`, a name in the working directory: QEMU connects once and does not try again.
fn wait_listening(child: &mut Child, socket: &str) -> BoxliteResult<()> {
    let step = "waiting for vhost-device-vsock";
    let deadline = Instant::now() + HELPER_LIMIT;
    loop {
        let table = fs::read_to_string("/proc/self/net/unix").step(step)?;
        let listens = |line: &str| {
            let mut fields = line.split_ascii_whitespace();
            fields.nth(3) == Some(LISTENING) && fields.nth(3) == Some(socket)
        };
        // The table is the network namespace's, other VMs' sockets are in it: hence the unique name.
        if table.lines().any(listens) {
            return Ok(());
        }
        if let Some(status) = child.try_wait().step(step)? {
            return Err(std::io::Error::other(format!("it ended: {status}"))).step(step);
        }
        if Instant::now() > deadline {
            return Err(std::io::Error::other("it does not listen")).step(step);
        }
        std::thread::sleep(HELPER_STEP);
    }
}

/// Ends this process, PID 1 of its namespace, when the first of its children ends.
fn watch(qemu: &mut Child) -> BoxliteResult<Infallible> {
    let ended = first_end(qemu.id())?;
    let code = match ended {
        Ended::Qemu(status) => qemu_exit(status),
        // Helpers leave by themselves when QEMU closes their sockets, which is just before it ends itself.
        Ended::Helper(WaitStatus::Exited(_, 0)) => match wait_briefly(qemu)? {
            Some(status) if status.success() => ExitCode::Ok,
            Some(status) => {
                eprintln!("vmm: QEMU ended: {status}");
                ExitCode::VmmStart
            }
            None => {
                eprintln!("vmm: a helper of the VM left");
                ExitCode::VmmStart
            }
        },
        Ended::Helper(status) => {
            eprintln!("vmm: a helper of the VM ended: {status:?}");
            ExitCode::VmmStart
        }
    };
    std::process::exit(code as i32)
}

enum Ended {
    Qemu(WaitStatus),
    Helper(WaitStatus),
}

fn first_end(qemu: u32) -> BoxliteResult<Ended> {
    loop {
        match wait() {
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).step("waiting for QEMU"),
            Ok(status @ (WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _))) => {
                let is_qemu = u32::try_from(pid.as_raw()).is_ok_and(|pid| pid == qemu);
                return Ok(if is_qemu {
                    Ended::Qemu(status)
                } else {
                    Ended::Helper(status)
                });
            }
            Ok(_) => {}
        }
    }
}

fn qemu_exit(status: WaitStatus) -> ExitCode {
    match status {
        // The guest powered off, or its kernel gave up and rebooted (-no-reboot).
        WaitStatus::Exited(_, 0) => ExitCode::Ok,
        WaitStatus::Exited(_, code) => {
            eprintln!("vmm: QEMU ended with code {code}");
            ExitCode::VmmStart
        }
        other => {
            eprintln!("vmm: QEMU ended: {other:?}");
            ExitCode::VmmStart
        }
    }
}

fn wait_briefly(qemu: &mut Child) -> BoxliteResult<Option<std::process::ExitStatus>> {
    let deadline = Instant::now() + END_LIMIT;
    loop {
        let status = qemu.try_wait().step("waiting for QEMU")?;
        if status.is_some() || Instant::now() > deadline {
            return Ok(status);
        }
        std::thread::sleep(HELPER_STEP);
    }
}
