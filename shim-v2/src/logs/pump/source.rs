//! [`Source`]: the trait for output and its acknowledgement, implemented by the guest and by tests.
//!
//! The Portal's OutputFollower handles offsets, reconnects and duplicate chunks.

use crate::pod::Guest;
use async_trait::async_trait;
use boxlite_portal::{ExecutionInterface, OutputChunk, OutputFollower, PortalError};

/// Output of a process, each byte once and in order.
#[async_trait]
pub trait Source: Send + 'static {
    /// Type that acknowledges the output.
    type Acker: Acker;
    /// Returns the next chunk, or None after the last. Cancel safe. May be called again after a transport error.
    async fn next(&mut self) -> Result<Option<OutputChunk>, PortalError>;
    /// Returns the acknowledger of this output.
    fn acker(&self) -> Self::Acker;
}

/// Frees output in the guest.
#[async_trait]
pub trait Acker: Send + Sync + 'static {
    /// Acknowledges the output below `offset`.
    async fn ack(&self, offset: u64) -> Result<(), PortalError>;
}

/// Output of a process in the guest.
pub struct GuestSource {
    execution: ExecutionInterface,
    follower: OutputFollower,
    container: String,
    exec: String,
}

impl GuestSource {
    /// Creates the source for a process of `guest`, from its first byte.
    pub fn new(guest: &Guest, container: &str, exec: &str) -> Self {
        let execution = guest.session.execution();
        Self {
            follower: execution.follow(container, exec, 0),
            execution,
            container: container.to_owned(),
            exec: exec.to_owned(),
        }
    }
}

/// Acknowledger of a process in the guest.
pub struct GuestAcker {
    execution: ExecutionInterface,
    container: String,
    exec: String,
}

#[async_trait]
impl Source for GuestSource {
    type Acker = GuestAcker;

    async fn next(&mut self) -> Result<Option<OutputChunk>, PortalError> {
        let result = self.follower.next().await;
        if result.as_ref().is_err_and(PortalError::is_transport) {
            // The follower has given up; a new one resumes at its position.
            let position = self.follower.position();
            self.follower = self.execution.follow(&self.container, &self.exec, position);
        }
        result
    }

    fn acker(&self) -> GuestAcker {
        GuestAcker {
            execution: self.execution.clone(),
            container: self.container.clone(),
            exec: self.exec.clone(),
        }
    }
}

#[async_trait]
impl Acker for GuestAcker {
    async fn ack(&self, offset: u64) -> Result<(), PortalError> {
        self.execution
            .ack(&self.container, &self.exec, offset)
            .await
    }
}
