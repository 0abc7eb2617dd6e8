//! User of a container, as far as the host can determine it.
//!
//! Names are resolved in the image's /etc/passwd and /etc/group, which only the guest reads. `process.user.username`
//! has the unresolved part in Docker's form `user[:group]`, each a name or a number. The guest resolves it as
//! follows: a user gives its uid and, without `:group`, its primary gid (0 for a number that is not in the file).
//! Without `username` the numbers are final. `additionalGids` are always added, and with the annotation
//! `boxlite.groups` = "merge" also the groups that list the user in /etc/group.

use super::ConvertError;
use boxlite_proto::cri::v1::{LinuxContainerSecurityContext, SupplementalGroupsPolicy};
use serde_json::{Value, json};

/// Returns whether the groups of the image apply, the default policy. [`user`] rejects unknown policies.
pub(crate) fn merges_groups(security: &LinuxContainerSecurityContext) -> bool {
    security.supplemental_groups_policy == SupplementalGroupsPolicy::Merge as i32
}

/// Returns `process.user`; `image` is the image's USER.
pub(crate) fn user(
    security: &LinuxContainerSecurityContext,
    image: &str,
) -> Result<Value, ConvertError> {
    if SupplementalGroupsPolicy::try_from(security.supplemental_groups_policy).is_err() {
        return Err(ConvertError::invalid(
            "security_context.supplemental_groups_policy",
            security.supplemental_groups_policy.to_string(),
            "must be Merge or Strict",
        ));
    }
    let group = security
        .run_as_group
        .as_ref()
        .map(|group| id("security_context.run_as_group", group.value))
        .transpose()?;
    let chosen = match (&security.run_as_user, security.run_as_username.as_str()) {
        (Some(uid), _) => Some(id("security_context.run_as_user", uid.value)?.to_string()),
        (None, "") => None,
        (None, name) => Some(name.to_owned()),
    };
    if chosen.is_none() && image.is_empty() && group.is_some() {
        return Err(ConvertError::invalid(
            "security_context.run_as_group",
            group.unwrap_or_default().to_string(),
            "requires run_as_user or run_as_username",
        ));
    }
    // The group of the image applies to the user of the image only.
    let (name, image_group) = match &chosen {
        Some(name) => (name.as_str(), None),
        None => match image.split_once(':') {
            Some((name, group)) => (name, Some(group).filter(|group| !group.is_empty())),
            None => (image, None),
        },
    };
    let name = if name.is_empty() { "0" } else { name };
    let group = group
        .map(|gid| gid.to_string())
        .or(image_group.map(str::to_owned));
    check(name)?;
    if let Some(group) = &group {
        check(group)?;
    }
    let mut additional = Vec::new();
    for group in &security.supplemental_groups {
        additional.push(id("security_context.supplemental_groups", *group)?);
    }
    let (uid, gid) = (
        name.parse::<u32>().ok(),
        group.as_ref().map(|group| group.parse::<u32>().ok()),
    );
    let mut user = json!({"uid": uid.unwrap_or(0), "gid": gid.flatten().unwrap_or(0)});
    if !additional.is_empty() {
        user["additionalGids"] = json!(additional);
    }
    let settled = uid.is_some() && gid.flatten().is_some();
    if !settled {
        user["username"] = json!(match group {
            Some(group) => format!("{name}:{group}"),
            None => name.to_owned(),
        });
    }
    Ok(user)
}

fn id(field: &'static str, value: i64) -> Result<u32, ConvertError> {
    // The kernel's highest ID, (u32)-1, means "unchanged".
    u32::try_from(value)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or_else(|| ConvertError::invalid(field, value.to_string(), "must be 0 to 4294967294"))
}

/// Rejects line breaks and colons, although the guest only compares names.
fn check(name: &str) -> Result<(), ConvertError> {
    if name.len() > 256 || name.chars().any(|c| c.is_control() || c == ':') {
        return Err(ConvertError::invalid(
            "user",
            name,
            "not a user or group name",
        ));
    }
    if name.parse::<u64>().is_ok() && name.parse::<u32>().is_err() {
        return Err(ConvertError::invalid(
            "user",
            name,
            "exceeds the range of IDs",
        ));
    }
    Ok(())
}
