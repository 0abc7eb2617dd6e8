//! Capabilities of a container: containerd's default set, additions and removals of the request, `ALL`.

use super::ConvertError;
use boxlite_proto::cri::v1::{Capability, LinuxContainerSecurityContext};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Default capabilities, as in containerd and Docker.
const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];
/// All capabilities since Linux 5.9 (capability.h, CAP_LAST_CAP 40); the guest's kernel is 6.12.
const ALL: [&str; 41] = [
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

/// Returns `process.capabilities`. As in containerd, in the order: add ALL, drop ALL, add each, drop each.
pub(crate) fn capabilities(
    security: &LinuxContainerSecurityContext,
) -> Result<Value, ConvertError> {
    let none = Capability::default();
    let request = security.capabilities.as_ref().unwrap_or(&none);
    let mut set: BTreeSet<&str> = if security.privileged {
        ALL.into()
    } else {
        DEFAULT.into()
    };
    if request.add_capabilities.iter().any(|name| is_all(name)) {
        set = ALL.into();
    }
    if !security.privileged {
        if request.drop_capabilities.iter().any(|name| is_all(name)) {
            set.clear();
        }
        for name in request.add_capabilities.iter().filter(|name| !is_all(name)) {
            set.insert(known(name)?);
        }
        for name in request
            .drop_capabilities
            .iter()
            .filter(|name| !is_all(name))
        {
            set.remove(known(name)?);
        }
    }
    let mut ambient = BTreeSet::new();
    for name in &request.add_ambient_capabilities {
        let name = known(name)?;
        set.insert(name);
        ambient.insert(name);
    }
    let names = |set: &BTreeSet<&str>| -> Vec<String> {
        set.iter().map(|name| format!("CAP_{name}")).collect()
    };
    Ok(json!({
        "bounding": names(&set),
        "effective": names(&set),
        "permitted": names(&set),
        // An ambient capability must be inheritable as well (capabilities(7)).
        "inheritable": names(&ambient),
        "ambient": names(&ambient),
    }))
}

fn is_all(name: &str) -> bool {
    name.eq_ignore_ascii_case("ALL")
}

/// Returns the capability without the optional prefix `CAP_`, in any case.
fn known(name: &str) -> Result<&'static str, ConvertError> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    ALL.into_iter().find(|have| *have == bare).ok_or_else(|| {
        ConvertError::invalid(
            "security_context.capabilities",
            name,
            "not a Linux capability",
        )
    })
}
