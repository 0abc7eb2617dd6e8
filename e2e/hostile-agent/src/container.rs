//! The `Container` service: containers that are records of [`Containers`] only.

use crate::attack::{Attack, Container as Record, Containers};
use boxlite_proto::boxlite::v1::container_event::Event;
use boxlite_proto::boxlite::v1::container_server::Container;
use boxlite_proto::boxlite::v1::*;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tonic::{Code, Request, Response, Status};

/// Pid of each process.
pub(crate) const PID: u32 = 7;
/// Length of an error's text: most of what fits into the headers that hosts accept, in bytes.
const ERROR_BYTES: usize = 12_000;
/// Number of containers, processes and kinds of memory in an answer.
const ENTRIES: u32 = 2000;
/// Steps in the answers that may have some for a trace.
const STEPS: i32 = 10_000;

/// Number of Stats calls; the statistics decrease with it.
static STATS_CALLS: AtomicU64 = AtomicU64::new(0);

pub(crate) struct ContainerService(pub(crate) Arc<Containers>);

impl ContainerService {
    /// Fails or hangs, as the container's attack demands.
    async fn fail_or_hang(&self, id: &str) -> Result<(), Status> {
        fail_or_hang(self.0.attack(id)).await
    }
}

/// Fails or hangs, as the attack demands.
pub(crate) async fn fail_or_hang(attack: Attack) -> Result<(), Status> {
    match attack {
        Attack::Errors => Err(Status::new(
            Code::Internal,
            format!("\nlevel=error{}", "\u{1b}[2Jx".repeat(ERROR_BYTES / 10)),
        )),
        Attack::Hang => std::future::pending().await,
        _ => Ok(()),
    }
}

/// Returns an exit with values that no process has.
pub(crate) fn impossible_exit() -> Exit {
    Exit {
        code: u32::MAX,
        signal: u32::MAX,
        oom_killed: true,
        finished_at_unix_ns: i64::MIN,
    }
}

/// Returns counters that no VM reaches, `value` each.
pub(crate) fn impossible(value: u64) -> CgroupStats {
    let kinds = (0..ENTRIES).map(|n| (format!("kind{n}"), value));
    let usual = ["anon", "file", "inactive_file", "slab"].map(|name| (name.to_owned(), value));
    CgroupStats {
        cpu_usage_usec: value,
        cpu_user_usec: value,
        cpu_system_usec: value,
        memory_current: value,
        memory_peak: value,
        memory_swap_current: value,
        memory_stat: kinds.chain(usual).collect(),
        memory_events_oom_kill: value,
        pids_current: value,
        cpu_pressure: Some(Pressure {
            some: Some(PressureLine {
                total_usec: value,
                avg10: f64::NAN,
                avg60: f64::INFINITY,
                avg300: -1.0,
            }),
            full: None,
        }),
        ..CgroupStats::default()
    }
}

/// Returns steps of known and unknown kinds that took longer than the universe exists.
pub(crate) fn steps() -> Vec<Step> {
    let step = |kind| Step {
        kind,
        begun_ns_ago: u64::MAX,
        duration_ns: u64::MAX - 1,
    };
    (0..STEPS).map(step).collect()
}

#[tonic::async_trait]
impl Container for ContainerService {
    async fn init(
        &self,
        request: Request<ContainerInitRequest>,
    ) -> Result<Response<ContainerInitResponse>, Status> {
        let request = request.into_inner();
        self.0
            .add(Record::parse(&request.container_id, &request.spec_json));
        Ok(Response::new(ContainerInitResponse {
            pid: PID,
            steps: steps(),
        }))
    }

    async fn start(
        &self,
        request: Request<ContainerStartRequest>,
    ) -> Result<Response<ContainerStartResponse>, Status> {
        let id = request.into_inner().container_id;
        self.0.change(&id, |container| container.started = true);
        Ok(Response::new(ContainerStartResponse {
            pid: PID,
            steps: steps(),
        }))
    }

    async fn kill(
        &self,
        request: Request<ContainerKillRequest>,
    ) -> Result<Response<ContainerKillResponse>, Status> {
        let id = request.into_inner().container_id;
        self.fail_or_hang(&id).await?;
        self.0.change(&id, |container| container.killed = true);
        Ok(Response::new(ContainerKillResponse {}))
    }

    async fn delete(
        &self,
        request: Request<ContainerDeleteRequest>,
    ) -> Result<Response<ContainerDeleteResponse>, Status> {
        let id = request.into_inner().container_id;
        self.fail_or_hang(&id).await?;
        self.0.remove(&id);
        Ok(Response::new(ContainerDeleteResponse {}))
    }

    async fn update(
        &self,
        request: Request<ContainerUpdateRequest>,
    ) -> Result<Response<ContainerUpdateResponse>, Status> {
        self.fail_or_hang(&request.into_inner().container_id)
            .await?;
        Ok(Response::new(ContainerUpdateResponse {}))
    }

    async fn pause(
        &self,
        request: Request<ContainerPauseRequest>,
    ) -> Result<Response<ContainerPauseResponse>, Status> {
        self.fail_or_hang(&request.into_inner().container_id)
            .await?;
        Ok(Response::new(ContainerPauseResponse {}))
    }

    async fn resume(
        &self,
        request: Request<ContainerResumeRequest>,
    ) -> Result<Response<ContainerResumeResponse>, Status> {
        self.fail_or_hang(&request.into_inner().container_id)
            .await?;
        Ok(Response::new(ContainerResumeResponse {}))
    }

    async fn stats(
        &self,
        request: Request<ContainerStatsRequest>,
    ) -> Result<Response<ContainerStatsResponse>, Status> {
        self.fail_or_hang(&request.into_inner().container_id)
            .await?;
        let lie = u64::MAX >> (8 * STATS_CALLS.fetch_add(1, Ordering::Relaxed)).min(63);
        Ok(Response::new(ContainerStatsResponse {
            time_unix_ns: i64::MAX,
            cgroup: Some(impossible(lie)),
            upper_bytes: lie,
            upper_inodes: lie,
            processes: Some(ProcessStats {
                processes: lie,
                file_descriptors: lie,
                sockets: lie,
                max_open_files: lie,
            }),
        }))
    }

    async fn pids(
        &self,
        request: Request<ContainerPidsRequest>,
    ) -> Result<Response<ContainerPidsResponse>, Status> {
        self.fail_or_hang(&request.into_inner().container_id)
            .await?;
        Ok(Response::new(ContainerPidsResponse {
            pids: (0..ENTRIES).collect(),
        }))
    }

    async fn list(
        &self,
        request: Request<ContainerListRequest>,
    ) -> Result<Response<ContainerListResponse>, Status> {
        let id = request.into_inner().container_id;
        if self.0.attack(&id) != Attack::Hang {
            self.fail_or_hang(&id).await?;
        }
        let info = |container_id| ContainerInfo {
            container_id,
            state: ContainerState::Running.into(),
            pid: PID,
            exit: Some(impossible_exit()),
            user: None,
        };
        let strangers = (0..ENTRIES).map(|n| format!("../stranger{n}"));
        Ok(Response::new(ContainerListResponse {
            containers: self
                .0
                .ids()
                .into_iter()
                .chain(strangers)
                .map(info)
                .collect(),
        }))
    }

    type EventsStream = BoxStream<'static, Result<ContainerEvent, Status>>;

    async fn events(
        &self,
        _: Request<ContainerEventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        let flood = stream::unfold((Arc::clone(&self.0), 0_u64), |(containers, n)| async move {
            let attacker = containers.attacking(Attack::Events).await;
            let container_id = match n % 4 {
                0 => attacker.id,
                1 => attacker.foreign,
                2 => format!("../../stranger{n}"),
                _ => "x".repeat(10_000),
            };
            let event = if n % 8 < 4 {
                Event::Oom(OomEvent { count: u64::MAX })
            } else {
                Event::Exit(impossible_exit())
            };
            let event = ContainerEvent {
                // Neither unique nor increasing.
                sequence: n.wrapping_mul(0x9e37_79b9_7f4a_7c15),
                time_unix_ns: i64::MIN,
                container_id,
                exec_id: if n % 3 == 0 {
                    "exec".into()
                } else {
                    String::new()
                },
                event: Some(event),
            };
            Some((Ok(event), (containers, n + 1)))
        });
        Ok(Response::new(flood.boxed()))
    }
}
