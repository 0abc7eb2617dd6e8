//! PodSandboxStats, ListPodSandboxStats and StreamPodSandboxStats. Each guest has a deadline; a pod whose guest
//! misses it has no values and does not delay others.

use super::error::ServiceError;
use super::{Server, container_stats, sandbox_list, status_of};
use crate::convert::{filter, stats, time};
use boxlite_proto::cri::v1::{
    PodSandboxStats, PodSandboxStatsFilter, PodSandboxStatsRequest, PodSandboxStatsResponse,
};
use boxlite_runtime::{BoxState, LiteBox};
use tonic::Status;

/// Handles PodSandboxStats: a guest that does not answer is an error.
pub(crate) async fn stats(
    server: &Server,
    request: PodSandboxStatsRequest,
) -> Result<PodSandboxStatsResponse, Status> {
    let pod = server.pod(&request.pod_sandbox_id)?;
    let limit = server.config.timeouts.stats;
    let (answer, containers) = if pod.snapshot().state == BoxState::Ready {
        // Concurrently: a hanging guest takes one deadline, not two.
        let (asked, containers) = tokio::join!(
            tokio::time::timeout(limit, pod.stats()),
            container_stats::of_pod(server, &pod)
        );
        let answer = asked
            .map_err(|_| ServiceError::StatsTimeout {
                subject: "pod sandbox",
                id: pod.id().to_owned(),
                limit,
            })?
            .map_err(status_of)?;
        (Some(answer), containers)
    } else {
        (None, Vec::new())
    };
    Ok(PodSandboxStatsResponse {
        stats: Some(stats::sandbox(
            &pod.snapshot(),
            answer.as_ref(),
            containers,
            time::now_ns(),
        )),
    })
}

/// Returns the stats of all ready pods that `wanted` selects.
pub(crate) async fn list(
    server: &Server,
    wanted: Option<PodSandboxStatsFilter>,
) -> Vec<PodSandboxStats> {
    let wanted = filter::of_sandbox_stats(wanted);
    let pods = sandbox_list::list(server, wanted.as_ref());
    let asked = pods
        .into_iter()
        .filter_map(|pod| server.runtime.get_box(&pod.id).ok())
        .filter(|pod| pod.snapshot().state == BoxState::Ready)
        .map(|pod| one(server, pod));
    futures::future::join_all(asked).await
}

async fn one(server: &Server, pod: LiteBox) -> PodSandboxStats {
    let limit = server.config.timeouts.stats;
    let (answer, containers) = tokio::join!(
        tokio::time::timeout(limit, pod.stats()),
        container_stats::of_pod(server, &pod)
    );
    let answer = answer.ok().and_then(Result::ok);
    stats::sandbox(&pod.snapshot(), answer.as_ref(), containers, time::now_ns())
}
