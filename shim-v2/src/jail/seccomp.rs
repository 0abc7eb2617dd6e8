//! System call filters. The jail's filter refuses calls by which a compromised VMM could leave the jail or attack the host's
//! kernel, in every process of the jail. Behind it, processes that parse the guest's data have an allow-list: QEMU and
//! vhost-device-vsock by [`with_filter`], libkrun's VMM by [`allow_only`]; virtiofsd brings its own.
//!
//! A refused call fails with EPERM instead of ending the process, because programs and libraries probe for some of them.

mod calls;

use super::JailError;
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use std::collections::BTreeMap;

/// Flags of clone(2) and unshare(2) that create namespaces. Threads and CLONE_FS remain allowed: virtiofsd's threads have
/// their own umask.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWCGROUP,
];

/// A process with an allow-list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    /// vhost-device-vsock.
    Vsock,
    /// QEMU. With `internet` it opens the host's sockets for the guest.
    Qemu { internet: bool },
    /// libkrun's VMM, which serves files, too. With `internet` as for QEMU.
    Krun { internet: bool },
}

impl Process {
    fn calls(self) -> Vec<&'static [libc::c_long]> {
        let common = [
            calls::PROGRAM,
            calls::DESCRIPTORS,
            calls::LOOKUP,
            calls::SOCKETS,
        ];
        let mut sets = common.to_vec();
        match self {
            Self::Vsock => sets.push(calls::EXEC),
            Self::Qemu { .. } => sets.extend([calls::EXEC, calls::VMM]),
            Self::Krun { .. } => sets.extend([calls::VMM, calls::FILE_SERVER]),
        }
        sets
    }

    fn socket_families(self) -> &'static [libc::c_int] {
        match self {
            Self::Qemu { internet: true } | Self::Krun { internet: true } => {
                &[libc::AF_UNIX, libc::AF_INET, libc::AF_INET6]
            }
            _ => &[libc::AF_UNIX],
        }
    }

    fn filter(self) -> Result<SeccompFilter, seccompiler::BackendError> {
        let sets = self.calls();
        let allowed = sets.into_iter().flatten().map(|call| (*call, Vec::new()));
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = allowed.collect();
        let rule = |argument, operation, value: libc::c_int| {
            let value = u64::from(value.cast_unsigned());
            let length = SeccompCmpArgLen::Dword;
            SeccompRule::new(vec![SeccompCondition::new(
                argument, length, operation, value,
            )?])
        };
        for call in [libc::SYS_socket, libc::SYS_socketpair] {
            let families = self.socket_families().iter();
            let families = families.map(|family| rule(0, SeccompCmpOp::Eq, *family));
            rules.insert(call, families.collect::<Result<_, _>>()?);
        }
        if self == Self::Vsock {
            // Reading only: libraries, /proc and /sys at the start.
            let access = u64::from(libc::O_ACCMODE.cast_unsigned());
            let read_only = rule(2, SeccompCmpOp::MaskedEq(access), libc::O_RDONLY)?;
            rules.insert(libc::SYS_openat, vec![read_only]);
        }
        SeccompFilter::new(
            rules,
            SeccompAction::Errno(libc::EPERM.cast_unsigned()),
            SeccompAction::Allow,
            std::env::consts::ARCH.try_into()?,
        )
    }
}

/// Installs the filter for the calling thread and its future children. no_new_privs must be set.
///
/// # Errors
/// The kernel refused the filter.
pub(super) fn install() -> Result<(), JailError> {
    apply(refused())?;
    apply(without_clone3())
}

/// Leaves the calling thread and its future children the calls of `process`.
///
/// # Errors
/// The kernel refused the filter.
pub fn allow_only(process: Process) -> Result<(), JailError> {
    apply(process.filter())
}

/// Runs `work`, which starts `process`, on a thread with its allow-list; the started process inherits it.
///
/// # Errors
/// The kernel refused the filter.
pub fn with_filter<T: Send>(
    process: Process,
    work: impl FnOnce() -> T + Send,
) -> Result<T, JailError> {
    std::thread::scope(|scope| {
        let filtered = || {
            allow_only(process)?;
            Ok(work())
        };
        let thread = scope.spawn(filtered);
        let panicked = |_| {
            Err(JailError::System {
                step: "start a helper",
                source: nix::Error::EIO,
            })
        };
        thread.join().unwrap_or_else(panicked)
    })
}

fn apply(filter: Result<SeccompFilter, seccompiler::BackendError>) -> Result<(), JailError> {
    let program = filter
        .and_then(BpfProgram::try_from)
        .map_err(seccompiler::Error::Backend)
        .map_err(JailError::Seccomp)?;
    seccompiler::apply_filter(&program).map_err(JailError::Seccomp)
}

fn refused() -> Result<SeccompFilter, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = calls::REFUSED
        .iter()
        .map(|call| (*call, Vec::new()))
        .collect();
    for call in [libc::SYS_clone, libc::SYS_unshare] {
        let flags = NAMESPACES.iter().map(|flag| {
            let flag = u64::from(flag.cast_unsigned());
            let set = SeccompCmpOp::MaskedEq(flag);
            let condition = SeccompCondition::new(0, SeccompCmpArgLen::Qword, set, flag)?;
            SeccompRule::new(vec![condition])
        });
        rules.insert(call, flags.collect::<Result<_, _>>()?);
    }
    filter(rules, libc::EPERM)
}

/// The flags of clone3 are in memory, out of a filter's sight. Without it the C library uses clone.
fn without_clone3() -> Result<SeccompFilter, seccompiler::BackendError> {
    filter(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        libc::ENOSYS,
    )
}

fn filter(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    errno: libc::c_int,
) -> Result<SeccompFilter, seccompiler::BackendError> {
    let refuse = SeccompAction::Errno(errno.cast_unsigned());
    SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        refuse,
        std::env::consts::ARCH.try_into()?,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, setns, unshare};
    use nix::sys::prctl::set_no_new_privs;

    /// Runs on a separate thread, because a filter cannot be removed.
    #[test]
    fn install_refuses_canary_calls_and_allows_ordinary_ones() {
        let thread = std::thread::spawn(|| {
            set_no_new_privs().expect("no_new_privs");
            install().expect("installed");
            let none = None::<&str>;
            let mounted = mount(none, "/", none, MsFlags::MS_PRIVATE, none);
            assert_eq!(mounted, Err(Errno::EPERM));
            for namespace in [CloneFlags::CLONE_NEWUSER, CloneFlags::CLONE_NEWNS] {
                assert_eq!(unshare(namespace), Err(Errno::EPERM));
            }
            assert_eq!(nix::unistd::chroot("/"), Err(Errno::EPERM));
            let namespace = std::fs::File::open("/proc/self/ns/uts").expect("a namespace");
            let entered = setns(namespace, CloneFlags::CLONE_NEWUTS);
            assert_eq!(entered, Err(Errno::EPERM));
            // Calls of VMMs and helpers.
            unshare(CloneFlags::CLONE_FS).expect("own umask");
            let child = std::thread::spawn(|| std::fs::read("/proc/self/status"));
            child.join().expect("a thread").expect("a file");
            let status = std::fs::read_to_string("/proc/thread-self/status").expect("status");
            assert!(status.contains("Seccomp:\t2"), "{status}");
            let ran = std::process::Command::new("true").status();
            assert!(ran.expect("a process").success());
        });
        thread.join().expect("the filtered thread");
    }

    /// Runs `body` on a thread with the jail's filter and the allow-list of `process`.
    fn confined(process: Process, body: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(move || {
            set_no_new_privs().expect("no_new_privs");
            install().expect("the jail's filter");
            with_filter(process, body).expect("filtered");
        });
        thread.join().expect("the filtered thread");
    }

    fn refused<T: std::fmt::Debug>(result: std::io::Result<T>) {
        let error = result.expect_err("refused");
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    }

    fn run_true() -> std::io::Result<std::process::ExitStatus> {
        let null = || std::fs::File::open("/dev/null").expect("opened");
        let mut program = std::process::Command::new("true");
        program.env_clear().stdin(null()).stdout(null());
        program.spawn()?.wait()
    }

    /// Calls that are on no list, and that the jail's filter does not refuse.
    fn canaries() {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
        let flags = SockFlag::empty();
        let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, None);
        refused(netlink.map_err(Into::into));
        refused(nix::unistd::getpgid(None).map_err(Into::into));
        refused(nix::unistd::getsid(None).map_err(Into::into));
    }

    #[test]
    fn vsock_filter_allows_unix_sockets_and_refuses_the_rest() {
        let dir = tempfile::tempdir().expect("tempdir");
        confined(Process::Vsock, move || {
            let socket = dir.path().join("vsock");
            let listener = std::os::unix::net::UnixListener::bind(&socket).expect("bound");
            let client = std::os::unix::net::UnixStream::connect(&socket);
            drop((
                listener.accept().expect("accepted"),
                client.expect("connected"),
            ));
            std::fs::read("/proc/self/status").expect("read");
            assert!(run_true().expect("ran").success());
            refused(std::net::UdpSocket::bind("127.0.0.1:0"));
            refused(std::fs::write(dir.path().join("file"), ""));
            refused(std::fs::create_dir(dir.path().join("directory")));
            refused(std::fs::rename(&socket, dir.path().join("other")));
            canaries();
        });
    }

    #[test]
    fn qemu_filter_allows_disks_and_refuses_changes_of_files() {
        let dir = tempfile::tempdir().expect("tempdir");
        confined(Process::Qemu { internet: false }, move || {
            let disk = dir.path().join("disk");
            std::fs::write(&disk, "x").expect("written");
            assert!(run_true().expect("ran").success());
            refused(std::net::UdpSocket::bind("127.0.0.1:0"));
            refused(std::fs::create_dir(dir.path().join("directory")));
            refused(std::fs::set_permissions(
                &disk,
                std::fs::metadata(&disk).expect("stat").permissions(),
            ));
            canaries();
        });
    }

    #[test]
    fn krun_filter_allows_changes_of_files_and_refuses_programs() {
        let dir = tempfile::tempdir().expect("tempdir");
        confined(Process::Krun { internet: true }, move || {
            let directory = dir.path().join("directory");
            std::fs::create_dir(&directory).expect("created");
            std::fs::write(directory.join("file"), "x").expect("written");
            std::net::UdpSocket::bind("127.0.0.1:0").expect("bound");
            let thread = std::thread::spawn(|| std::fs::read("/proc/self/status"));
            thread.join().expect("a thread").expect("a file");
            // A command would need more refused calls to report that.
            let ran = nix::unistd::execv(c"/bin/true", &[c"true"]);
            refused(ran.map_err(Into::into));
            canaries();
        });
    }
}
