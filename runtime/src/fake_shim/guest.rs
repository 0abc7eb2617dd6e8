//! The guest of a [`super::FakeShim`]: answers Ping, Stats and List, and nothing else.

use super::FakeShim;
use boxlite_proto::boxlite::v1 as wire;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tonic::{Request, Response, Status};

#[derive(Clone)]
pub(super) struct FakeGuest(pub Arc<FakeShim>);

type Unused<T> = std::pin::Pin<Box<dyn futures::Stream<Item = Result<T, Status>> + Send>>;

fn unimplemented<T>() -> Result<T, Status> {
    Err(Status::unimplemented("not implemented by the fake guest"))
}

#[tonic::async_trait]
impl wire::guest_server::Guest for FakeGuest {
    type PortForwardStream = Unused<wire::PortForwardResponse>;
    async fn prepare(
        &self,
        _: Request<wire::GuestPrepareRequest>,
    ) -> Result<Response<wire::GuestPrepareResponse>, Status> {
        unimplemented()
    }
    async fn init(
        &self,
        _: Request<wire::GuestInitRequest>,
    ) -> Result<Response<wire::GuestInitResponse>, Status> {
        unimplemented()
    }
    async fn ping(
        &self,
        _: Request<wire::PingRequest>,
    ) -> Result<Response<wire::PingResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn shutdown(
        &self,
        _: Request<wire::ShutdownRequest>,
    ) -> Result<Response<wire::ShutdownResponse>, Status> {
        unimplemented()
    }
    async fn stats(
        &self,
        _: Request<wire::GuestStatsRequest>,
    ) -> Result<Response<wire::GuestStatsResponse>, Status> {
        self.0.hang().await;
        let network = |interface: &str| wire::NetworkStats {
            interface: interface.into(),
            tx_bytes: 11,
            rx_bytes: 22,
            ..Default::default()
        };
        Ok(Response::new(wire::GuestStatsResponse {
            cpu_usage_ns: 5_000_000,
            memory_total_bytes: 100,
            memory_available_bytes: 40,
            networks: vec![network("lo"), network("eth0")],
            ..Default::default()
        }))
    }
    async fn update_pod(
        &self,
        request: Request<wire::UpdatePodRequest>,
    ) -> Result<Response<wire::UpdatePodResponse>, Status> {
        let limits = request.into_inner().resources_json;
        self.0
            .note(&format!("update pod {}", String::from_utf8_lossy(&limits)));
        Ok(Response::new(Default::default()))
    }
    async fn set_time(
        &self,
        _: Request<wire::SetTimeRequest>,
    ) -> Result<Response<wire::SetTimeResponse>, Status> {
        unimplemented()
    }
    async fn drop_caches(
        &self,
        _: Request<wire::DropCachesRequest>,
    ) -> Result<Response<wire::DropCachesResponse>, Status> {
        unimplemented()
    }
    type HostPortsStream = Unused<wire::HostPortsResponse>;
    async fn host_ports(
        &self,
        _: Request<tonic::Streaming<wire::HostPortsRequest>>,
    ) -> Result<Response<Self::HostPortsStream>, Status> {
        unimplemented()
    }
    async fn port_forward(
        &self,
        _: Request<tonic::Streaming<wire::PortForwardRequest>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        unimplemented()
    }
}

#[tonic::async_trait]
impl wire::container_server::Container for FakeGuest {
    type EventsStream = Unused<wire::ContainerEvent>;
    async fn init(
        &self,
        _: Request<wire::ContainerInitRequest>,
    ) -> Result<Response<wire::ContainerInitResponse>, Status> {
        unimplemented()
    }
    async fn start(
        &self,
        _: Request<wire::ContainerStartRequest>,
    ) -> Result<Response<wire::ContainerStartResponse>, Status> {
        unimplemented()
    }
    async fn kill(
        &self,
        _: Request<wire::ContainerKillRequest>,
    ) -> Result<Response<wire::ContainerKillResponse>, Status> {
        unimplemented()
    }
    async fn delete(
        &self,
        _: Request<wire::ContainerDeleteRequest>,
    ) -> Result<Response<wire::ContainerDeleteResponse>, Status> {
        unimplemented()
    }
    async fn update(
        &self,
        _: Request<wire::ContainerUpdateRequest>,
    ) -> Result<Response<wire::ContainerUpdateResponse>, Status> {
        unimplemented()
    }
    async fn pause(
        &self,
        _: Request<wire::ContainerPauseRequest>,
    ) -> Result<Response<wire::ContainerPauseResponse>, Status> {
        unimplemented()
    }
    async fn resume(
        &self,
        _: Request<wire::ContainerResumeRequest>,
    ) -> Result<Response<wire::ContainerResumeResponse>, Status> {
        unimplemented()
    }
    async fn stats(
        &self,
        _: Request<wire::ContainerStatsRequest>,
    ) -> Result<Response<wire::ContainerStatsResponse>, Status> {
        self.0.hang().await;
        Ok(Response::new(wire::ContainerStatsResponse {
            cgroup: Some(wire::CgroupStats {
                memory_current: 1000,
                ..Default::default()
            }),
            ..Default::default()
        }))
    }
    async fn pids(
        &self,
        _: Request<wire::ContainerPidsRequest>,
    ) -> Result<Response<wire::ContainerPidsResponse>, Status> {
        unimplemented()
    }
    async fn list(
        &self,
        request: Request<wire::ContainerListRequest>,
    ) -> Result<Response<wire::ContainerListResponse>, Status> {
        let exit = wire::Exit {
            oom_killed: self.0.faults.oom.load(Ordering::SeqCst),
            ..Default::default()
        };
        Ok(Response::new(wire::ContainerListResponse {
            containers: vec![wire::ContainerInfo {
                container_id: request.into_inner().container_id,
                exit: Some(exit),
                ..Default::default()
            }],
        }))
    }
    async fn events(
        &self,
        _: Request<wire::ContainerEventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        unimplemented()
    }
}
