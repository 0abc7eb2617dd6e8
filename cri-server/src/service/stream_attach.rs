//! Attach: validates the request and returns the URL of one session.

use super::{Server, requested_streams};
use crate::streaming::{Attach, Ticket};
use boxlite_proto::cri::v1::{AttachRequest, AttachResponse};
use tonic::Status;

/// Handles Attach.
pub(crate) fn attach(server: &Server, request: AttachRequest) -> Result<AttachResponse, Status> {
    let streams = requested_streams(request.stdin, request.stdout, request.stderr, request.tty)?;
    let (pod, container) = server.running_container(&request.container_id)?;
    let ticket = Ticket::Attach(Attach {
        pod,
        has_stdin: container.stdin,
        container: container.id,
        streams,
    });
    let url = server.stream_url(ticket)?;
    Ok(AttachResponse { url })
}
