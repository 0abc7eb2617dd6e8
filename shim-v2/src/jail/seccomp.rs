//! System call filters. The jail's filter refuses calls by which a compromised VMM could leave the jail or attack the host's
//! kernel. [`with_vsock_filter`] adds an allow-list for vhost-device-vsock, which parses the guest's packets and has no filter.
//!
//! The jail's filter applies to the vmm child and, by inheritance, to every thread and helper: libkrun, QEMU, virtiofsd and
//! vhost-device-vsock. QEMU and virtiofsd add their own filters to it. A refused call fails with EPERM instead of ending the
//! process, because programs and libraries probe for some of them.

use super::JailError;
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use std::collections::BTreeMap;

/// Calls that no VMM or helper needs once it is configured.
const REFUSED: &[libc::c_long] = &[
    // Mounts and roots. The jail is complete.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    // Files outside of the mount namespace.
    libc::SYS_open_by_handle_at,
    libc::SYS_setns,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // The kernel itself.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_fanotify_init,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_uselib,
    libc::SYS_vhangup,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
];

/// Calls of vhost-device-vsock, of its start included. socket, socketpair and openat are allowed by their arguments.
const VSOCK_ALLOWED: &[libc::c_long] = &[
    // Start of the program and of its threads.
    libc::SYS_execve,
    libc::SYS_clone,
    libc::SYS_vfork,
    // The jail's filter answers ENOSYS; EPERM from this one would hide that from the C library.
    libc::SYS_clone3,
    libc::SYS_arch_prctl,
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_prlimit64,
    libc::SYS_prctl,
    libc::SYS_access,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_pread64,
    libc::SYS_readlink,
    libc::SYS_getrandom,
    libc::SYS_sched_getaffinity,
    libc::SYS_uname,
    libc::SYS_pipe2,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_gettid,
    libc::SYS_getpid,
    // Memory, threads, signals, time.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_membarrier,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_tgkill,
    libc::SYS_clock_gettime,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Work.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_ioctl,
    libc::SYS_eventfd2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

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

/// Installs the filter for the calling thread and its future children. no_new_privs must be set.
///
/// # Errors
/// The kernel refused the filter.
pub(super) fn install() -> Result<(), JailError> {
    let filters = [refused(), without_clone3()];
    for filter in filters {
        let program = filter
            .and_then(BpfProgram::try_from)
            .map_err(seccompiler::Error::Backend)
            .map_err(JailError::Seccomp)?;
        seccompiler::apply_filter(&program).map_err(JailError::Seccomp)?;
    }
    Ok(())
}

/// Runs `work`, which starts vhost-device-vsock, on a thread with the allow-list; the process it starts inherits it.
///
/// # Errors
/// The kernel refused the filter.
pub fn with_vsock_filter<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, JailError> {
    let program = vsock_filter()
        .and_then(BpfProgram::try_from)
        .map_err(seccompiler::Error::Backend)
        .map_err(JailError::Seccomp)?;
    std::thread::scope(|scope| {
        let filtered = || {
            seccompiler::apply_filter(&program).map_err(JailError::Seccomp)?;
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

fn vsock_filter() -> Result<SeccompFilter, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = VSOCK_ALLOWED
        .iter()
        .map(|call| (*call, Vec::new()))
        .collect();
    let rule = |argument, operation, value: libc::c_int| {
        let value = u64::from(value.cast_unsigned());
        let length = SeccompCmpArgLen::Dword;
        SeccompRule::new(vec![SeccompCondition::new(
            argument, length, operation, value,
        )?])
    };
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        rules.insert(call, vec![rule(0, SeccompCmpOp::Eq, libc::AF_UNIX)?]);
    }
    // Reading only: libraries, /proc and /sys at the start.
    let access = u64::from(libc::O_ACCMODE.cast_unsigned());
    let read_only = rule(2, SeccompCmpOp::MaskedEq(access), libc::O_RDONLY)?;
    rules.insert(libc::SYS_openat, vec![read_only]);
    SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM.cast_unsigned()),
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into()?,
    )
}

fn refused() -> Result<SeccompFilter, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.iter().map(|call| (*call, Vec::new())).collect();
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

    #[test]
    fn vsock_filter_allows_unix_sockets_and_refuses_the_rest() {
        let thread = std::thread::spawn(|| {
            set_no_new_privs().expect("no_new_privs");
            install().expect("the jail's filter");
            let dir = tempfile::tempdir().expect("tempdir");
            let socket = dir.path().join("vsock");
            with_vsock_filter(|| {
                let listener = std::os::unix::net::UnixListener::bind(&socket).expect("bound");
                let client = std::os::unix::net::UnixStream::connect(&socket);
                drop((
                    listener.accept().expect("accepted"),
                    client.expect("connected"),
                ));
                std::fs::read("/proc/self/status").expect("read");
                let mut program = std::process::Command::new("true");
                let null = || std::fs::File::open("/dev/null").expect("opened");
                let program = program.env_clear().stdin(null()).stdout(null());
                let ended = program.spawn().expect("started").wait();
                assert!(ended.expect("ended").success());
                let refused = |result: std::io::Result<()>| {
                    let error = result.expect_err("refused");
                    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
                };
                refused(std::net::UdpSocket::bind("127.0.0.1:0").map(drop));
                refused(std::fs::write(dir.path().join("file"), ""));
                refused(std::fs::create_dir(dir.path().join("directory")));
                refused(std::fs::rename(&socket, dir.path().join("other")));
            })
            .expect("filtered");
        });
        thread.join().expect("the filtered thread");
    }
}
