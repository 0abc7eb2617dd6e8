//! ID mappings of a spec's mounts, for volumes of containers in a user namespace.

use crate::error::{Result, ShimError};
use crate::share::idmap::IdMap;
use oci_spec::runtime::{LinuxIdMapping, Mount};

/// Returns the mapping of a mount: one range from 0, the same for users and groups. None if it has no mapping.
///
/// # Errors
/// Invalid for other mappings.
pub(crate) fn mapping(mount: &Mount) -> Result<Option<IdMap>> {
    let list = |mappings: &Option<Vec<LinuxIdMapping>>| mappings.clone().unwrap_or_default();
    let (uids, gids) = (list(mount.uid_mappings()), list(mount.gid_mappings()));
    if uids.is_empty() && gids.is_empty() {
        return Ok(None);
    }
    match uids.as_slice() {
        [one] if uids == gids && one.container_id() == 0 => Ok(Some(IdMap {
            first: one.host_id(),
            length: one.size(),
        })),
        _ => Err(ShimError::Invalid {
            field: "mounts.uidMappings",
            reason: format!(
                "{}: must be a single range from 0, equal to gidMappings",
                mount.destination().display()
            ),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn mount(uids: serde_json::Value, gids: serde_json::Value) -> Mount {
        serde_json::from_value(
            json!({"destination": "/v", "source": "/srv", "uidMappings": uids, "gidMappings": gids}),
        )
        .expect("a mount")
    }

    #[test]
    fn mapping_accepts_one_range_for_users_and_groups() {
        let range = json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
        let other = json!([{"containerID": 0, "hostID": 2000, "size": 10}]);
        let two = json!([{"containerID": 0, "hostID": 1, "size": 1}, {"containerID": 1, "hostID": 5, "size": 1}]);
        let map = mapping(&mount(range.clone(), range.clone())).expect("valid");
        assert_eq!(map.map(|map| (map.first, map.length)), Some((1000, 10)));
        assert_eq!(
            mapping(&mount(json!(null), json!(null))).expect("valid"),
            None
        );
        for (uids, gids) in [(range, other), (two.clone(), two)] {
            let error = mapping(&mount(uids, gids))
                .expect_err("refused")
                .to_string();
            assert!(error.contains("/v"), "{error}");
        }
    }
}
