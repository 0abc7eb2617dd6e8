//! PortForward: validates the request and returns the URL of one session.

use super::{Server, status_of};
use crate::convert::ConvertError;
use crate::streaming::{Forward, Ticket};
use boxlite_proto::cri::v1::{PortForwardRequest, PortForwardResponse};
use tonic::Status;

/// Maximum number of ports of one call: a WebSocket channel number is one byte, and a port takes two channels.
const MAX_PORTS: usize = 127;

/// Handles PortForward. Ports are optional: over SPDY the client names them with each connection.
pub(crate) fn forward(
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
                    ConvertError::invalid("port", port.to_string(), "must be from 1 to 65535")
                })
        })
        .collect::<Result<Vec<_>, _>>()?;
    if ports.len() > MAX_PORTS {
        let count = format!("{} ports", ports.len());
        let reason = format!("at most {MAX_PORTS} ports");
        return Err(ConvertError::invalid("port", count, reason).into());
    }
    // Fails if no VM runs.
    pod.portal().map_err(status_of)?;
    let url = server.stream_url(Ticket::Forward(Forward { pod, ports }))?;
    Ok(PortForwardResponse { url })
}
