//! Exec: validates the request and returns the URL of one session.

use super::{Server, requested_streams};
use crate::convert::ConvertError;
use crate::streaming::{Exec, Ticket};
use boxlite_proto::cri::v1::{ExecRequest, ExecResponse};
use tonic::Status;

/// Handles Exec. The command starts when the client connects.
pub(crate) fn exec(server: &Server, request: ExecRequest) -> Result<ExecResponse, Status> {
    if request.cmd.first().is_none_or(String::is_empty) {
        return Err(ConvertError::Missing("cmd").into());
    }
    let streams = requested_streams(request.stdin, request.stdout, request.stderr, request.tty)?;
    let (pod, container) = server.running_container(&request.container_id)?;
    let ticket = Ticket::Exec(Exec {
        pod,
        container: container.id,
        argv: request.cmd,
        streams,
    });
    let url = server.stream_url(ticket)?;
    Ok(ExecResponse { url })
}
