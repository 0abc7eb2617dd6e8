//! The `Guest` service: the VM and its pod as a whole.

use crate::agent::Agent;
use crate::cgroup::{self, Cgroup};
use crate::container::error::ContainerError;
use crate::status::{joined, status};
use crate::steps::Steps;
use crate::storage::{StorageError, pod};
use crate::{network, system};
use boxlite_proto::boxlite::v1::guest_server::Guest;
use boxlite_proto::boxlite::v1::{
    DropCachesRequest, DropCachesResponse, ErrorKind, GuestInitRequest, GuestInitResponse,
    GuestPrepareRequest, GuestPrepareResponse, GuestStatsRequest, GuestStatsResponse,
    HostPortsRequest, HostPortsResponse, PingRequest, PingResponse, PortForwardRequest,
    PortForwardResponse, SetTimeRequest, SetTimeResponse, ShutdownRequest, ShutdownResponse,
    StepKind, UpdatePodRequest, UpdatePodResponse,
};
use boxlite_sys::proc_memory;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

/// Maximum grace period of a Shutdown.
const MAX_GRACE: Duration = Duration::from_secs(3600);

/// Implementation of the `Guest` service.
#[derive(Debug)]
pub(crate) struct GuestService {
    agent: Arc<Agent>,
    /// The request that initialized the pod, without the fields that differ between retries. Locked while a request
    /// is handled.
    initialized: tokio::sync::Mutex<Option<GuestInitRequest>>,
}

impl GuestService {
    /// Creates the service of `agent`.
    pub(crate) fn new(agent: Arc<Agent>) -> Self {
        Self {
            agent,
            initialized: tokio::sync::Mutex::new(None),
        }
    }
}

/// Sets up the pod. The order matters: later steps depend on earlier ones.
async fn initialize(request: &GuestInitRequest) -> Result<Steps, Status> {
    let mut steps = Steps::default();
    let begun = Instant::now();
    if request.time_unix_ns != 0 {
        system::set_time(request.time_unix_ns)?;
    }
    system::add_entropy(&request.entropy)?;
    if !request.hostname.is_empty() {
        system::set_hostname(&request.hostname)?;
    }
    let (share, scratch, shm) = (
        request.share_tag.clone(),
        request.scratch_device.clone(),
        request.shm_size,
    );
    let mounts = tokio::task::spawn_blocking(move || {
        let begun = Instant::now();
        pod::mount_share(&share)?;
        pod::mount_scratch(&scratch)?;
        pod::resize_shm(shm)?;
        Ok::<_, StorageError>((begun, Instant::now()))
    });
    cgroup::pod::limit_processes(request.pids_limit).map_err(ContainerError::from)?;
    crate::cgroup::pod::limit_memory(request.memory_limit);
    let configuring = Instant::now();
    network::configure(&request.interfaces, &request.routes).await?;
    steps.add(StepKind::Network, configuring, Instant::now());
    let (mounting, mounted) = joined(mounts).await??;
    steps.add(StepKind::Storage, mounting, mounted);
    // Last, because some name an interface.
    for (name, value) in &request.sysctls {
        system::set_sysctl(name, value)?;
    }
    steps.add(StepKind::Init, begun, Instant::now());
    Ok(steps)
}

/// Returns the fields that must be equal in a repeated Init.
fn comparable(request: &GuestInitRequest) -> GuestInitRequest {
    GuestInitRequest {
        time_unix_ns: 0,
        entropy: Default::default(),
        trace: false,
        ..request.clone()
    }
}

#[tonic::async_trait]
impl Guest for GuestService {
    async fn prepare(
        &self,
        request: Request<GuestPrepareRequest>,
    ) -> Result<Response<GuestPrepareResponse>, Status> {
        let request = request.into_inner();
        let known = GuestInitRequest {
            share_tag: request.share_tag,
            scratch_device: request.scratch_device,
            time_unix_ns: request.time_unix_ns,
            entropy: request.entropy,
            ..GuestInitRequest::default()
        };
        // Not while Init does the same.
        let initialized = self.initialized.lock().await;
        if initialized.is_none() {
            initialize(&known).await?;
        }
        Ok(Response::new(GuestPrepareResponse {}))
    }

    async fn init(
        &self,
        request: Request<GuestInitRequest>,
    ) -> Result<Response<GuestInitResponse>, Status> {
        let request = request.into_inner();
        let mut initialized = self.initialized.lock().await;
        let mut steps = Steps::default();
        match initialized.as_ref() {
            None => {
                steps = initialize(&request).await?;
                self.agent.set_initialized();
                *initialized = Some(comparable(&request));
            }
            Some(before) if *before == comparable(&request) => {}
            Some(before) => {
                let message = format!("the VM already belongs to sandbox {}", before.sandbox_id);
                return Err(status(
                    ErrorKind::AlreadyExists,
                    &before.sandbox_id,
                    message,
                ));
            }
        }
        let kernel_release = nix::sys::utsname::uname()
            .map(|name| name.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        Ok(Response::new(GuestInitResponse {
            kernel_release,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            devices: pod::devices(),
            steps: match request.trace {
                true => steps.report_with_boot(),
                false => Vec::new(),
            },
        }))
    }

    async fn ping(&self, _: Request<PingRequest>) -> Result<Response<PingResponse>, Status> {
        Ok(Response::new(PingResponse {
            uptime_ms: system::uptime_ms(),
            containers: 0,
        }))
    }

    async fn shutdown(
        &self,
        request: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownResponse>, Status> {
        let grace = Duration::from_millis(request.into_inner().grace_ms.into()).min(MAX_GRACE);
        let agent = Arc::clone(&self.agent);
        // In a task, so that it continues if the caller leaves.
        let stopping = self.agent.launcher().tasks.spawn(async move {
            agent.pod.stop_all(grace).await;
            for container in agent.pod.list() {
                let _ = agent.pod.delete(&container.id, true).await;
            }
            if let Ok(Err(error)) = tokio::task::spawn_blocking(pod::release_scratch).await {
                tracing::warn!(
                    error = boxlite_sys::report::report(&error),
                    "failed to release the scratch disk"
                );
            }
        });
        let _ = stopping.await;
        self.agent.request_shutdown();
        Ok(Response::new(ShutdownResponse {}))
    }

    async fn stats(
        &self,
        _: Request<GuestStatsRequest>,
    ) -> Result<Response<GuestStatsResponse>, Status> {
        let pod = Cgroup::pod();
        Ok(Response::new(GuestStatsResponse {
            time_unix_ns: system::unix_time_ns(),
            cpu_usage_ns: system::cpu_usage_ns(),
            memory_total_bytes: system::memory_total().unwrap_or(0),
            memory_available_bytes: proc_memory::meminfo("MemAvailable").unwrap_or(0),
            networks: system::network_stats(),
            process_count: pod.processes().len() as u32,
            pod: Some(cgroup::stats::read(&pod)),
            scratch: pod::scratch_stats(),
        }))
    }

    async fn update_pod(
        &self,
        request: Request<UpdatePodRequest>,
    ) -> Result<Response<UpdatePodResponse>, Status> {
        let limits =
            serde_json::from_slice(&request.into_inner().resources_json).map_err(|error| {
                ContainerError::Invalid {
                    field: "resources_json",
                    reason: error.to_string(),
                }
            })?;
        cgroup::pod::update_pod(&limits).map_err(ContainerError::from)?;
        Ok(Response::new(UpdatePodResponse {}))
    }

    async fn set_time(
        &self,
        request: Request<SetTimeRequest>,
    ) -> Result<Response<SetTimeResponse>, Status> {
        system::set_time(request.into_inner().time_unix_ns)?;
        Ok(Response::new(SetTimeResponse {}))
    }

    async fn drop_caches(
        &self,
        request: Request<DropCachesRequest>,
    ) -> Result<Response<DropCachesResponse>, Status> {
        system::drop_caches(request.into_inner().pages).await?;
        Ok(Response::new(DropCachesResponse {}))
    }

    type PortForwardStream =
        Pin<Box<dyn Stream<Item = Result<PortForwardResponse, Status>> + Send>>;

    async fn port_forward(
        &self,
        request: Request<Streaming<PortForwardRequest>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        let stream = crate::forward::open(request.into_inner()).await?;
        Ok(Response::new(Box::pin(stream)))
    }

    type HostPortsStream = Pin<Box<dyn Stream<Item = Result<HostPortsResponse, Status>> + Send>>;

    async fn host_ports(
        &self,
        request: Request<Streaming<HostPortsRequest>>,
    ) -> Result<Response<Self::HostPortsStream>, Status> {
        let stream = crate::host_ports::open(request.into_inner()).await?;
        Ok(Response::new(Box::pin(stream)))
    }
}
