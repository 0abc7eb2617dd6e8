//! The vmm child's jail: own mount, IPC and UTS namespace, a root of nothing but what the VMM listed, few capabilities.
//!
//! It starts nothing and knows no VMM. The PID namespace is made by the supervisor before the fork, the network
//! namespace entered by [`enter_netns`] before the VMM opens its tap. Called once, in a single-threaded process.
//!
//! ```text
//! enter_netns → Vmm::create (sees the host) → close: namespaces → root → pivot_root → capabilities, no_new_privs
//! ```

mod host_files;
mod privileges;
mod root;

pub use host_files::HostFiles;
pub use privileges::{drop_all_capabilities, raise_file_limit};

use nix::sched::{CloneFlags, setns, unshare};
use std::path::{Path, PathBuf};

/// Why the jail could not be closed. The VM is not started then.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A system call without a path of its own.
    #[error("jail: {step}")]
    System {
        step: &'static str,
        #[source]
        source: nix::Error,
    },
    /// A system call on a path of the host.
    #[error("jail: {step} {path}")]
    Path {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Capabilities could not be changed.
    #[error("jail: capabilities")]
    Capabilities(#[source] caps::errors::CapsError),
}

fn at_path<E: Into<std::io::Error>>(
    step: &'static str,
    path: &Path,
) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Path {
        step,
        path: path.to_owned(),
        source: source.into(),
    }
}

fn system(step: &'static str) -> impl FnOnce(nix::Error) -> JailError {
    move |source| JailError::System { step, source }
}

/// Moves this thread, and with it a single-threaded process, into a network namespace.
///
/// # Errors
/// The path is no network namespace, or this process may not enter it.
pub fn enter_netns(path: &Path) -> Result<(), JailError> {
    let file = std::fs::File::open(path).map_err(at_path("opening the network namespace", path))?;
    setns(file, CloneFlags::CLONE_NEWNET).map_err(at_path("entering the network namespace", path))
}

/// Closes the jail: afterwards this process sees `files` under their own names and nothing else of the host, its
/// working directory is `files.work_dir`, and it holds no capability beyond those a file server needs.
///
/// # Errors
/// Names the step. The process is in an undefined state then and must end.
pub fn close(files: &HostFiles) -> Result<(), JailError> {
    let namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(namespaces).map_err(system("unsharing namespaces"))?;
    root::enter(files)?;
    privileges::reduce()
}
