//! [`FilesystemLayout`]: the paths below the runtime's two roots.
//!
//! Ids become path components only after [`check_id`]. Directories are 0700: bundles contain environment variables, and
//! sockets give access to guests. Names inside a bundle's `vm/` are defined in `boxlite_proto::names`. Paths below
//! [`FilesystemLayout::images`] are built by the image store.

use crate::error::{Result, RuntimeError};
use boxlite_proto::names;
use boxlite_sys::unix_socket::MAX_SOCKET_PATH_BYTES;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Maximum length of the `state` path: the path of the shim's socket, `<state>/s/<64 hex digits>`, must fit into a socket
/// address.
pub const MAX_STATE_PATH_BYTES: usize = MAX_SOCKET_PATH_BYTES - "/s/".len() - 64;
/// Maximum length of a box or container id.
const MAX_ID_BYTES: usize = 128;

/// Paths below the two roots.
#[derive(Debug, Clone)]
pub struct FilesystemLayout {
    root: PathBuf,
    state: PathBuf,
    scratch: PathBuf,
}

impl FilesystemLayout {
    /// Returns the layout of these two roots, without creating anything.
    ///
    /// # Errors
    /// `InvalidArgument` if a root is relative or `state` is longer than [`MAX_STATE_PATH_BYTES`].
    pub fn new(root: &Path, state: &Path) -> Result<Self> {
        for (field, path) in [("root", root), ("state", state)] {
            if !path.is_absolute() {
                return Err(RuntimeError::InvalidArgument {
                    field,
                    value: path.display().to_string(),
                    reason: "not an absolute path".into(),
                });
            }
        }
        let length = state.as_os_str().len();
        if length > MAX_STATE_PATH_BYTES {
            return Err(RuntimeError::InvalidArgument {
                field: "state",
                value: state.display().to_string(),
                reason: format!(
                    "{length} bytes long, but sockets below it allow at most {MAX_STATE_PATH_BYTES}"
                ),
            });
        }
        Ok(Self {
            root: root.to_owned(),
            state: state.to_owned(),
            scratch: Self::default_scratch_dir(root),
        })
    }

    /// Returns the directory of the scratch disks unless another one is configured.
    pub fn default_scratch_dir(root: &Path) -> PathBuf {
        root.join("scratch")
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
                reason: "not an absolute path".into(),
            });
        }
        directory.clone_into(&mut self.scratch);
        Ok(self)
    }

    /// Creates the directories with mode 0700. Blocks briefly.
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

    /// Returns the persistent root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the root of the present boot.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Returns the database file.
    pub fn database(&self) -> PathBuf {
        self.root.join("runtime.db")
    }

    /// Returns the directory of the copies of the database's rows.
    pub fn record_copies(&self) -> PathBuf {
        self.state.join("records")
    }

    /// Returns the file that locks the roots against a second runtime.
    pub fn lock(&self) -> PathBuf {
        self.root.join("runtime.lock")
    }

    /// Returns the directory of the image store.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// Returns the cache of the VMM probe.
    pub fn probe_cache(&self) -> PathBuf {
        self.root.join("vmm-probe.json")
    }

    /// Returns the socket to which shims publish events.
    pub fn events_socket(&self) -> PathBuf {
        self.state.join("events.ttrpc")
    }

    /// Returns the file by which shims notice directories that several pods write to.
    pub fn volume_writers(&self) -> PathBuf {
        self.state.join(names::VOLUME_WRITERS)
    }

    /// Returns the file in which shims lock the user ids of their VMs.
    pub fn vmm_users(&self) -> PathBuf {
        self.state.join(names::VMM_USERS)
    }

    /// Returns the path passed to shims as containerd's address. No process serves it, but shims place sockets next to it.
    pub fn containerd_address(&self) -> PathBuf {
        self.state.join("containerd.sock")
    }

    /// Returns the directory of the scratch disks, which hold the writable layers. On disk, unlike `state`: they may grow to gigabytes.
    pub fn scratch_dir(&self) -> &Path {
        &self.scratch
    }

    /// Returns the scratch disk of a box.
    pub fn scratch(&self, box_id: &str) -> PathBuf {
        self.scratch.join(names::scratch_file(box_id))
    }

    /// Returns the directory of all bundles.
    pub fn boxes(&self) -> PathBuf {
        self.state.join("s")
    }

    /// Returns the bundle of a box, which is its shim's working directory.
    pub fn bundle(&self, box_id: &str) -> PathBuf {
        self.boxes().join(box_id)
    }

    /// Returns the file with the address of a box's shim, a convention of containerd.
    pub fn shim_address(&self, box_id: &str) -> PathBuf {
        self.bundle(box_id).join("address")
    }

    /// Returns the state file of a box's shim, which exists until the shim has ended in order or was cleaned up after.
    pub fn shim_state(&self, box_id: &str) -> PathBuf {
        self.bundle(box_id).join(names::SHIM_STATE)
    }

    /// Returns the file that marks the bundle of a VM without a pod.
    pub fn warm_marker(&self, box_id: &str) -> PathBuf {
        self.bundle(box_id).join("warm")
    }

    /// Returns the VM's private directory.
    pub fn vm(&self, box_id: &str) -> PathBuf {
        self.bundle(box_id).join("vm")
    }

    /// Returns the unix socket to the guest.
    pub fn vsock(&self, box_id: &str) -> PathBuf {
        self.vm(box_id).join(names::VSOCK_SOCKET)
    }

    /// Returns the shim's log.
    pub fn shim_log(&self, box_id: &str) -> PathBuf {
        self.bundle(box_id).join(names::SHIM_LOG)
    }

    /// Returns the older part of the shim's log.
    pub fn old_shim_log(&self, box_id: &str) -> PathBuf {
        self.bundle(box_id).join(names::OLD_SHIM_LOG)
    }

    /// Returns the log of the guest's console.
    pub fn console(&self, box_id: &str) -> PathBuf {
        self.vm(box_id).join(names::CONSOLE_LOG)
    }

    /// Returns the directory of a box's container bundles.
    pub fn containers(&self, box_id: &str) -> PathBuf {
        self.bundle(box_id).join("c")
    }

    /// Returns the bundle of a container.
    pub fn container_bundle(&self, box_id: &str, container_id: &str) -> PathBuf {
        self.containers(box_id).join(container_id)
    }

    /// Returns the OCI spec of a container.
    pub fn container_config(&self, box_id: &str, container_id: &str) -> PathBuf {
        self.container_bundle(box_id, container_id)
            .join("config.json")
    }
}

/// Checks that `id` is safe as a path component: letters, digits, `-` and `_` only.
///
/// # Errors
/// `InvalidArgument`.
pub fn check_id(field: &'static str, id: &str) -> Result<()> {
    let good = !id.is_empty()
        && id.len() <= MAX_ID_BYTES
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if good {
        return Ok(());
    }
    Err(RuntimeError::InvalidArgument {
        field,
        value: id.chars().take(MAX_ID_BYTES).collect(),
        reason: format!("must be 1 to {MAX_ID_BYTES} letters, digits, '-' or '_'"),
    })
}

/// Creates `directory` and its parents, and sets its mode to 0700. Blocks briefly.
///
/// # Errors
/// `Io`.
pub fn private_directory(directory: &Path) -> Result<()> {
    let io = |source| RuntimeError::Io {
        operation: "create directory",
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

/// Removes a file; succeeds if it does not exist. Blocks.
///
/// # Errors
/// `Io`.
pub fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(RuntimeError::Io {
            operation: "remove",
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

/// Removes a directory tree; succeeds if it does not exist. Blocks.
///
/// # Errors
/// `Io`.
pub fn remove_tree(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(RuntimeError::Io {
            operation: "remove",
            path: path.to_owned(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prepare_creates_private_roots() {
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
        let long = PathBuf::from(format!("/{}", "s".repeat(MAX_STATE_PATH_BYTES)));
        assert!(FilesystemLayout::new(Path::new("/r"), &long).is_err());
        let layout = FilesystemLayout::new(Path::new("/r"), Path::new("/s")).unwrap();
        assert_eq!(layout.scratch("id"), Path::new("/r/scratch/id.img"));
        assert!(layout.clone().with_scratch_dir(Path::new("d")).is_err());
        let layout = layout.with_scratch_dir(Path::new("/d")).unwrap();
        assert_eq!(layout.scratch("id"), Path::new("/d/id.img"));
    }

    #[test]
    fn check_id_rejects_unsafe_components() {
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a\0b",
            &"a".repeat(MAX_ID_BYTES + 1),
            "é",
        ] {
            assert!(check_id("id", bad).is_err(), "{bad:?}");
        }
        check_id("id", &"0af3".repeat(16)).unwrap();
    }
}
