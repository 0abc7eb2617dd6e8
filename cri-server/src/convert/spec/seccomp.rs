//! `linux.seccomp` of a container's spec: the RuntimeDefault profile, and profiles read from the host.
//!
//! RuntimeDefault is an allow list with containerd's content: system calls that programs need, without those that
//! affect more than a container (mounts, modules, keys, clocks, namespaces, io_uring) unless a capability allows
//! them. Names of other architectures are omitted: guests are x86-64. The guest compiles and installs profiles.

use super::ConvertError;
use boxlite_proto::cri::v1::{
    LinuxContainerSecurityContext, SecurityProfile, security_profile::ProfileType,
};
use oci_spec::runtime::LinuxSeccomp;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Read;

/// Field of the request.
const FIELD: &str = "security_context.seccomp";
/// Maximum size of a profile; it is sent in the spec.
const MAX_PROFILE_BYTES: u64 = 1 << 20;
/// The default error is EPERM; clone3 returns ENOSYS, so that C libraries fall back to clone, whose flags can be
/// filtered.
const ENOSYS: u32 = 38;
/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
const NEW_NAMESPACES: u64 = 0x7e02_0000;
/// Address family of vsock, the channel to the host, which containers must not use.
const AF_VSOCK: u64 = 40;

/// Returns the profile; `None` runs unconfined. `bounding` has the container's capabilities with `CAP_`.
pub(crate) fn seccomp(
    security: &LinuxContainerSecurityContext,
    bounding: &Value,
) -> Result<Option<Value>, ConvertError> {
    if security.privileged {
        return Ok(None);
    }
    let Some(profile) = wanted(security)? else {
        return Ok(None);
    };
    match ProfileType::try_from(profile.profile_type) {
        Ok(ProfileType::Unconfined) => Ok(None),
        Ok(ProfileType::RuntimeDefault) => {
            let has = |name: &str| {
                let name = format!("CAP_{name}");
                bounding
                    .as_array()
                    .is_some_and(|all| all.iter().any(|cap| *cap == name))
            };
            Ok(Some(runtime_default(has)))
        }
        Ok(ProfileType::Localhost) => read(&profile.localhost_ref).map(Some),
        Err(_) => Err(ConvertError::invalid(
            FIELD,
            profile.profile_type.to_string(),
            "not a profile type",
        )),
    }
}

/// Returns the requested profile, from the field or its deprecated predecessor.
fn wanted(
    security: &LinuxContainerSecurityContext,
) -> Result<Option<SecurityProfile>, ConvertError> {
    if security.seccomp.is_some() {
        return Ok(security.seccomp.clone());
    }
    #[expect(deprecated, reason = "older kubelets send it")]
    let path = security.seccomp_profile_path.as_str();
    let profile = |kind: ProfileType, path: &str| {
        Ok(Some(SecurityProfile {
            profile_type: kind as i32,
            localhost_ref: path.to_owned(),
        }))
    };
    match path {
        "" => Ok(None),
        "unconfined" => profile(ProfileType::Unconfined, ""),
        "runtime/default" | "docker/default" => profile(ProfileType::RuntimeDefault, ""),
        path if path.starts_with("localhost/") => profile(ProfileType::Localhost, path),
        path => Err(ConvertError::invalid(
            "security_context.seccomp_profile_path",
            path,
            "must be one of unconfined, runtime/default, localhost/<path>",
        )),
    }
}

/// Reads a profile from the host.
fn read(reference: &str) -> Result<Value, ConvertError> {
    let path = reference.strip_prefix("localhost/").unwrap_or(reference);
    let fail = |reason: String| ConvertError::invalid("seccomp.localhost_ref", path, reason);
    if !path.starts_with('/') {
        return Err(fail("must be an absolute path".into()));
    }
    let open = || -> std::io::Result<Vec<u8>> {
        let metadata = std::fs::metadata(path)?;
        if !metadata.is_file() {
            return Err(std::io::Error::other("not a file"));
        }
        let mut bytes = Vec::new();
        File::open(path)?
            .take(MAX_PROFILE_BYTES + 1)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = open().map_err(|error| fail(format!("failed to read profile: {error}")))?;
    if bytes.len() as u64 > MAX_PROFILE_BYTES {
        return Err(fail(format!(
            "profile too large (maximum {MAX_PROFILE_BYTES} bytes)"
        )));
    }
    let document: Value = serde_json::from_slice(&bytes)
        .map_err(|error| fail(format!("not a seccomp profile: {error}")))?;
    if let Some(field) = foreign_field(&document) {
        return Err(fail(format!(
            "has syscalls.{field}, which is Docker's own and not in the OCI specification: its rules would apply unconditionally"
        )));
    }
    let profile: LinuxSeccomp = serde_json::from_value(document)
        .map_err(|error| fail(format!("not a seccomp profile: {error}")))?;
    serde_json::to_value(profile).map_err(|error| fail(error.to_string()))
}

/// Returns a condition that only Docker's format has, if one is set.
fn foreign_field(document: &Value) -> Option<&'static str> {
    let rules = document["syscalls"].as_array()?;
    ["includes", "excludes"].into_iter().find(|field| {
        rules.iter().any(|rule| {
            let conditions = rule[*field].as_object();
            conditions.is_some_and(|conditions| !conditions.is_empty())
        })
    })
}

fn allow(names: &[&str]) -> Value {
    json!({"names": names, "action": "SCMP_ACT_ALLOW"})
}

fn allow_if(name: &str, index: u32, op: &str, value: u64) -> Value {
    json!({"names": [name], "action": "SCMP_ACT_ALLOW",
        "args": [{"index": index, "value": value, "op": op}]})
}

fn runtime_default(has: impl Fn(&str) -> bool) -> Value {
    let mut rules = vec![
        allow(FILES),
        allow(PROCESSES),
        allow(MEMORY_AND_TIME),
        allow(COMMUNICATION),
        allow_if("socket", 0, "SCMP_CMP_NE", AF_VSOCK),
    ];
    // PER_LINUX and PER_LINUX32, both also with UNAME26, and the query.
    for persona in [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff] {
        rules.push(allow_if("personality", 0, "SCMP_CMP_EQ", persona));
    }
    for (capability, names) in BY_CAPABILITY {
        if has(capability) {
            rules.push(allow(names));
        }
    }
    if !has("SYS_ADMIN") {
        rules.push(
            json!({"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": NEW_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]}),
        );
        rules.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS}));
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": rules,
    })
}

/// System calls that capabilities allow in containerd's default profile.
const BY_CAPABILITY: &[(&str, &[&str])] = &[
    ("DAC_READ_SEARCH", &["open_by_handle_at"]),
    (
        "SYS_ADMIN",
        &[
            "bpf",
            "clone",
            "clone3",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "perf_event_open",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "syslog",
            "umount2",
            "unshare",
        ],
    ),
    ("SYS_BOOT", &["reboot"]),
    ("SYS_CHROOT", &["chroot"]),
    (
        "SYS_MODULE",
        &[
            "create_module",
            "delete_module",
            "finit_module",
            "init_module",
            "query_module",
        ],
    ),
    ("SYS_PACCT", &["acct"]),
    ("SYS_PTRACE", &["kcmp", "pidfd_getfd", "process_madvise"]),
    ("SYS_RAWIO", &["ioperm", "iopl"]),
    ("SYS_TIME", &["clock_settime", "settimeofday"]),
    ("SYS_TTY_CONFIG", &["vhangup"]),
    (
        "SYS_NICE",
        &[
            "get_mempolicy",
            "mbind",
            "set_mempolicy",
            "set_mempolicy_home_node",
        ],
    ),
    ("SYSLOG", &["syslog"]),
    ("BPF", &["bpf"]),
    ("PERFMON", &["perf_event_open"]),
];

/// Files, directories, descriptors, legacy asynchronous I/O.
const FILES: &[&str] = &[
    "access",
    "cachestat",
    "chdir",
    "chmod",
    "chown",
    "close",
    "close_range",
    "copy_file_range",
    "creat",
    "dup",
    "dup2",
    "dup3",
    "epoll_create",
    "epoll_create1",
    "epoll_ctl",
    "epoll_ctl_old",
    "epoll_pwait",
    "epoll_pwait2",
    "epoll_wait",
    "epoll_wait_old",
    "eventfd",
    "eventfd2",
    "faccessat",
    "faccessat2",
    "fadvise64",
    "fallocate",
    "fanotify_mark",
    "fchdir",
    "fchmod",
    "fchmodat",
    "fchmodat2",
    "fchown",
    "fchownat",
    "fcntl",
    "fdatasync",
    "fgetxattr",
    "flistxattr",
    "flock",
    "fremovexattr",
    "fsetxattr",
    "fstat",
    "fstatfs",
    "fsync",
    "ftruncate",
    "futimesat",
    "getcwd",
    "getdents",
    "getdents64",
    "getxattr",
    "getxattrat",
    "inotify_add_watch",
    "inotify_init",
    "inotify_init1",
    "inotify_rm_watch",
    "io_cancel",
    "io_destroy",
    "io_getevents",
    "io_pgetevents",
    "io_setup",
    "io_submit",
    "ioctl",
    "lchown",
    "lgetxattr",
    "link",
    "linkat",
    "listmount",
    "listxattr",
    "listxattrat",
    "llistxattr",
    "lremovexattr",
    "lseek",
    "lsetxattr",
    "lstat",
    "mkdir",
    "mkdirat",
    "mknod",
    "mknodat",
    "name_to_handle_at",
    "newfstatat",
    "open",
    "openat",
    "openat2",
    "pipe",
    "pipe2",
    "poll",
    "ppoll",
    "pread64",
    "preadv",
    "preadv2",
    "pselect6",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "read",
    "readahead",
    "readlink",
    "readlinkat",
    "readv",
    "removexattr",
    "removexattrat",
    "rename",
    "renameat",
    "renameat2",
    "rmdir",
    "select",
    "sendfile",
    "setxattr",
    "setxattrat",
    "signalfd",
    "signalfd4",
    "splice",
    "stat",
    "statfs",
    "statmount",
    "statx",
    "symlink",
    "symlinkat",
    "sync",
    "sync_file_range",
    "syncfs",
    "tee",
    "truncate",
    "umask",
    "unlink",
    "unlinkat",
    "utime",
    "utimensat",
    "utimes",
    "vmsplice",
    "write",
    "writev",
];

/// Processes, users, signals, scheduling, self-confinement.
const PROCESSES: &[&str] = &[
    "arch_prctl",
    "capget",
    "capset",
    "execve",
    "execveat",
    "exit",
    "exit_group",
    "fork",
    "futex",
    "futex_requeue",
    "futex_wait",
    "futex_waitv",
    "futex_wake",
    "get_robust_list",
    "get_thread_area",
    "getcpu",
    "getegid",
    "geteuid",
    "getgid",
    "getgroups",
    "getpgid",
    "getpgrp",
    "getpid",
    "getppid",
    "getpriority",
    "getresgid",
    "getresuid",
    "getrlimit",
    "getrusage",
    "getsid",
    "gettid",
    "getuid",
    "ioprio_get",
    "ioprio_set",
    "kill",
    "landlock_add_rule",
    "landlock_create_ruleset",
    "landlock_restrict_self",
    "lsm_get_self_attr",
    "lsm_list_modules",
    "lsm_set_self_attr",
    "membarrier",
    "modify_ldt",
    "pause",
    "pidfd_open",
    "pidfd_send_signal",
    "prctl",
    "prlimit64",
    "process_mrelease",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "restart_syscall",
    "rseq",
    "rt_sigaction",
    "rt_sigpending",
    "rt_sigprocmask",
    "rt_sigqueueinfo",
    "rt_sigreturn",
    "rt_sigsuspend",
    "rt_sigtimedwait",
    "rt_tgsigqueueinfo",
    "sched_get_priority_max",
    "sched_get_priority_min",
    "sched_getaffinity",
    "sched_getattr",
    "sched_getparam",
    "sched_getscheduler",
    "sched_rr_get_interval",
    "sched_setaffinity",
    "sched_setattr",
    "sched_setparam",
    "sched_setscheduler",
    "sched_yield",
    "seccomp",
    "set_robust_list",
    "set_thread_area",
    "set_tid_address",
    "setfsgid",
    "setfsuid",
    "setgid",
    "setgroups",
    "setpgid",
    "setpriority",
    "setregid",
    "setresgid",
    "setresuid",
    "setreuid",
    "setrlimit",
    "setsid",
    "setuid",
    "sigaltstack",
    "sysinfo",
    "tgkill",
    "tkill",
    "uname",
    "uretprobe",
    "vfork",
    "wait4",
    "waitid",
];

/// Memory, clocks and timers, random numbers.
const MEMORY_AND_TIME: &[&str] = &[
    "adjtimex",
    "alarm",
    "brk",
    "clock_adjtime",
    "clock_getres",
    "clock_gettime",
    "clock_nanosleep",
    "getitimer",
    "getrandom",
    "gettimeofday",
    "madvise",
    "map_shadow_stack",
    "memfd_create",
    "memfd_secret",
    "mincore",
    "mlock",
    "mlock2",
    "mlockall",
    "mmap",
    "mprotect",
    "mremap",
    "mseal",
    "msync",
    "munlock",
    "munlockall",
    "munmap",
    "nanosleep",
    "pkey_alloc",
    "pkey_free",
    "pkey_mprotect",
    "remap_file_pages",
    "setitimer",
    "time",
    "timer_create",
    "timer_delete",
    "timer_getoverrun",
    "timer_gettime",
    "timer_settime",
    "timerfd_create",
    "timerfd_gettime",
    "timerfd_settime",
    "times",
];

/// Sockets except their creation, and System V and POSIX IPC.
const COMMUNICATION: &[&str] = &[
    "accept",
    "accept4",
    "bind",
    "connect",
    "getpeername",
    "getsockname",
    "getsockopt",
    "listen",
    "mq_getsetattr",
    "mq_notify",
    "mq_open",
    "mq_timedreceive",
    "mq_timedsend",
    "mq_unlink",
    "msgctl",
    "msgget",
    "msgrcv",
    "msgsnd",
    "recvfrom",
    "recvmmsg",
    "recvmsg",
    "semctl",
    "semget",
    "semop",
    "semtimedop",
    "sendmmsg",
    "sendmsg",
    "sendto",
    "setsockopt",
    "shmat",
    "shmctl",
    "shmdt",
    "shmget",
    "shutdown",
    "socketpair",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn rule<'a>(profile: &'a Value, name: &str) -> Vec<&'a Value> {
        let rules = profile["syscalls"].as_array().unwrap();
        let named = |rule: &&Value| rule["names"].as_array().unwrap().iter().any(|n| n == name);
        rules.iter().filter(named).collect()
    }

    fn with(profile_type: ProfileType, path: &str) -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext {
            seccomp: Some(SecurityProfile {
                profile_type: profile_type as i32,
                localhost_ref: path.into(),
            }),
            ..Default::default()
        }
    }

    #[test]
    fn runtime_default_depends_on_capabilities() {
        let plain = seccomp(
            &with(ProfileType::RuntimeDefault, ""),
            &json!(["CAP_CHOWN", "CAP_SYS_CHROOT"]),
        )
        .unwrap()
        .unwrap();
        serde_json::from_value::<LinuxSeccomp>(plain.clone()).unwrap();
        for forbidden in [
            "mount",
            "unshare",
            "setns",
            "bpf",
            "keyctl",
            "io_uring_setup",
            "kexec_load",
        ] {
            assert!(rule(&plain, forbidden).is_empty(), "{forbidden}");
        }
        assert_eq!(rule(&plain, "chroot").len(), 1);
        assert_eq!(
            rule(&plain, "clone")[0]["args"][0]["op"],
            "SCMP_CMP_MASKED_EQ"
        );
        assert_eq!(rule(&plain, "clone3")[0]["errnoRet"], 38);
        assert_eq!(rule(&plain, "personality").len(), 5);
        let admin = seccomp(
            &with(ProfileType::RuntimeDefault, ""),
            &json!(["CAP_SYS_ADMIN"]),
        )
        .unwrap()
        .unwrap();
        assert_eq!(rule(&admin, "clone3").len(), 1);
        assert_eq!(rule(&admin, "clone3")[0]["action"], "SCMP_ACT_ALLOW");
        assert_eq!(rule(&admin, "mount").len(), 1);
    }

    #[test]
    fn unset_unconfined_and_privileged_have_no_profile() {
        let none = LinuxContainerSecurityContext::default();
        assert_eq!(seccomp(&none, &json!([])), Ok(None));
        assert_eq!(
            seccomp(&with(ProfileType::Unconfined, ""), &json!([])),
            Ok(None)
        );
        let mut privileged = with(ProfileType::Localhost, "/no/such/profile");
        privileged.privileged = true;
        assert_eq!(seccomp(&privileged, &json!([])), Ok(None));
    }

    #[test]
    fn localhost_profile_is_read_and_validated() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.json");
        let path = file.to_str().unwrap();
        let load = |text: &str| {
            std::fs::write(&file, text).unwrap();
            seccomp(&with(ProfileType::Localhost, path), &json!([]))
        };
        let good = load(r#"{"defaultAction":"SCMP_ACT_ALLOW","archMap":[],"syscalls":[{"names":["chmod"],"action":"SCMP_ACT_ERRNO"}]}"#)
            .unwrap()
            .unwrap();
        assert_eq!(rule(&good, "chmod")[0]["action"], "SCMP_ACT_ERRNO");
        for (text, word) in [
            ("{", "not a seccomp profile"),
            (r#"{"defaultAction":"SCMP_ACT_MAYBE"}"#, "SCMP_ACT_MAYBE"),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["bpf"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_BPF"]}}]}"#,
                "syscalls.includes",
            ),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains(path), "{error}");
        }
        for (reference, word) in [
            ("/no/such/profile.json", "No such file"),
            ("relative.json", "absolute"),
            ("/dev/null", "not a file"),
        ] {
            let error = seccomp(&with(ProfileType::Localhost, reference), &json!([]))
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(word) && error.contains("localhost_ref"),
                "{error}"
            );
        }
    }

    #[test]
    fn deprecated_field_is_accepted() {
        #[expect(deprecated, reason = "older kubelets send it")]
        let with = |path: &str| LinuxContainerSecurityContext {
            seccomp_profile_path: path.into(),
            ..Default::default()
        };
        assert!(
            seccomp(&with("runtime/default"), &json!([]))
                .unwrap()
                .is_some()
        );
        assert_eq!(seccomp(&with("unconfined"), &json!([])), Ok(None));
        assert!(seccomp(&with("localhost//no/such"), &json!([])).is_err());
        assert!(seccomp(&with("else"), &json!([])).is_err());
    }
}
