//! User namespaces: the ID mapping of a pod, validated by containerd's rules, for the containers' specs.
//!
//! The mapping is between a container and its VM: "host IDs" are users of the guest's kernel and have no meaning on
//! the host. Volumes are additionally mapped by the host, per mount (see `spec::mounts`).

use super::ConvertError;
use boxlite_proto::cri::v1::{IdMapping, NamespaceMode, NamespaceOption, UserNamespace};
use serde_json::{Value, json};

const FIELD: &str = "namespace_options.userns_options";

/// The range of IDs that maps users and groups of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// First ID in the VM, which is 0 in the container.
    pub host_id: u32,
    /// Number of IDs.
    pub length: u32,
}

impl Mapping {
    /// Returns the OCI mapping.
    pub(crate) fn oci(self) -> Value {
        json!([{"containerID": 0, "hostID": self.host_id, "size": self.length}])
    }
}

/// Validates namespace options. The node's network is reached through the VMM (docs/networking.md); the node's PIDs
/// and IPC objects are represented by those of the VM (docs/security.md).
pub(crate) fn check_namespaces(options: Option<&NamespaceOption>) -> Result<(), ConvertError> {
    let Some(options) = options else {
        return Ok(());
    };
    let node = NamespaceMode::Node as i32;
    let mapping = mapping(options.userns_options.as_ref())?;
    if mapping.is_some() && (options.pid == node || options.ipc == node) {
        return Err(ConvertError::invalid(
            FIELD,
            "POD",
            "cannot be combined with the node's PID or IPC namespace",
        ));
    }
    Ok(())
}

/// Returns the mapping of a pod; `None` if it shares the VM's user namespace.
pub(crate) fn mapping(options: Option<&UserNamespace>) -> Result<Option<Mapping>, ConvertError> {
    let Some(options) = options else {
        return Ok(None);
    };
    let fail = |value: String, reason: &str| Err(ConvertError::invalid(FIELD, value, reason));
    let (uids, gids) = (&options.uids, &options.gids);
    match NamespaceMode::try_from(options.mode) {
        Ok(NamespaceMode::Node) if uids.is_empty() && gids.is_empty() => Ok(None),
        Ok(NamespaceMode::Node) => fail("NODE".into(), "must have no mappings"),
        Ok(NamespaceMode::Pod) => {
            let [uid] = uids.as_slice() else {
                return fail(
                    format!("POD, {} uid mappings", uids.len()),
                    "must have exactly one mapping of users",
                );
            };
            if gids.as_slice() != uids.as_slice() {
                return fail(
                    "POD".into(),
                    "must map users and groups by one and the same mapping",
                );
            }
            one(uid).map(Some)
        }
        Ok(mode) => fail(
            mode.as_str_name().to_owned(),
            "only POD and NODE are user namespace modes",
        ),
        Err(_) => fail(options.mode.to_string(), "not a namespace mode"),
    }
}

fn one(mapping: &IdMapping) -> Result<Mapping, ConvertError> {
    let IdMapping {
        host_id,
        container_id,
        length,
    } = *mapping;
    let value = format!("{container_id}:{host_id}:{length}");
    if container_id != 0 {
        return Err(ConvertError::invalid(
            FIELD,
            value,
            "must map the container's ID 0",
        ));
    }
    // The kernel reserves the highest ID, (u32)-1.
    if length == 0 || host_id.checked_add(length).is_none() {
        return Err(ConvertError::invalid(
            FIELD,
            value,
            "must map at least one ID, and none beyond 4294967294",
        ));
    }
    Ok(Mapping { host_id, length })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(container_id: u32, host_id: u32, length: u32) -> IdMapping {
        IdMapping {
            container_id,
            host_id,
            length,
        }
    }

    fn of(
        mode: NamespaceMode,
        uids: Vec<IdMapping>,
        gids: Vec<IdMapping>,
    ) -> Result<Option<Mapping>, ConvertError> {
        mapping(Some(&UserNamespace {
            mode: mode as i32,
            uids,
            gids,
        }))
    }

    #[test]
    fn equal_mapping_from_zero_is_accepted() {
        let good = vec![ids(0, 1000, 100_000)];
        assert_eq!(
            of(NamespaceMode::Pod, good.clone(), good.clone()),
            Ok(Some(Mapping {
                host_id: 1000,
                length: 100_000
            }))
        );
        assert_eq!(of(NamespaceMode::Node, vec![], vec![]), Ok(None));
        assert_eq!(mapping(None), Ok(None));
    }

    #[test]
    fn invalid_mappings_are_rejected_by_name() {
        let good = || vec![ids(0, 1000, 10)];
        for (mode, uids, gids, word) in [
            (NamespaceMode::Pod, vec![], vec![], "exactly one"),
            (
                NamespaceMode::Pod,
                vec![ids(0, 1, 2), ids(2, 5, 2)],
                good(),
                "exactly one",
            ),
            (
                NamespaceMode::Pod,
                good(),
                vec![ids(0, 2000, 10)],
                "one and the same",
            ),
            (NamespaceMode::Pod, good(), vec![], "one and the same"),
            (
                NamespaceMode::Pod,
                vec![ids(1, 1000, 10)],
                vec![ids(1, 1000, 10)],
                "ID 0",
            ),
            (
                NamespaceMode::Pod,
                vec![ids(0, 1000, 0)],
                vec![ids(0, 1000, 0)],
                "at least one",
            ),
            (
                NamespaceMode::Pod,
                vec![ids(0, u32::MAX, 2)],
                vec![ids(0, u32::MAX, 2)],
                "beyond",
            ),
            (NamespaceMode::Node, good(), vec![], "no mappings"),
            (NamespaceMode::Container, vec![], vec![], "CONTAINER"),
            (NamespaceMode::Target, good(), good(), "TARGET"),
        ] {
            let error = of(mode, uids, gids).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
