//! [`FilesystemLayout`]: every path the runtime uses, built here and nowhere else.
//!
//! Ids become path components only after [`check_id`]. Directories are 0700: bundles hold environment variables,
//! sockets hold the guest. What lies inside a bundle's `vm/` is named in `boxlite_proto::names` and written by the
//! shim.

use crate::error::{Result, RuntimeError};
use boxlite_proto::names;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Longest `state` path in bytes: the shim's socket is `<state>/s/<64 hex digits>` and must fit the 107 bytes of a
/// `sockaddr_un`.
pub const STATE_PATH_LIMIT: usize = 40;
/// Longest id of a box or container, in bytes.
const ID_LIMIT: usize = 128;

/// Paths below the two roots.
#[derive(Debug, Clone)]
pub struct FilesystemLayout {
    root: PathBuf,
    state: PathBuf,
    scratch: PathBuf,
}

impl FilesystemLayout {
    /// The layout of these two roots; touches nothing.
    ///
    /// # Errors
    /// `InvalidArgument` where a root is relative or `state` is longer than [`STATE_PATH_LIMIT`].
    pub fn new(root: &Path, state: &Path) -> Result<Self> {
        for (field, path) in [("root", root), ("state", state)] {
            if !path.is_absolute() {
                return Err(RuntimeError::InvalidArgument {
                    field,
                    value: path.display().to_string(),
                    reason: "it must be an absolute path".into(),
                });
            }
        }
        let length = state.as_os_str().len();
        if length > STATE_PATH_LIMIT {
            return Err(RuntimeError::InvalidArgument {
                field: "state",
                value: state.display().to_string(),
                reason: format!("{length} bytes; sockets below it allow {STATE_PATH_LIMIT}"),
            });
        }
        Ok(Self {
            root: root.to_owned(),
            state: state.to_owned(),
            scratch: root.join("scratch"),
        })
    }

    /// Moves the scratch disks to another directory than `<root>/scratch`.
    ///
    /// # Errors
    /// `InvalidArgument` if it is relative.
    pub fn with_scratch_dir(mut self, directory: &Path) -> Result<Self> {
        if !directory.is_absolute() {
            return Err(RuntimeError::InvalidArgument {
                field: "scratch_dir",
                value: directory.display().to_string(),
                reason: "it must be an absolute path".into(),
            });
        }
        directory.clone_into(&mut self.scratch);
        Ok(self)
    }

    /// Makes the roots, 0700. Opening a runtime does it once; blocking, short.
    ///
    /// # Errors
    /// `Io`.
    pub fn prepare(&self) -> Result<()> {
        let directories = [
            &self.root,
            &self.state,
            &self.boxes(),
            &self.images(),
            &self.scratch,
        ];
        for directory in directories {
            private_directory(directory)?;
        }
        Ok(())
    }

    /// Persistent root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Root of the present boot.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The database.
    pub fn database(&self) -> PathBuf {
        self.root.join("runtime.db")
    }

    /// Lock that keeps a second runtime off the same roots.
    pub fn lock(&self) -> PathBuf {
        self.root.join("runtime.lock")
    }

    /// The image store.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// What the vmm probe found out, kept.
    pub fn probe_cache(&self) -> PathBuf {
        self.root.join("vmm-probe.json")
    }

    /// Where shims send events.
    pub fn events_socket(&self) -> PathBuf {
        self.state.join("events.ttrpc")
    }

    /// What a shim is given as containerd's address; nobody serves there, but sockets are placed beside it.
    pub fn containerd_address(&self) -> PathBuf {
        self.state.join("containerd.sock")
    }

    /// Directory of the scratch disks, which hold the writable layers. On disk, unlike `state`: they may grow to gigabytes.
    pub fn scratch_dir(&self) -> &Path {
        &self.scratch
    }

    /// Scratch disk of a box.
    pub fn scratch(&self, box_id: &str) -> PathBuf {
        self.scratch.join(names::scratch_file(box_id))
    }

    /// All bundles.
    pub fn boxes(&self) -> PathBuf {
        self.state.join("s")
    }

    /// The bundle of a box: its shim's working directory.
    pub fn bundle(&self, box_id: &str) -> PathBuf {
        self.boxes().join(box_id)
    }

    /// The VM's private directory.
    pub fn vm(&self, box_id: &str) -> PathBuf {
        self.bundle(box_id).join("vm")
    }

    /// The unix socket to the guest.
    pub fn vsock(&self, box_id: &str) -> PathBuf {
        self.vm(box_id).join(names::VSOCK_SOCKET)
    }

    /// The guest's console.
    pub fn console(&self, box_id: &str) -> PathBuf {
        self.vm(box_id).join(names::CONSOLE_LOG)
    }

    /// The bundle of a container.
    pub fn container_bundle(&self, box_id: &str, container_id: &str) -> PathBuf {
        self.bundle(box_id).join("c").join(container_id)
    }

    /// The OCI spec in it.
    pub fn container_config(&self, box_id: &str, container_id: &str) -> PathBuf {
        self.container_bundle(box_id, container_id)
            .join("config.json")
    }
}

/// Whether `id` may be a path component and a key: hex digits, letters, `-`, `_`, and no dot.
///
/// # Errors
/// `InvalidArgument`.
pub fn check_id(field: &'static str, id: &str) -> Result<()> {
    let good = !id.is_empty()
        && id.len() <= ID_LIMIT
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if good {
        return Ok(());
    }
    Err(RuntimeError::InvalidArgument {
        field,
        value: id.chars().take(ID_LIMIT).collect(),
        reason: format!("an id is 1 to {ID_LIMIT} letters, digits, '-' or '_'"),
    })
}

/// Makes `directory` and what is above it, and takes everybody else's rights to it. Blocking, short.
///
/// # Errors
/// `Io`.
pub fn private_directory(directory: &Path) -> Result<()> {
    let io = |source| RuntimeError::Io {
        what: "cannot create directory",
        path: directory.to_owned(),
        source,
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(io)?;
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o700)).map_err(io)
}

/// Removes a file; succeeds if it does not exist. Blocking.
///
/// # Errors
/// `Io`.
pub fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(RuntimeError::Io {
            what: "cannot remove",
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

/// Removes a tree; succeeds where there is none. Blocking.
///
/// # Errors
/// `Io`.
pub fn remove_tree(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(RuntimeError::Io {
            what: "cannot remove",
            path: path.to_owned(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_private_and_checked() {
        let directory = tempfile::tempdir_in("/tmp").unwrap();
        let layout =
            FilesystemLayout::new(&directory.path().join("r"), &directory.path().join("s"))
                .unwrap();
        layout.prepare().unwrap();
        for path in [layout.root(), layout.state(), &layout.boxes()] {
            let mode = std::fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, 0o700);
        }
        assert!(FilesystemLayout::new(Path::new("r"), Path::new("/s")).is_err());
        let long = PathBuf::from(format!("/{}", "s".repeat(STATE_PATH_LIMIT)));
        assert!(FilesystemLayout::new(Path::new("/r"), &long).is_err());
        let layout = FilesystemLayout::new(Path::new("/r"), Path::new("/s")).unwrap();
        assert_eq!(layout.scratch("id"), Path::new("/r/scratch/id.img"));
        assert!(layout.clone().with_scratch_dir(Path::new("d")).is_err());
        let layout = layout.with_scratch_dir(Path::new("/d")).unwrap();
        assert_eq!(layout.scratch("id"), Path::new("/d/id.img"));
    }

    #[test]
    fn ids_cannot_leave_their_directory() {
        for bad in ["", ".", "..", "a/b", "a\0b", &"a".repeat(ID_LIMIT + 1), "é"] {
            assert!(check_id("id", bad).is_err(), "{bad:?}");
        }
        check_id("id", &"0af3".repeat(16)).unwrap();
    }
}
