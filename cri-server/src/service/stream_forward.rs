//! PortForward: checks the request and answers the URL of one session.

use super::{Server, status_of};
use crate::streaming::{Forward, Ticket};
use boxlite_proto::cri::v1::{PortForwardRequest, PortForwardResponse};
use tonic::Status;

/// Ports of one call: WebSocket's channels have one byte for their number and a port takes two of them.
const MAX_PORTS: usize = 127;

/// The call. Ports may be left out: over SPDY the client names them with each connection.
pub fn forward(
    server: &Server,
    request: PortForwardRequest,
) -> Result<PortForwardResponse, Status> {
    let pod = server.pod(&request.pod_sandbox_id)?;
    let ports = request
        .port
        .iter()
        .map(|port| {
            u16::try_from(*port)
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| {
                    Status::invalid_argument(format!("port = {port}: must be from 1 to 65535"))
                })
        })
        .collect::<Result<Vec<_>, _>>()?;
    if ports.len() > MAX_PORTS {
        return Err(Status::invalid_argument(format!(
            "port has {} entries: at most {MAX_PORTS} fit on one connection",
            ports.len()
        )));
    }
    // An error where no VM runs.
    pod.portal().map_err(status_of)?;
    let url = server.stream_url(Ticket::Forward(Forward { pod, ports }))?;
    Ok(PortForwardResponse { url })
}
