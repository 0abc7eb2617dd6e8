//! [`MountsInterface`]: the Mounts service — mounts that containers show on the host, and their files.
//!
//! Only the shim uses it, on connections of its own. What is mounted where, and whether, it decides; nothing here does.

use super::{QUICK_LIMIT, unary};
use crate::error::PortalError;
use boxlite_proto::boxlite::v1::mounts_client::MountsClient;
use boxlite_proto::boxlite::v1::{
    FuseRequest, FuseResponse, WatchExportsRequest, WatchExportsResponse,
};
use boxlite_proto::names;
use tonic::Streaming;
use tonic::transport::Channel;

/// Typed calls of the Mounts service.
#[derive(Debug, Clone)]
pub struct MountsInterface {
    client: MountsClient<Channel>,
}

impl MountsInterface {
    pub(crate) fn new(channel: Channel) -> Self {
        let client = MountsClient::new(channel)
            .max_decoding_message_size(names::GUEST_MESSAGE_LIMIT)
            .max_encoding_message_size(names::GUEST_MESSAGE_LIMIT);
        Self { client }
    }

    /// The list of mounts whenever it has changed, the present one first; `outgoing` says which lists the host is up to.
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
            QUICK_LIMIT,
            self.client.clone().watch_exports(outgoing),
        )
        .await
    }

    /// FUSE messages of the mount that the first message of `outgoing` names. Use a
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
            QUICK_LIMIT,
            self.client.clone().fuse(outgoing),
        )
        .await
    }
}
