//! The service containerd.runtime.sandbox.v1.Sandbox.

use super::Service;
use crate::container::stats;
use crate::containerd::config::ShimConfig;
use crate::containerd::{etc, plan};
use crate::error::ShimError;
use crate::sandbox::Snapshot;
use crate::sandbox::options::{self, Plan};
use crate::time;
use crate::trace;
use async_trait::async_trait;
use boxlite_portal::stats_limits::StatsLimits;
use boxlite_proto::shim::shim::PodConfig;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox as SandboxService;
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use std::time::Duration;

/// Suffix of the type URL of CRI's pod configuration.
const POD_CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";
/// Timeout of a ping or a read of counters in the guest.
const GUEST_CALL_TIMEOUT: Duration = Duration::from_secs(10);

#[async_trait]
impl SandboxService for Service {
    async fn create_sandbox(
        &self,
        context: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        let call = async {
            let plan = self.plan(&request).await?;
            let sandbox = self.sandbox.clone();
            self.detached(async move { sandbox.create(plan).await })
                .await
        };
        let span = trace::server(context, "Sandbox/CreateSandbox", self.sandbox.context());
        span.run(call).await?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        context: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        let span = trace::server(context, "Sandbox/StartSandbox", self.sandbox.context());
        let snapshot = span.run(self.sandbox.start()).await?;
        Ok(StartSandboxResponse {
            pid: snapshot.pid,
            created_at: created_at(&snapshot),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        platform.architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }
        .to_owned();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        context: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        let grace = Duration::from_secs(u64::from(request.timeout_secs));
        let span = trace::server(context, "Sandbox/StopSandbox", self.sandbox.context());
        span.run(self.sandbox.stop(grace)).await?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        let ended = self.sandbox.wait().await?;
        Ok(WaitSandboxResponse {
            exit_status: ended.status,
            exited_at: MessageField::some(time::timestamp(ended.at_unix_ns)),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        let snapshot = self.sandbox.snapshot();
        let mut response = SandboxStatusResponse {
            sandbox_id: self.sandbox.context().id.to_string(),
            pid: snapshot.pid,
            state: snapshot.phase.name().to_owned(),
            created_at: created_at(&snapshot),
            ..Default::default()
        };
        if let Some(ended) = &snapshot.ended {
            response.exited_at = MessageField::some(time::timestamp(ended.at_unix_ns));
            response
                .info
                .insert("ended".to_owned(), ended.reason.clone());
        }
        response.info.insert(
            "phase".to_owned(),
            format!("{:?}", snapshot.phase).to_lowercase(),
        );
        if request.verbose {
            response.info.extend(snapshot.info.iter().cloned());
        }
        Ok(response)
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: PingRequest,
    ) -> ttrpc::Result<PingResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        let guest = self.sandbox.guest("ping it")?;
        guest
            .call(guest.session.guest().ping(GUEST_CALL_TIMEOUT))
            .await?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        self.shut_down().await?;
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        self.check_sandbox(&request.sandbox_id)?;
        let (data, time_unix_ns) = self.pod_stats().await?;
        let mut response = SandboxMetricsResponse::new();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.id = self.sandbox.context().id.to_string();
        metrics.timestamp = MessageField::some(time::timestamp(time_unix_ns));
        metrics.data = MessageField::some(data);
        Ok(response)
    }
}

impl Service {
    /// Counters of all containers of the pod, and when they were read.
    pub(super) async fn pod_stats(&self) -> ttrpc::Result<(Any, i64)> {
        let guest = self.sandbox.guest("measure it")?;
        let stats = guest
            .call(guest.session.guest().stats(GUEST_CALL_TIMEOUT))
            .await?;
        let data = stats::any(
            &stats.pod.unwrap_or_default(),
            &stats.networks,
            self.stats_limits(),
        )
        .map_err(|error| ttrpc::Error::Others(error.to_string()))?;
        Ok((data, stats.time_unix_ns))
    }

    /// Returns the limits of the counters that the guest may report.
    pub(super) fn stats_limits(&self) -> StatsLimits {
        let snapshot = self.sandbox.snapshot();
        let (memory_mib, disk_bytes, vcpus) = snapshot.plan.as_ref().map_or((0, 0, 0), |plan| {
            let options = &plan.options;
            (options.memory_mib, options.scratch_bytes, options.vcpus)
        });
        StatsLimits::of(memory_mib, disk_bytes, vcpus, snapshot.created_at_unix_ns)
    }

    /// Builds the plan of a CreateSandbox from boxlite-cri or containerd.
    async fn plan(&self, request: &CreateSandboxRequest) -> Result<Plan, ShimError> {
        match request.options.as_ref() {
            Some(any) if any.type_url.ends_with(POD_CONFIG_TYPE) => {
                let pod = PodConfig::parse_from_bytes(&any.value).map_err(|error| {
                    ShimError::Invalid {
                        field: "options",
                        reason: format!("not a {POD_CONFIG_TYPE}: {error}"),
                    }
                })?;
                let config = ShimConfig::find()?;
                let id = &self.sandbox.context().id;
                let plan = plan::of_pod(id, &pod, options::netns(request)?, &config).await?;
                let bundle = &self.sandbox.context().bundle;
                etc::write(bundle, &pod, &plan.options.hostname, plan.options.passt)?;
                Ok(plan)
            }
            _ => Plan::from_request(request),
        }
    }
}

fn created_at(snapshot: &Snapshot) -> MessageField<Timestamp> {
    match snapshot.created_at_unix_ns {
        0 => MessageField::none(),
        at => MessageField::some(time::timestamp(at)),
    }
}
