//! NRI events of the CRI's RPCs, and the application of the plugins' answers.
//!
//! Each RPC holds one [`Session`] from its event until its change is visible, so that a new plugin does not miss it. No session
//! is held across a long wait. If NRI is disabled or no plugin is registered, nothing is read and nothing waits. The transport
//! and the merging of answers are in [`crate::nri`].

mod container;
mod host;
mod messages;
mod pod;
mod updates;

pub(super) use container::{
    container_ended, create, notify_container, remove, start, undo_create, update, watch,
};
pub(super) use pod::{notify_pod, remove_pod, run_pod, stop_pod, update_pod};

use super::error::ServiceError;
use super::{Inner, Server, status_of};
use crate::nri::{Nri, Session, SessionError};
use crate::server::socket::SocketError;
use boxlite_runtime::ContainerState;
use host::NriHost;
use std::sync::Arc;
use tonic::Status;

impl Server {
    /// Starts NRI as configured. Must be called once, before the first request.
    pub(crate) async fn start_nri(&self) -> Result<(), SocketError> {
        let host = Arc::new(NriHost(Arc::downgrade(&self.0)));
        let nri = Nri::start(&self.config.nri, host).await?;
        let ended = self.runtime.containers().into_iter();
        nri.mark_stopped(
            ended
                .filter(|container| container.state == ContainerState::Exited)
                .map(|container| container.id),
        );
        // A second start is a bug of the caller and changes nothing.
        let _ = self.nri.set(nri);
        for pod in self.runtime.handles() {
            for container in pod.containers() {
                if container.state == ContainerState::Running {
                    watch(self, &pod, &container.id);
                }
            }
        }
        Ok(())
    }

    /// Stops NRI. Must be called after the last request.
    pub(crate) async fn stop_nri(&self) {
        self.nri_registry().stop().await;
    }

    fn nri_registry(&self) -> Nri {
        self.nri.get().cloned().unwrap_or_default()
    }

    /// Begins a session for an RPC; see [`Nri::begin_session`].
    pub(super) async fn session(&self) -> Session {
        self.nri_registry().begin_session().await
    }
}

/// Returns the status of a call that a plugin rejected.
fn rejected(error: SessionError) -> Status {
    ServiceError::Plugin(error).into()
}
