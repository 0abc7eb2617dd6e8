//! [`CgroupRoot`]: a cgroup in every hierarchy of a machine with cgroup v1, for a kubelet that must not use the machine's
//! root cgroups.
//!
//! The program creates it inside the namespaces and moves itself into a child. The process outside removes it after every
//! process of the namespaces has ended.

use crate::failure::{During, Result};
use std::path::{Path, PathBuf};

const MOUNT: &str = "/sys/fs/cgroup";
/// Child for the program itself and everything that it starts.
const SYSTEM: &str = "system";

/// Cgroup of one run.
pub(crate) struct CgroupRoot {
    /// Absolute name in every hierarchy, `/boxlite-e2e-<scratch>`.
    pub name: String,
}

impl CgroupRoot {
    /// Creates the cgroups and moves this process into their child `system`.
    pub(crate) fn enter(scratch: &Path) -> Result<Self> {
        let name = name(scratch);
        for hierarchy in hierarchies()? {
            let root = hierarchy.join(&name);
            let system = root.join(SYSTEM);
            for (dir, parent) in [(&root, &hierarchy), (&system, &root)] {
                std::fs::create_dir_all(dir).during(dir.display())?;
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    if parent.join(file).exists() {
                        let value = std::fs::read(parent.join(file))?;
                        std::fs::write(dir.join(file), value).during(dir.display())?;
                    }
                }
            }
            std::fs::write(system.join("cgroup.procs"), std::process::id().to_string())
                .during(system.display())?;
        }
        Ok(Self {
            name: format!("/{name}"),
        })
    }
}

/// Removes the cgroups of the run with this scratch directory, if it created any.
pub(crate) fn remove(scratch: &Path) -> Result {
    // The shim makes its cgroups in the v2 hierarchy, too.
    for hierarchy in std::fs::read_dir(MOUNT)? {
        remove_tree(&hierarchy?.path().join(name(scratch)))?;
    }
    Ok(())
}

/// Returns the name of the cgroup of the run with this scratch directory.
pub(crate) fn name(scratch: &Path) -> String {
    let last = scratch.file_name().unwrap_or_default();
    format!("boxlite-e2e-{}", last.to_string_lossy())
}

/// Returns the mount points of the v1 hierarchies. The v2 hierarchy beside them has no controllers.
fn hierarchies() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(MOUNT)? {
        let path = entry?.path();
        let is_v1 = path.join("cgroup.procs").exists() && !path.join("cgroup.controllers").exists();
        if is_v1 && !path.is_symlink() {
            found.push(path);
        }
    }
    Ok(found)
}

/// Removes a cgroup and its descendants. Files of a cgroup go with its directory.
fn remove_tree(dir: &Path) -> Result {
    if !dir.exists() {
        return Ok(());
    }
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_tree(&path)?;
        }
    }
    std::fs::remove_dir(dir).during(dir.display())
}
