//! Step 8: the jail's files; starting and watching the helpers and QEMU.
//!
//! Nothing is restarted: a pod that lost its share or vsock has failed, and the shim is notified by the exit.

use super::context::Context;
use super::{shares, vsock};
use crate::jail::{self, HostFiles, ProcFiles, Process};
use crate::vmm::parent::require_shim;
use crate::vmm::step::{StepExt, inherit};
use crate::vmm::{VmmInstance, VmmInstanceImpl};
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::exit::ExitCode;
use boxlite_proto::vmm::{Acceleration, InstanceSpec};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{Gid, Uid, fchown};
use std::convert::Infallible;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Timeout for vhost-device-vsock to listen. It takes 5 ms, up to a hundred times that on a loaded host.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval at which the socket is checked.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Time between a helper's exit and QEMU's own; below the two seconds within which a death must be noticed.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);
/// Flag of a listening socket in /proc/net/unix (__SO_ACCEPTCON).
const LISTENING: &str = "00010000";
/// Directories of programs, libraries and QEMU's firmware.
const SYSTEM_DIRECTORIES: [&str; 1] = ["/usr"];
const SYSTEM_LINKS: [&str; 6] = [
    "/bin",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/sbin",
];

/// The KVM device.
const KVM: &str = "/dev/kvm";

struct QemuInstance {
    context: Context,
    spec: InstanceSpec,
}

pub(super) fn create(context: Context, spec: InstanceSpec) -> VmmInstance {
    VmmInstance::new(QemuInstance { context, spec })
}

impl VmmInstanceImpl for QemuInstance {
    fn host_files(&self) -> HostFiles {
        let mut read_only: Vec<PathBuf> = SYSTEM_DIRECTORIES.map(PathBuf::from).to_vec();
        let beyond = |path: &&PathBuf| {
            !SYSTEM_DIRECTORIES
                .iter()
                .any(|known| path.starts_with(known))
        };
        read_only.extend(self.context.read_only.iter().filter(beyond).cloned());
        HostFiles {
            read_only,
            optional: SYSTEM_LINKS.map(PathBuf::from).to_vec(),
            read_write: self.context.read_write.clone(),
            share: self.spec.share_dir.clone(),
            proc: ProcFiles::All,
            work_dir: self.spec.work_dir.clone(),
        }
    }

    fn enter(self: Box<Self>) -> BoxliteResult<Infallible> {
        let files = &self.spec.installation;
        let socket = self.context.vsock_socket.as_str();
        let _virtiofsd = self.start_virtiofsd()?;
        // Only the file server needs capabilities and files of any owner.
        self.become_user()?;
        jail::drop_all_capabilities().step("drop capabilities")?;
        jail::limit_resources(self.max_file_bytes()?).step("limit resources")?;
        jail::restrict(&self.host_files()).step("restrict file access")?;
        let mut vsock = self.start_vsock()?;
        wait_listening(&mut vsock, socket)?;
        let mut args = self.context.args.clone();
        args.extend(["-append".to_owned(), self.context.kernel_words.join(" ")]);
        for nic in &self.context.nics {
            inherit(nic, true)?;
        }
        let mut command = Command::new(&files.qemu);
        command.args(args).env_clear().stdin(Stdio::null());
        let process = Process::Qemu {
            internet: self.spec.host_network,
        };
        let spawned = jail::with_filter(process, || command.spawn()).step("start QEMU")?;
        let mut qemu = spawned.step("start QEMU")?;
        watch(&mut qemu)
    }
}

impl QemuInstance {
    /// Runs this process, and later QEMU and vhost-device-vsock, as the VM's own user.
    fn become_user(&self) -> BoxliteResult<()> {
        let Some(user) = self.spec.user else {
            return Ok(());
        };
        let groups = match self.spec.acceleration {
            Acceleration::Tcg => Vec::new(),
            Acceleration::Kvm => match kvm_access()? {
                KvmAccess::Anyone => Vec::new(),
                KvmAccess::Group(group) => vec![group],
                KvmAccess::Root => {
                    eprintln!("vmm: running as root, since only root may open {KVM}");
                    return Ok(());
                }
            },
        };
        // QEMU opens the console by name.
        let owner = (Some(Uid::from_raw(user)), Some(Gid::from_raw(user)));
        fchown(std::io::stdout(), owner.0, owner.1).step("change the owner of the console")?;
        jail::become_user(user, &groups).step("become the VM's user")?;
        require_shim()
    }

    /// Returns the size of the largest file that QEMU writes: a disk, or the guest's memory, which is a file, too.
    fn max_file_bytes(&self) -> BoxliteResult<u64> {
        let mut max = u64::from(self.spec.memory_mib) << 20;
        for disk in self.spec.disks.iter().filter(|disk| !disk.read_only) {
            let meta = fs::metadata(&disk.path).step(format!("stat {}", disk.path.display()))?;
            max = max.max(meta.len());
        }
        Ok(max)
    }

    /// Starts vhost-device-vsock with its own system call filter.
    fn start_vsock(&self) -> BoxliteResult<Child> {
        let program = &self.spec.installation.vhost_device_vsock;
        let args = vsock::device_args(&self.context.vsock_socket);
        // The filter would not allow to open it for writing.
        let null = open_null()?;
        let start = || start("vhost-device-vsock", program, &args, null);
        jail::with_filter(Process::Vsock, start).step("start vhost-device-vsock")?
    }

    fn start_virtiofsd(&self) -> BoxliteResult<Child> {
        let missing = || std::io::Error::other("no socket");
        let socket = self
            .context
            .share_socket
            .as_ref()
            .ok_or_else(missing)
            .step("start virtiofsd")?;
        let args = shares::virtiofsd_args(&self.spec.share_dir, socket.as_raw_fd());
        inherit(socket, true)?;
        let child = start(
            "virtiofsd",
            &self.spec.installation.virtiofsd,
            &args,
            open_null()?,
        )?;
        inherit(socket, false)?;
        Ok(child)
    }
}

/// Users that may open the KVM device.
#[derive(Debug, PartialEq, Eq)]
enum KvmAccess {
    Anyone,
    Group(Gid),
    Root,
}

fn kvm_access() -> BoxliteResult<KvmAccess> {
    let meta = fs::metadata(KVM).step(format!("stat {KVM}"))?;
    Ok(access(meta.mode(), meta.gid()))
}

fn access(mode: u32, group: u32) -> KvmAccess {
    const OTHERS: u32 = 0o006;
    const GROUP: u32 = 0o060;
    match group {
        _ if mode & OTHERS == OTHERS => KvmAccess::Anyone,
        1.. if mode & GROUP == GROUP => KvmAccess::Group(Gid::from_raw(group)),
        _ => KvmAccess::Root,
    }
}

fn open_null() -> BoxliteResult<File> {
    let opened = File::options().read(true).write(true).open("/dev/null");
    opened.step("open /dev/null")
}

fn start(name: &str, program: &Path, args: &[String], null: File) -> BoxliteResult<Child> {
    let mut command = Command::new(program);
    // Their output goes to the vmm child's standard error, not to the console.
    let output = null.try_clone().step("open /dev/null")?;
    command.args(args).env_clear().stdin(null).stdout(output);
    command.spawn().step(format!("start {name}"))
}

/// Waits until `child` listens on `socket`, a name in the working directory: QEMU connects once and does not retry.
fn wait_listening(child: &mut Child, socket: &str) -> BoxliteResult<()> {
    let step = "wait for vhost-device-vsock";
    let deadline = Instant::now() + LISTEN_TIMEOUT;
    loop {
        let table = fs::read_to_string("/proc/self/net/unix").step(step)?;
        let listens = |line: &str| {
            let mut fields = line.split_ascii_whitespace();
            fields.nth(3) == Some(LISTENING) && fields.nth(3) == Some(socket)
        };
        // The table covers the network namespace with other VMs' sockets, hence the unique name.
        if table.lines().any(listens) {
            return Ok(());
        }
        if let Some(status) = child.try_wait().step(step)? {
            return Err(std::io::Error::other(format!("exited: {status}"))).step(step);
        }
        if Instant::now() > deadline {
            return Err(std::io::Error::other("not listening")).step(step);
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Exits this process, PID 1 of its namespace, when the first of its children exits.
fn watch(qemu: &mut Child) -> BoxliteResult<Infallible> {
    let exited = first_exit(qemu.id())?;
    let code = match exited {
        Exited::Qemu(status) => qemu_exit(status),
        // Helpers exit when QEMU closes their sockets, just before QEMU itself exits.
        Exited::Helper(WaitStatus::Exited(_, 0)) => match wait_briefly(qemu)? {
            Some(status) if status.success() => ExitCode::Ok,
            Some(status) => {
                eprintln!("vmm: QEMU exited: {status}");
                ExitCode::VmmStart
            }
            None => {
                eprintln!("vmm: a helper of the VM exited early");
                ExitCode::VmmStart
            }
        },
        Exited::Helper(status) => {
            eprintln!("vmm: a helper of the VM exited: {status:?}");
            ExitCode::VmmStart
        }
    };
    std::process::exit(code as i32)
}

enum Exited {
    Qemu(WaitStatus),
    Helper(WaitStatus),
}

fn first_exit(qemu: u32) -> BoxliteResult<Exited> {
    loop {
        match wait() {
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).step("wait for QEMU"),
            Ok(status @ (WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _))) => {
                let is_qemu = u32::try_from(pid.as_raw()).is_ok_and(|pid| pid == qemu);
                return Ok(if is_qemu {
                    Exited::Qemu(status)
                } else {
                    Exited::Helper(status)
                });
            }
            Ok(_) => {}
        }
    }
}

fn qemu_exit(status: WaitStatus) -> ExitCode {
    match status {
        // The guest powered off, or its kernel panicked and rebooted (-no-reboot).
        WaitStatus::Exited(_, 0) => ExitCode::Ok,
        WaitStatus::Exited(_, code) => {
            eprintln!("vmm: QEMU exited with code {code}");
            ExitCode::VmmStart
        }
        other => {
            eprintln!("vmm: QEMU exited: {other:?}");
            ExitCode::VmmStart
        }
    }
}

fn wait_briefly(qemu: &mut Child) -> BoxliteResult<Option<std::process::ExitStatus>> {
    let deadline = Instant::now() + EXIT_TIMEOUT;
    loop {
        let status = qemu.try_wait().step("wait for QEMU")?;
        if status.is_some() || Instant::now() > deadline {
            return Ok(status);
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_access_follows_mode_and_group() {
        assert_eq!(access(0o20666, 0), KvmAccess::Anyone);
        assert_eq!(access(0o20660, 108), KvmAccess::Group(Gid::from_raw(108)));
        assert_eq!(access(0o20640, 108), KvmAccess::Root);
        assert_eq!(access(0o20660, 0), KvmAccess::Root, "the group of root");
        assert_eq!(access(0o20600, 0), KvmAccess::Root);
    }
}
