//! GetContainerEvents: what happens to pods and containers, with their statuses of that moment, until the client leaves.
//!
//! Each client has its own place in the runtime's events: one that reads slowly is held back by its connection's window and slows
//! nobody else; one that falls too far behind gets RESOURCE_EXHAUSTED, lists, and asks again. The first client of this daemon also gets
//! what happened before it came, an event for everything that was found again at the start among it.

use super::Server;
use super::streams::Stream;
use crate::convert::status;
use boxlite_proto::cri::v1::ContainerEventResponse;
use boxlite_runtime::{Events, EventsEnd};
use futures::stream::{self, StreamExt};
use tonic::Status;

/// The call.
pub fn follow(server: &Server) -> Stream<ContainerEventResponse> {
    let end = server.stopping.clone().cancelled_owned();
    stream::unfold(Some(server.runtime.events()), next)
        .take_until(end)
        .boxed()
}

/// The next event, or once the error that ends the stream.
async fn next(
    events: Option<Events>,
) -> Option<(Result<ContainerEventResponse, Status>, Option<Events>)> {
    let mut events = events?;
    match events.next().await {
        Ok(event) => Some((Ok(status::event(&event)), Some(events))),
        Err(end @ EventsEnd::Behind { .. }) => {
            Some((Err(Status::resource_exhausted(end.to_string())), None))
        }
        Err(EventsEnd::Closing) => None,
    }
}
