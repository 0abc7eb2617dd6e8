//! The vmm child's jail: its own mount, IPC and UTS namespaces, a root with only the listed host files, few capabilities.
//!
//! The PID namespace is created by the supervisor before the fork; the network namespace is entered by [`enter_netns`] before
//! the VMM opens its tap. Called once, in a single-threaded process.
//!
//! ```text
//! enter_netns → Vmm::create (sees the host) → close: namespaces → root → pivot_root → user namespace → capabilities,
//! no_new_privs, Landlock, seccomp
//! ```

mod host_files;
mod landlock_rules;
mod privileges;
mod root;
mod seccomp;
mod user_namespace;

pub use host_files::{HostFiles, ProcFiles};
pub use landlock_rules::restrict;
pub use privileges::{
    become_user, drop_all_capabilities, forbid_core_dumps, forbid_new_privileges, limit_files,
    limit_resources, raise_file_limit,
};
pub use seccomp::{Process, allow_only, with_filter};

use nix::sched::{CloneFlags, setns, unshare};
use std::path::{Path, PathBuf};
use user_namespace::UserNamespace;

/// Error while setting up the jail. The VM is not started then.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A system call without a path failed.
    #[error("failed to {step} for the jail")]
    System {
        step: &'static str,
        #[source]
        source: nix::Error,
    },
    /// A system call on a host path failed.
    #[error("failed to {step} {path} for the jail")]
    Path {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Capabilities could not be changed.
    #[error("failed to reduce capabilities")]
    Capabilities(#[source] caps::errors::CapsError),
    /// Landlock's rules could not be applied.
    #[error("failed to apply Landlock's rules")]
    Landlock(#[source] landlock::RulesetError),
    /// The system call filter could not be installed.
    #[error("failed to install the system call filter")]
    Seccomp(#[source] seccompiler::Error),
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

/// Moves the calling thread, in a single-threaded process, into a network namespace.
///
/// # Errors
/// The path is not a network namespace, or the process lacks the privilege.
pub fn enter_netns(path: &Path) -> Result<(), JailError> {
    let file = std::fs::File::open(path).map_err(at_path("open network namespace", path))?;
    setns(file, CloneFlags::CLONE_NEWNET).map_err(at_path("enter network namespace", path))
}

/// Enters the jail: afterwards this process sees `files` under their own names and nothing else of the host, its working
/// directory is `files.work_dir`, it holds only the capabilities of a file
/// server, and a system call filter is in force.
///
/// # Errors
/// The failed step. The process is in an undefined state then and must exit.
pub fn close(files: &HostFiles) -> Result<(), JailError> {
    let users = UserNamespace::prepare()?;
    let namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(namespaces).map_err(system("unshare namespaces"))?;
    root::enter(files)?;
    users.enter()?;
    privileges::reduce()?;
    privileges::forbid_tracing()?;
    landlock_rules::scope()?;
    seccomp::install()
}
