//! AppArmor and SELinux fields.
//!
//! A pod has a separate kernel that runs without either, so that a profile or label of the host has no effect in it.
//! Requests for no confinement, or for the runtime's default, succeed without effect, as in containerd on a host
//! without AppArmor.

use super::ConvertError;
use boxlite_proto::cri::v1::{
    LinuxContainerSecurityContext, LinuxSandboxSecurityContext, SeLinuxOption, SecurityProfile,
    security_profile::ProfileType,
};
use std::path::Path;

/// Present if selinuxfs is mounted, as libselinux checks it.
const SELINUX_STATUS: &str = "/sys/fs/selinux/enforce";
const NO_APPARMOR: &str = "the kernel of the VM has no AppArmor";
const NO_SELINUX: &str = "the kernel of the VM runs without SELinux";

/// Validates the fields of a container.
pub(crate) fn container(security: &LinuxContainerSecurityContext) -> Result<(), ConvertError> {
    apparmor(security.apparmor.as_ref())?;
    #[expect(deprecated, reason = "older kubelets send it")]
    let profile = security.apparmor_profile.as_str();
    if !matches!(profile, "" | "unconfined" | "runtime/default") {
        return Err(ConvertError::unsupported(
            "security_context.apparmor_profile",
            format!("{profile:?}"),
            NO_APPARMOR,
        ));
    }
    selinux(security.selinux_options.as_ref(), is_selinux_enabled())
}

/// Validates the fields of a pod.
pub(crate) fn sandbox(security: &LinuxSandboxSecurityContext) -> Result<(), ConvertError> {
    apparmor(security.apparmor.as_ref())?;
    selinux(security.selinux_options.as_ref(), is_selinux_enabled())
}

fn apparmor(profile: Option<&SecurityProfile>) -> Result<(), ConvertError> {
    match profile {
        Some(profile) if profile.profile_type == ProfileType::Localhost as i32 => {
            Err(ConvertError::unsupported(
                "security_context.apparmor",
                format!("{:?}", profile.localhost_ref),
                NO_APPARMOR,
            ))
        }
        _ => Ok(()),
    }
}

fn selinux(options: Option<&SeLinuxOption>, is_enabled: bool) -> Result<(), ConvertError> {
    let Some(options) = options else {
        return Ok(());
    };
    let parts = [
        &options.user,
        &options.role,
        &options.r#type,
        &options.level,
    ];
    if !is_enabled || parts.iter().all(|part| part.is_empty()) {
        return Ok(());
    }
    let label: Vec<&str> = parts.iter().map(|part| part.as_str()).collect();
    Err(ConvertError::unsupported(
        "security_context.selinux_options",
        format!("{:?}", label.join(":")),
        NO_SELINUX,
    ))
}

/// Returns whether SELinux is enabled on this node.
fn is_selinux_enabled() -> bool {
    Path::new(SELINUX_STATUS).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selinux_options_are_rejected_only_on_selinux_nodes() {
        let options = SeLinuxOption {
            level: "s0:c1".into(),
            ..Default::default()
        };
        assert_eq!(selinux(Some(&options), false), Ok(()));
        assert_eq!(selinux(Some(&SeLinuxOption::default()), true), Ok(()));
        let error = selinux(Some(&options), true).unwrap_err().to_string();
        assert!(
            error.contains("selinux_options") && error.contains("s0:c1"),
            "{error}"
        );
    }
}
