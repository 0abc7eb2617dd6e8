//! GetContainerEvents of both sides as one stream. It ends with the stream of this runtime; a connection to containerd that
//! breaks is made again, and the events meanwhile are missing, as for every client of containerd that reconnects.

use super::{HostPods, Router};
use crate::service::streams::Stream;
use boxlite_proto::cri::v1::runtime_service_server::RuntimeService;
use boxlite_proto::cri::v1::{ContainerEventResponse, GetEventsRequest};
use futures::stream::{self, StreamExt};
use std::sync::Arc;
use std::time::Duration;
use tonic::{Request, Response, Status, Streaming};

/// Interval between attempts to follow containerd's events.
const RECONNECT_INTERVAL: Duration = Duration::from_secs(1);

impl Router {
    /// Handles GetContainerEvents.
    pub(super) async fn events(
        &self,
        request: Request<GetEventsRequest>,
    ) -> Result<Response<Stream<ContainerEventResponse>>, Status> {
        let ours = self.server.get_container_events(request).await?;
        let Some(host) = &self.host else {
            return Ok(ours);
        };
        // `None` marks the end of this runtime's events, which ends the merged stream.
        let ours = ours
            .into_inner()
            .map(Some)
            .chain(stream::once(async { None }));
        let theirs = stream::unfold((host.clone(), None), next).map(|event| Some(Ok(event)));
        let both = stream::select(ours, theirs);
        Ok(Response::new(
            both.take_while(|event| std::future::ready(event.is_some()))
                .filter_map(std::future::ready)
                .boxed(),
        ))
    }
}

type Following = (Arc<HostPods>, Option<Streaming<ContainerEventResponse>>);

/// Returns the next event of containerd.
async fn next((host, mut stream): Following) -> Option<(ContainerEventResponse, Following)> {
    loop {
        if let Some(events) = &mut stream {
            match events.message().await {
                Ok(Some(event)) => {
                    host.learn(&event).await;
                    return Some((event, (host, stream)));
                }
                Ok(None) => {
                    tracing::debug!("event stream of the container runtime of host pods ended")
                }
                Err(error) => {
                    tracing::debug!(%error, "event stream of the container runtime of host pods failed")
                }
            }
            stream = None;
            tokio::time::sleep(RECONNECT_INTERVAL).await;
        }
        let mut runtime = host.client.runtime();
        let opened = runtime.get_container_events(GetEventsRequest {}).await;
        match opened {
            Ok(events) => stream = Some(events.into_inner()),
            Err(_) => tokio::time::sleep(RECONNECT_INTERVAL).await,
        }
    }
}

impl HostPods {
    /// Adds the ids of an event to the table before a client learns them.
    async fn learn(&self, event: &ContainerEventResponse) {
        let pod = event.pod_sandbox_status.clone().unwrap_or_default().id;
        if !pod.is_empty() && self.table.matching_pods(&pod).is_empty() {
            self.pods().await;
        }
        let id = &event.container_id;
        if !id.is_empty() && *id != pod && self.table.matching_containers(id).is_empty() {
            self.containers().await;
        }
    }
}
