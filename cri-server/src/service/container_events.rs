//! GetContainerEvents: events of pods and containers with their statuses at that time, until the client disconnects.
//!
//! Each client has a separate position in the runtime's events: a slow client is limited by the window of its
//! connection and does not affect others; one that falls too far behind gets RESOURCE_EXHAUSTED, lists, and
//! reconnects. The first client of this daemon also gets the events before its connection, including one for every
//! object that was recovered at the start.

use super::Server;
use super::error::ServiceError;
use super::streams::Stream;
use crate::convert::status;
use boxlite_proto::cri::v1::ContainerEventResponse;
use boxlite_runtime::{Events, EventsEnd};
use futures::stream::{self, StreamExt};
use tonic::Status;

/// Handles GetContainerEvents.
pub(crate) fn follow(server: &Server) -> Stream<ContainerEventResponse> {
    let end = server.stopping.clone().cancelled_owned();
    stream::unfold(Some(server.runtime.events()), next)
        .take_until(end)
        .boxed()
}

/// Returns the next event, or once the error that ends the stream.
async fn next(
    events: Option<Events>,
) -> Option<(Result<ContainerEventResponse, Status>, Option<Events>)> {
    let mut events = events?;
    match events.next().await {
        Ok(event) => Some((Ok(status::event(&event)), Some(events))),
        Err(end @ EventsEnd::Behind { .. }) => Some((Err(ServiceError::Events(end).into()), None)),
        Err(EventsEnd::Closing) => None,
    }
}
