//! The `Guest` service: sets nothing up and claims that it did.

use crate::attack::{Attack, Containers};
use crate::container::{impossible, steps};
use boxlite_proto::boxlite::v1::guest_server::Guest;
use boxlite_proto::boxlite::v1::*;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

/// Number of device names in the answer to Init, a megabyte in all.
const DEVICES: usize = 1000;
/// Length of each, in bytes.
const DEVICE_NAME_BYTES: usize = 1000;
/// Networks in the statistics.
const NETWORKS: u32 = 2000;

pub(crate) struct GuestService(pub(crate) Arc<Containers>);

#[tonic::async_trait]
impl Guest for GuestService {
    async fn prepare(
        &self,
        _: Request<GuestPrepareRequest>,
    ) -> Result<Response<GuestPrepareResponse>, Status> {
        Ok(Response::new(GuestPrepareResponse {}))
    }

    async fn init(
        &self,
        _: Request<GuestInitRequest>,
    ) -> Result<Response<GuestInitResponse>, Status> {
        Ok(Response::new(GuestInitResponse {
            kernel_release: "6.12\nlevel=error msg=\"forged line\"\u{1b}[2J".to_owned(),
            agent_version: "../../../etc/passwd".to_owned(),
            devices: vec!["x".repeat(DEVICE_NAME_BYTES); DEVICES],
            steps: steps(),
        }))
    }

    async fn ping(&self, _: Request<PingRequest>) -> Result<Response<PingResponse>, Status> {
        Ok(Response::new(PingResponse {
            uptime_ms: u64::MAX,
            containers: u32::MAX,
        }))
    }

    /// Answers without shutting down.
    async fn shutdown(
        &self,
        _: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownResponse>, Status> {
        Ok(Response::new(ShutdownResponse {}))
    }

    async fn stats(
        &self,
        _: Request<GuestStatsRequest>,
    ) -> Result<Response<GuestStatsResponse>, Status> {
        let network = |n| NetworkStats {
            interface: format!("eth{n}"),
            rx_bytes: u64::MAX,
            ..NetworkStats::default()
        };
        Ok(Response::new(GuestStatsResponse {
            time_unix_ns: i64::MIN,
            cpu_usage_ns: u64::MAX,
            memory_total_bytes: 0,
            memory_available_bytes: u64::MAX,
            networks: (0..NETWORKS).map(network).collect(),
            pod: Some(impossible(u64::MAX)),
            process_count: u32::MAX,
            scratch: Some(FilesystemStats {
                device: "/dev/../etc".to_owned(),
                available_bytes: u64::MAX,
                inodes_free: u64::MAX,
                ..FilesystemStats::default()
            }),
        }))
    }

    async fn set_time(
        &self,
        _: Request<SetTimeRequest>,
    ) -> Result<Response<SetTimeResponse>, Status> {
        Ok(Response::new(SetTimeResponse {}))
    }

    async fn drop_caches(
        &self,
        _: Request<DropCachesRequest>,
    ) -> Result<Response<DropCachesResponse>, Status> {
        Ok(Response::new(DropCachesResponse {}))
    }

    async fn update_pod(
        &self,
        _: Request<UpdatePodRequest>,
    ) -> Result<Response<UpdatePodResponse>, Status> {
        Ok(Response::new(UpdatePodResponse {}))
    }

    type PortForwardStream = BoxStream<'static, Result<PortForwardResponse, Status>>;

    async fn port_forward(
        &self,
        _: Request<Streaming<PortForwardRequest>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        Ok(Response::new(stream::pending().boxed()))
    }

    type HostPortsStream = BoxStream<'static, Result<HostPortsResponse, Status>>;

    /// Answers once as expected, since the pod does not start otherwise.
    async fn host_ports(
        &self,
        _: Request<Streaming<HostPortsRequest>>,
    ) -> Result<Response<Self::HostPortsStream>, Status> {
        let flood = stream::unfold((Arc::clone(&self.0), 0_u32), |(containers, n)| async move {
            if n > 0 {
                containers.attacking(Attack::Ports).await;
            }
            let ports = if n == 0 { 0..0 } else { n % 3..70_000 };
            let listening = |port| ListeningPort {
                port,
                loopback: (port ^ n) & 1 == 0,
            };
            let ports = ports.map(listening).collect();
            Some((Ok(HostPortsResponse { ports }), (containers, n + 1)))
        });
        Ok(Response::new(flood.boxed()))
    }
}
