//! Client of GetContainerEvents: follows the stream, and waits for events in an order.

use crate::client::{answer, status_failure};
use crate::failure::Result;
use crate::node::Node;
use futures::StreamExt;
use k8s_cri::v1::*;
use std::time::Duration;

/// Calls GetContainerEvents.
pub(crate) async fn follow(node: &Node) -> Result<tonic::Streaming<ContainerEventResponse>> {
    let mut client = node.cri.runtime();
    answer(
        "GetContainerEvents",
        client.get_container_events(GetEventsRequest {}).await,
    )
}

/// Reads until the `wanted` events (id and kind) have arrived in this order; other events may come between them.
pub(crate) async fn wait_for(
    stream: &mut tonic::Streaming<ContainerEventResponse>,
    wanted: &[(&str, ContainerEventType)],
    limit: Duration,
) -> Result<Vec<ContainerEventResponse>> {
    let mut seen = Vec::new();
    let mut rest = wanted.iter().peekable();
    let reading = async {
        while let Some((id, kind)) = rest.peek() {
            let Some(event) = stream.next().await else {
                crate::bail!("the stream ended")
            };
            let event = event.map_err(|s| status_failure(&s))?;
            if event.container_id == *id && event.container_event_type() == *kind {
                rest.next();
            }
            seen.push(event);
        }
        Ok(())
    };
    match tokio::time::timeout(limit, reading).await {
        Ok(done) => done?,
        Err(_) => crate::bail!(
            "missing events: {:?}; received: {:?}",
            rest.collect::<Vec<_>>(),
            seen.iter()
                .map(|e| (&e.container_id, e.container_event_type()))
                .collect::<Vec<_>>()
        ),
    }
    Ok(seen)
}
