//! [`ContainerInterface`]: the Container service: lifecycle, limits and metrics of containers.
//!
//! The shim calls the lifecycle methods. boxlite-cri only reads (stats, list), so that exits have a single owner.

use super::{LONG_CALL_TIMEOUT, QUICK_CALL_TIMEOUT, unary};
use crate::error::PortalError;
use boxlite_proto::boxlite::v1::container_client::ContainerClient;
use boxlite_proto::boxlite::v1::{
    ContainerDeleteRequest, ContainerEvent, ContainerEventsRequest, ContainerInfo,
    ContainerInitRequest, ContainerInitResponse, ContainerKillRequest, ContainerListRequest,
    ContainerPauseRequest, ContainerPidsRequest, ContainerResumeRequest, ContainerStartRequest,
    ContainerStartResponse, ContainerStatsRequest, ContainerStatsResponse, ContainerUpdateRequest,
};
use boxlite_proto::names;
use bytes::Bytes;
use std::time::Duration;
use tonic::Streaming;
use tonic::transport::Channel;

/// Typed client of the Container service.
#[derive(Debug, Clone)]
pub struct ContainerInterface {
    client: ContainerClient<Channel>,
}

impl ContainerInterface {
    pub(crate) fn new(channel: Channel) -> Self {
        let client = ContainerClient::new(channel)
            .max_decoding_message_size(names::MAX_GUEST_MESSAGE_BYTES)
            .max_encoding_message_size(names::MAX_GUEST_MESSAGE_BYTES);
        Self { client }
    }

    /// Assembles the root file system and creates the container. Returns the guest pid of its init, and the agent's steps.
    ///
    /// # Errors
    /// Every kind of [`PortalError`]; `Deadline` after [`LONG_CALL_TIMEOUT`].
    pub async fn init(
        &self,
        request: ContainerInitRequest,
    ) -> Result<ContainerInitResponse, PortalError> {
        unary(
            "Container.Init",
            LONG_CALL_TIMEOUT,
            self.client.clone().init(request),
        )
        .await
    }

    /// Starts the created container. Returns its pid, and the agent's steps if `trace` is set.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn start(
        &self,
        container_id: &str,
        trace: bool,
    ) -> Result<ContainerStartResponse, PortalError> {
        let request = ContainerStartRequest {
            container_id: container_id.to_owned(),
            trace,
        };
        unary(
            "Container.Start",
            LONG_CALL_TIMEOUT,
            self.client.clone().start(request),
        )
        .await
    }

    /// Signals the init process, or every process with `all`. `signal` is the Linux number.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn kill(
        &self,
        container_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), PortalError> {
        let request = ContainerKillRequest {
            container_id: container_id.to_owned(),
            signal,
            all,
        };
        unary(
            "Container.Kill",
            QUICK_CALL_TIMEOUT,
            self.client.clone().kill(request),
        )
        .await?;
        Ok(())
    }

    /// Removes the container. Succeeds if it does not exist.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn delete(&self, container_id: &str, force: bool) -> Result<(), PortalError> {
        let request = ContainerDeleteRequest {
            container_id: container_id.to_owned(),
            force,
        };
        unary(
            "Container.Delete",
            LONG_CALL_TIMEOUT,
            self.client.clone().delete(request),
        )
        .await?;
        Ok(())
    }

    /// Applies limits, OCI LinuxResources as JSON.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn update(
        &self,
        container_id: &str,
        resources_json: impl Into<Bytes>,
    ) -> Result<(), PortalError> {
        let request = ContainerUpdateRequest {
            container_id: container_id.to_owned(),
            resources_json: resources_json.into(),
        };
        unary(
            "Container.Update",
            QUICK_CALL_TIMEOUT,
            self.client.clone().update(request),
        )
        .await?;
        Ok(())
    }

    /// Freezes the container.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn pause(&self, container_id: &str) -> Result<(), PortalError> {
        let request = ContainerPauseRequest {
            container_id: container_id.to_owned(),
        };
        unary(
            "Container.Pause",
            QUICK_CALL_TIMEOUT,
            self.client.clone().pause(request),
        )
        .await?;
        Ok(())
    }

    /// Thaws the container.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn resume(&self, container_id: &str) -> Result<(), PortalError> {
        let request = ContainerResumeRequest {
            container_id: container_id.to_owned(),
        };
        unary(
            "Container.Resume",
            QUICK_CALL_TIMEOUT,
            self.client.clone().resume(request),
        )
        .await?;
        Ok(())
    }

    /// Returns the counters of the container's cgroup and writable layer within `limit`; with `processes` also those of
    /// its processes.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn stats(
        &self,
        container_id: &str,
        processes: bool,
        limit: Duration,
    ) -> Result<ContainerStatsResponse, PortalError> {
        let request = ContainerStatsRequest {
            container_id: container_id.to_owned(),
            processes,
        };
        unary("Container.Stats", limit, self.client.clone().stats(request)).await
    }

    /// Returns the guest pids of the container's processes.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn pids(&self, container_id: &str) -> Result<Vec<u32>, PortalError> {
        let request = ContainerPidsRequest {
            container_id: container_id.to_owned(),
        };
        let response = unary(
            "Container.Pids",
            QUICK_CALL_TIMEOUT,
            self.client.clone().pids(request),
        )
        .await?;
        Ok(response.pids)
    }

    /// Lists all containers, or the named one.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn list(
        &self,
        container_id: Option<&str>,
    ) -> Result<Vec<ContainerInfo>, PortalError> {
        let request = ContainerListRequest {
            container_id: container_id.unwrap_or_default().to_owned(),
        };
        let response = unary(
            "Container.List",
            QUICK_CALL_TIMEOUT,
            self.client.clone().list(request),
        )
        .await?;
        Ok(response.containers)
    }

    /// Subscribes to events from sequence number `from`. The stream has no deadline and ends when the caller drops it or
    /// the connection breaks; a returning caller requests the last sequence number plus one.
    ///
    /// # Errors
    /// Every kind of [`PortalError`] when opening; Status items later.
    pub async fn events(&self, from: u64) -> Result<Streaming<ContainerEvent>, PortalError> {
        let request = ContainerEventsRequest { from };
        unary(
            "Container.Events",
            QUICK_CALL_TIMEOUT,
            self.client.clone().events(request),
        )
        .await
    }
}
