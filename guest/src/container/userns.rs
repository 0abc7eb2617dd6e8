//! User namespaces of pods: the mapping that a container's spec asks for, and the namespace that stands for it.
//!
//! A pod has one, held by its pause process and shared by its containers. The VM's own file systems and network belong to
//! the VM's first user namespace, so what a container in another may not mount itself it gets bound from the VM.

use super::ContainerError;
use crate::spawner::wire::IdMap;
use oci_spec::runtime::{LinuxIdMapping, Spec};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

/// A user namespace that exists.
#[derive(Debug, Clone)]
pub struct UserNamespace {
    /// Users and groups alike.
    pub map: IdMap,
    /// Of the process that holds it.
    pub pid: i32,
    /// The namespace itself, whatever becomes of the process.
    pub file: Arc<File>,
}

impl UserNamespace {
    /// For a spec to join.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/user", self.pid))
    }

    /// The VM's number of a container's user or group.
    pub fn outside(&self, id: u32) -> u32 {
        self.map.outside(id).unwrap_or(id)
    }
}

/// The mapping that a spec asks for: one range, from 0, for users and groups alike.
pub fn wanted(spec: &Spec) -> Result<Option<IdMap>, ContainerError> {
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
        return Err(invalid("must be one mapping, and so gidMappings"));
    };
    let map = |mapping: &LinuxIdMapping| IdMap {
        first: mapping.host_id(),
        length: mapping.size(),
    };
    if uid.container_id() != 0 || gid.container_id() != 0 || map(uid) != map(gid) {
        return Err(invalid("must start at ID 0 and be the same as gidMappings"));
    }
    let map = map(uid);
    if map.length == 0 || map.first.checked_add(map.length).is_none() {
        return Err(invalid("is no range of IDs"));
    }
    Ok(Some(map))
}
