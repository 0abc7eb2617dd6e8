//! [`Guest`]: a handle to a running guest.

use super::Share;
use crate::error::{Result, ShimError};
use boxlite_portal::{GuestSession, PortalError};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// A running guest, as containers use it.
#[derive(Clone)]
pub struct Guest {
    /// Calls into it.
    pub session: GuestSession,
    /// Its share.
    pub share: Arc<dyn Share>,
    /// Cancelled as soon as the VM has ended.
    pub ended: CancellationToken,
}

impl Guest {
    /// Awaits a call into the guest, and fails at once if the VM ends meanwhile.
    ///
    /// # Errors
    /// The guest's error, or VmGone.
    pub async fn call<T>(
        &self,
        call: impl Future<Output = std::result::Result<T, PortalError>>,
    ) -> Result<T> {
        tokio::select! {
            biased;
            result = call => match result {
                Err(error) if error.is_transport() && self.ended.is_cancelled() => Err(self.gone()),
                other => other.map_err(ShimError::from),
            },
            () = self.ended.cancelled() => Err(self.gone()),
        }
    }

    fn gone(&self) -> ShimError {
        ShimError::VmGone {
            reason: "during the call".to_owned(),
        }
    }
}
