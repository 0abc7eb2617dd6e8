//! [`ContainerError`]: the errors of all operations on containers.

use crate::cgroup::error::CgroupError;
use crate::spawner::{SpawnError, UserError};
use crate::storage::StorageError;
use crate::system::SystemError;
use std::io;
use std::sync::Arc;

/// An error of an operation on a container.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The container or exec does not exist.
    #[error("{what} {id:?} not found")]
    NotFound { what: &'static str, id: String },
    /// The container is in a state that does not allow the operation.
    #[error("container {id} is {state}: cannot {action}")]
    WrongState {
        id: String,
        state: &'static str,
        action: &'static str,
    },
    /// A field of the request is invalid.
    #[error("invalid {field}: {reason}")]
    Invalid { field: &'static str, reason: String },
    /// A limit of the agent is reached.
    #[error("too many {what} (maximum {limit})")]
    Limit { what: &'static str, limit: usize },
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    System(#[from] SystemError),
    /// A failed system call not covered by the other variants.
    #[error("{step}")]
    Step {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// The kernel killed the init process for lack of memory while it was set up.
    #[error(
        "the init process was OOM-killed before its start: the memory limit of the container or of the pod is too low"
    )]
    OutOfMemory,
    /// The pod has not been initialized.
    #[error("the guest is not initialized")]
    NoPod,
    /// An operation shared with an earlier call failed there.
    #[error(transparent)]
    Shared(#[from] Arc<ContainerError>),
}

impl ContainerError {
    pub fn step(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Step { step, source }
    }
}
