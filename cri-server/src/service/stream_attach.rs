//! Attach: validates the request and returns the URL of one session.

use super::Server;
use crate::streaming::{Attach, RequestedStreams, Ticket};
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

/// Returns the requested streams if the combination is valid.
pub(crate) fn requested_streams(
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
) -> Result<RequestedStreams, Status> {
    if tty && stderr {
        // A terminal has a single output.
        return Err(Status::invalid_argument(
            "tty and stderr cannot both be true",
        ));
    }
    if !stdin && !stdout && !stderr {
        return Err(Status::invalid_argument(
            "one of stdin, stdout, and stderr must be set",
        ));
    }
    Ok(RequestedStreams {
        stdin,
        stdout,
        stderr,
        tty,
    })
}
