//! [`Source`]: where output comes from and where acknowledgements go: the guest, or a test.
//!
//! Offsets, reconnects and doubled chunks are the Portal's OutputFollower's.

use crate::pod::Guest;
use async_trait::async_trait;
use boxlite_portal::{ExecutionInterface, OutputChunk, OutputFollower, PortalError};

/// A process's output, each byte once and in order.
#[async_trait]
pub trait Source: Send + 'static {
    /// How its output is acknowledged.
    type Acker: Acker;
    /// The next chunk, None after the last. May be dropped between polls: nothing is lost. After an error that
    /// `is_transport` it may be called again.
    async fn next(&mut self) -> Result<Option<OutputChunk>, PortalError>;
    /// How its output is acknowledged.
    fn acker(&self) -> Self::Acker;
}

/// Frees output in the guest.
#[async_trait]
pub trait Acker: Send + Sync + 'static {
    /// Everything below `offset` is where it belongs.
    async fn ack(&self, offset: u64) -> Result<(), PortalError>;
}

/// The real source.
pub struct GuestSource {
    execution: ExecutionInterface,
    follower: OutputFollower,
    container: String,
    exec: String,
}

impl GuestSource {
    /// The output of a process of `guest` from its first byte.
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

/// The real acknowledger.
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
            // The follower has given up; a fresh one goes on where it stood.
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
