//! [`GuestInterface`]: the Guest service: the VM itself, its network counters and ports.

use super::{LONG_CALL_TIMEOUT, QUICK_CALL_TIMEOUT, unary};
use crate::error::PortalError;
use boxlite_proto::boxlite::v1::guest_client::GuestClient;
use boxlite_proto::boxlite::v1::{
    DropCachesRequest, GuestInitRequest, GuestInitResponse, GuestPrepareRequest, GuestStatsRequest,
    GuestStatsResponse, HostPortsRequest, HostPortsResponse, PingRequest, PingResponse,
    PortForwardRequest, PortForwardResponse, SetTimeRequest, ShutdownRequest, UpdatePodRequest,
};
use boxlite_proto::names;
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tonic::Streaming;
use tonic::transport::Channel;

/// Typed client of the Guest service.
#[derive(Debug, Clone)]
pub struct GuestInterface {
    client: GuestClient<Channel>,
    bytes: Arc<AtomicU64>,
}

impl GuestInterface {
    pub(crate) fn new(channel: Channel, bytes: Arc<AtomicU64>) -> Self {
        let client = GuestClient::new(channel)
            .max_decoding_message_size(names::MAX_GUEST_MESSAGE_BYTES)
            .max_encoding_message_size(names::MAX_GUEST_MESSAGE_BYTES);
        Self { client, bytes }
    }

    /// Sets up mounts, network, clock and identity of the pod, once per boot.
    ///
    /// # Errors
    /// Every kind of [`PortalError`]; `Deadline` after [`LONG_CALL_TIMEOUT`].
    pub async fn init(&self, request: GuestInitRequest) -> Result<GuestInitResponse, PortalError> {
        unary(
            "Guest.Init",
            LONG_CALL_TIMEOUT,
            self.client.clone().init(request),
        )
        .await
    }

    /// Does the part of [`Self::init`] that needs no pod.
    ///
    /// # Errors
    /// Every kind of [`PortalError`]; `Deadline` after [`LONG_CALL_TIMEOUT`].
    pub async fn prepare(&self, request: GuestPrepareRequest) -> Result<(), PortalError> {
        unary(
            "Guest.Prepare",
            LONG_CALL_TIMEOUT,
            self.client.clone().prepare(request),
        )
        .await
        .map(drop)
    }

    /// Checks that the agent answers within `limit`.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn ping(&self, limit: Duration) -> Result<PingResponse, PortalError> {
        unary(
            "Guest.Ping",
            limit,
            self.client.clone().ping(PingRequest {}),
        )
        .await
    }

    /// Shuts the VM down: containers are killed after `grace`, disks synced, power off. The connection may break before
    /// the answer, which counts as success.
    ///
    /// # Errors
    /// An error of the agent, or `Deadline` after `grace` and [`QUICK_CALL_TIMEOUT`].
    pub async fn shutdown(&self, grace: Duration) -> Result<(), PortalError> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let request = ShutdownRequest { grace_ms };
        match unary(
            "Guest.Shutdown",
            grace + QUICK_CALL_TIMEOUT,
            self.client.clone().shutdown(request),
        )
        .await
        {
            Ok(_) => Ok(()),
            Err(error) if error.is_transport() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Returns the CPU, memory and network counters of the VM within `limit`.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn stats(&self, limit: Duration) -> Result<GuestStatsResponse, PortalError> {
        unary(
            "Guest.Stats",
            limit,
            self.client.clone().stats(GuestStatsRequest {}),
        )
        .await
    }

    /// Applies limits for all containers together, OCI LinuxResources as JSON.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn update_pod(&self, resources_json: impl Into<Bytes>) -> Result<(), PortalError> {
        let request = UpdatePodRequest {
            resources_json: resources_json.into(),
        };
        unary(
            "Guest.UpdatePod",
            QUICK_CALL_TIMEOUT,
            self.client.clone().update_pod(request),
        )
        .await?;
        Ok(())
    }

    /// Sets the guest's wall clock, ns since the epoch.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn set_time(&self, time_unix_ns: i64) -> Result<(), PortalError> {
        let request = SetTimeRequest { time_unix_ns };
        unary(
            "Guest.SetTime",
            QUICK_CALL_TIMEOUT,
            self.client.clone().set_time(request),
        )
        .await?;
        Ok(())
    }

    /// Makes the guest's kernel drop unused inodes, with `pages` also cached pages, so that the file server of the share closes
    /// their descriptors.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn drop_caches(&self, pages: bool) -> Result<(), PortalError> {
        let request = DropCachesRequest { pages };
        unary(
            "Guest.DropCaches",
            LONG_CALL_TIMEOUT,
            self.client.clone().drop_caches(request),
        )
        .await?;
        Ok(())
    }

    /// Exchanges listening ports with the guest, for host network pods. The first message contains the gateway; this
    /// returns when the guest listens on that message's ports. Ends when either side drops.
    ///
    /// # Errors
    /// Every kind of [`PortalError`]; the stream itself has no deadline.
    pub async fn host_ports<S>(
        &self,
        outgoing: S,
    ) -> Result<Streaming<HostPortsResponse>, PortalError>
    where
        S: futures::Stream<Item = HostPortsRequest> + Send + 'static,
    {
        unary(
            "Guest.HostPorts",
            QUICK_CALL_TIMEOUT,
            self.client.clone().host_ports(outgoing),
        )
        .await
    }

    /// Opens a byte stream to a port in the guest. The first message of `outgoing` contains the port. Requires a
    /// [dedicated](crate::GuestSession::dedicated) session: a slow client must not stall other calls. Ends when either
    /// side drops.
    ///
    /// # Errors
    /// Every kind of [`PortalError`]; the stream itself has no deadline.
    pub async fn port_forward<S>(
        &self,
        outgoing: S,
    ) -> Result<Streaming<PortForwardResponse>, PortalError>
    where
        S: futures::Stream<Item = PortForwardRequest> + Send + 'static,
    {
        let bytes = self.bytes.clone();
        let counted = futures::StreamExt::inspect(outgoing, move |message: &PortForwardRequest| {
            bytes.fetch_add(message.data.len() as u64, Ordering::Relaxed);
        });
        unary(
            "Guest.PortForward",
            QUICK_CALL_TIMEOUT,
            self.client.clone().port_forward(counted),
        )
        .await
    }
}
