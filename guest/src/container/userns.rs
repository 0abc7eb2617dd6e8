//! User namespaces of pods: the mapping requested by a container's spec, and the namespace that implements it.
//!
//! A pod has one user namespace, held by its pause process and shared by its containers. The VM's filesystems and
//! network belong to the VM's initial user namespace, so mounts that a container in another namespace may not make
//! are bind mounts of the VM's.

use super::error::ContainerError;
use crate::spawner::wire::IdMap;
use oci_spec::runtime::{LinuxIdMapping, Spec};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

/// An existing user namespace.
#[derive(Debug, Clone)]
pub(crate) struct UserNamespace {
    /// Mapping of both users and groups.
    pub map: IdMap,
    /// PID of the process that holds it.
    pub pid: i32,
    /// Keeps the namespace alive independently of the process.
    pub file: Arc<File>,
}

impl UserNamespace {
    /// Returns the path for a spec to join it.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/user", self.pid))
    }

    /// Returns the VM's ID of a user or group of the container.
    pub(crate) fn outside(&self, id: u32) -> u32 {
        self.map.outside(id).unwrap_or(id)
    }
}

/// Returns the mapping requested by a spec: one range starting at 0, the same for users and groups.
pub(crate) fn requested_mapping(spec: &Spec) -> Result<Option<IdMap>, ContainerError> {
    let Some(linux) = spec.linux() else {
        return Ok(None);
    };
    let (uids, gids) = (
        linux.uid_mappings().as_deref().unwrap_or_default(),
        linux.gid_mappings().as_deref().unwrap_or_default(),
    );
    if uids.is_empty() && gids.is_empty() {
        return Ok(None);
    }
    let invalid = |reason: &str| ContainerError::Invalid {
        field: "linux.uidMappings",
        reason: reason.to_owned(),
    };
    let ([uid], [gid]) = (uids, gids) else {
        return Err(invalid("must be a single mapping, as must gidMappings"));
    };
    let map = |mapping: &LinuxIdMapping| IdMap {
        first: mapping.host_id(),
        length: mapping.size(),
    };
    if uid.container_id() != 0 || gid.container_id() != 0 || map(uid) != map(gid) {
        return Err(invalid("must start at ID 0 and equal gidMappings"));
    }
    let map = map(uid);
    if map.length == 0 || map.first.checked_add(map.length).is_none() {
        return Err(invalid("not a range of IDs"));
    }
    Ok(Some(map))
}
