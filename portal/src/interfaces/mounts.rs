//! [`MountsInterface`]: the Mounts service: mounts that containers export to the host, and their files;
//! copies of volumes in the guest.
//!
//! Used by the shim on dedicated connections. The shim decides which mounts appear and where.

use super::{LONG_CALL_TIMEOUT, QUICK_CALL_TIMEOUT, unary};
use crate::error::PortalError;
use boxlite_proto::boxlite::v1::mounts_client::MountsClient;
use boxlite_proto::boxlite::v1::{
    FuseRequest, FuseResponse, RefreshRequest, WatchExportsRequest, WatchExportsResponse,
};
use boxlite_proto::names;
use tonic::Streaming;
use tonic::transport::Channel;

/// Typed client of the Mounts service.
#[derive(Debug, Clone)]
pub struct MountsInterface {
    client: MountsClient<Channel>,
}

impl MountsInterface {
    pub(crate) fn new(channel: Channel) -> Self {
        let client = MountsClient::new(channel)
            .max_decoding_message_size(names::MAX_GUEST_MESSAGE_BYTES)
            .max_encoding_message_size(names::MAX_GUEST_MESSAGE_BYTES);
        Self { client }
    }

    /// Subscribes to the list of mounts, which is sent initially and after every change; `outgoing` reports the lists
    /// that the host has applied.
    ///
    /// # Errors
    /// Every kind of [`PortalError`]; the stream itself has no deadline.
    pub async fn watch_exports<S>(
        &self,
        outgoing: S,
    ) -> Result<Streaming<WatchExportsResponse>, PortalError>
    where
        S: futures::Stream<Item = WatchExportsRequest> + Send + 'static,
    {
        unary(
            "Mounts.WatchExports",
            QUICK_CALL_TIMEOUT,
            self.client.clone().watch_exports(outgoing),
        )
        .await
    }

    /// Updates the guest's copy of the volume at the path `volume` of the share to `version`. Returns false if the guest has
    /// no copy.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn refresh(&self, volume: &str, version: &str) -> Result<bool, PortalError> {
        let request = RefreshRequest {
            volume: volume.to_owned(),
            version: version.to_owned(),
        };
        let answer = unary(
            "Mounts.Refresh",
            LONG_CALL_TIMEOUT,
            self.client.clone().refresh(request),
        )
        .await?;
        Ok(answer.copied)
    }

    /// Exchanges FUSE messages of a mount, which the first message of `outgoing` identifies. Requires a
    /// [dedicated](crate::GuestSession::dedicated) session. Ends when either side drops.
    ///
    /// # Errors
    /// Every kind of [`PortalError`]; the stream itself has no deadline.
    pub async fn fuse<S>(&self, outgoing: S) -> Result<Streaming<FuseResponse>, PortalError>
    where
        S: futures::Stream<Item = FuseRequest> + Send + 'static,
    {
        unary(
            "Mounts.Fuse",
            QUICK_CALL_TIMEOUT,
            self.client.clone().fuse(outgoing),
        )
        .await
    }
}
