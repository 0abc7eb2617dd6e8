//! Volumes of containers in a user namespace: a spec's mounts that have ID mappings get an ID-mapped copy of their source.
//!
//! The copies are mounted once for each source and mapping, in the sandbox's bundle and in this shim's own mount namespace,
//! and stay until the shim ends: containers of the pod that share a volume share the copy, and with it the guest's caches.

use crate::error::{Result, ShimError};
use crate::share::idmap::{self, IdMap};
use oci_spec::runtime::{LinuxIdMapping, Mount, Spec};
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::Mutex;

/// Name of the directory of copies, in the sandbox's bundle.
const DIRECTORY: &str = "idmap";

/// The copies that are mounted. An async lock: held while one is being mounted, so that a second user waits for it.
#[derive(Clone, Default)]
pub struct MappedVolumes(Arc<Mutex<HashSet<PathBuf>>>);

impl MappedVolumes {
    /// Redirects the spec's mapped mounts to copies below `bundle`, the sandbox's. Dropped midway, it leaves a copy that
    /// the next container uses or that goes with the shim.
    ///
    /// # Errors
    /// HostPath, naming the path and the mount that wants it; Invalid for mappings that are not one range from 0.
    pub async fn redirect(&self, spec: &mut Spec, bundle: &Path) -> Result<()> {
        for mount in spec.mounts_mut().iter_mut().flatten() {
            let Some(map) = wanted(mount)? else {
                continue;
            };
            let source = mount.source().clone().unwrap_or_default();
            let refuse = |error: std::io::Error| ShimError::HostPath {
                path: source.clone(),
                wanted_for: format!("mount {}", mount.destination().display()),
                reason: format!("its owners cannot be mapped for the user namespace: {error}"),
            };
            let copy = self
                .copy(&source, bundle.join(DIRECTORY), map)
                .await
                .map_err(refuse)?;
            mount.set_source(Some(copy));
            mount.set_uid_mappings(None).set_gid_mappings(None);
        }
        Ok(())
    }

    /// The copy of `source`, mounted unless it is.
    async fn copy(
        &self,
        source: &Path,
        directory: PathBuf,
        map: IdMap,
    ) -> std::io::Result<PathBuf> {
        let mut present = self.0.lock().await;
        let known = present.clone();
        let source = source.to_owned();
        let work = move || -> std::io::Result<PathBuf> {
            let source = std::fs::canonicalize(&source)?;
            let metadata = std::fs::metadata(&source)?;
            let mut hash = Sha256::new();
            for number in [
                metadata.dev(),
                metadata.ino(),
                u64::from(map.first),
                u64::from(map.length),
            ] {
                hash.update(number.to_le_bytes());
            }
            hash.update(source.as_os_str().as_encoded_bytes());
            let target = directory.join(hex::encode(hash.finalize()));
            if known.contains(&target) {
                return Ok(target);
            }
            if metadata.is_dir() {
                std::fs::create_dir_all(&target)?;
            } else {
                std::fs::create_dir_all(&directory)?;
                std::fs::File::create(&target)?;
            }
            idmap::mount(&source, &target, map)?;
            Ok(target)
        };
        let target = tokio::task::spawn_blocking(work)
            .await
            .map_err(std::io::Error::other)??;
        present.insert(target.clone());
        Ok(target)
    }
}

/// The mapping of a mount: one range from 0, the same for users and groups.
fn wanted(mount: &Mount) -> Result<Option<IdMap>> {
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
                "{}: must be one range from 0, and so gidMappings",
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
    fn one_range_for_users_and_groups() {
        let range = json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
        let other = json!([{"containerID": 0, "hostID": 2000, "size": 10}]);
        let two = json!([{"containerID": 0, "hostID": 1, "size": 1}, {"containerID": 1, "hostID": 5, "size": 1}]);
        let map = wanted(&mount(range.clone(), range.clone())).expect("valid");
        assert_eq!(map.map(|map| (map.first, map.length)), Some((1000, 10)));
        assert_eq!(
            wanted(&mount(json!(null), json!(null))).expect("valid"),
            None
        );
        for (uids, gids) in [(range, other), (two.clone(), two)] {
            let error = wanted(&mount(uids, gids)).expect_err("refused").to_string();
            assert!(error.contains("/v"), "{error}");
        }
    }
}
