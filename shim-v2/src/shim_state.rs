//! [`ShimState`]: the file in the bundle from which `delete` cleans up after a crash.
//!
//! Processes are identified by pid and start time, since the kernel reuses pids. The daemon writes the file, `delete`
//! reads it.

use boxlite_sys::process::ProcessId;
use boxlite_sys::replace_file::replace;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};

/// Name of the state file in the bundle.
pub const STATE_FILE: &str = boxlite_proto::names::SHIM_STATE;
/// Name of the file with the shim's address in the bundle, a convention of containerd.
pub const ADDRESS_FILE: &str = "address";

/// Version of the state file's format. Increased only if a field changes its meaning: `delete` of another release ignores
/// unknown fields and uses defaults for missing ones.
pub const STATE_VERSION: u32 = 1;

/// Resources of a shim that outlive its process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct ShimState {
    /// [`STATE_VERSION`] of the release that wrote the file; 0 before versions were recorded.
    pub version: u32,
    /// The shim daemon.
    pub shim: Option<ProcessId>,
    /// The VMM child.
    pub vmm: Option<ProcessId>,
    /// Path of the shim's socket.
    pub socket: PathBuf,
    /// Cgroup directories that the shim created, parents first.
    pub cgroups: Vec<PathBuf>,
    /// Network namespace of the pod, which contains the shim's taps.
    pub netns: Option<PathBuf>,
    /// Scratch disk.
    pub scratch: Option<PathBuf>,
    /// Source name of the mount exports on the host. The alias is the key of earlier builds.
    #[serde(alias = "shown")]
    pub exports: String,
}

impl ShimState {
    /// Loads the state of a bundle; None if there is no readable state (for example after a crash before the first write).
    pub fn load(bundle: &Path) -> Option<Self> {
        let bytes = std::fs::read(bundle.join(STATE_FILE)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Stores the state atomically, readable by root only.
    ///
    /// # Errors
    /// The bundle cannot be written.
    pub fn store(&self, bundle: &Path) -> io::Result<()> {
        let state = Self {
            version: STATE_VERSION,
            ..self.clone()
        };
        write_atomically(
            &bundle.join(STATE_FILE),
            &serde_json::to_vec_pretty(&state)?,
        )
    }

    /// Removes the state and address files after an orderly end.
    pub fn remove(bundle: &Path) {
        for name in [STATE_FILE, ADDRESS_FILE] {
            // After a failure the next `delete` removes them.
            drop(std::fs::remove_file(bundle.join(name)));
        }
    }
}

/// Writes a file of a bundle with mode 0600 atomically, by a temporary file beside it.
///
/// # Errors
/// The directory cannot be written.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    replace(path, Path::new(&draft), bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_state_loads_unchanged() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert!(ShimState::load(dir.path()).is_none());
        let state = ShimState {
            version: STATE_VERSION,
            shim: ProcessId::of(std::process::id() as i32),
            vmm: None,
            socket: "/run/x".into(),
            cgroups: vec!["/sys/fs/cgroup/x".into()],
            netns: Some("/run/netns/x".into()),
            scratch: Some("/var/x.img".into()),
            exports: "boxlite:x".to_owned(),
        };
        state.store(dir.path()).expect("stored");
        assert_eq!(ShimState::load(dir.path()), Some(state));
    }

    #[test]
    fn load_accepts_older_and_newer_releases() {
        let dir = tempfile::tempdir().expect("tempdir");
        let write =
            |text: &str| std::fs::write(dir.path().join(STATE_FILE), text).expect("written");
        // Written by the first release: no version, boot id or scratch disk, and another key for the exports.
        write(
            r#"{"shim": {"pid": 7, "start_time": 9}, "vmm": null, "socket": "/run/x", "cgroups": [], "netns": null, "shown": "boxlite:x"}"#,
        );
        let state = ShimState::load(dir.path()).expect("loads");
        assert_eq!(
            (state.version, state.socket.as_path()),
            (0, Path::new("/run/x"))
        );
        assert_eq!(state.exports, "boxlite:x");
        assert_eq!(state.shim.map(|shim| shim.pid), Some(7));
        // Written by a later release, with unknown fields and without some of ours.
        write(r#"{"version": 9, "socket": "/run/y", "cgroups": ["/c"], "passt": {"pid": 3}}"#);
        let state = ShimState::load(dir.path()).expect("loads");
        assert_eq!((state.version, state.cgroups.len()), (9, 1));
    }
}
