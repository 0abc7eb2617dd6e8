//! Port-forward client: SPDY, or SPDY through a WebSocket. Every connection has a data and an error stream.

use super::{MESSAGE_TIMEOUT, Transport, spdy, upgrade_spdy, websocket};
use crate::failure::Result;
use crate::same;

/// Connects to the URL of a PortForward response.
pub(crate) async fn connect(url: &str, over: Transport) -> Result<spdy::Client> {
    Ok(match over {
        Transport::Spdy => {
            let (socket, protocol) = upgrade_spdy(url, "portforward.k8s.io").await?;
            same!(protocol, "portforward.k8s.io", "negotiated");
            spdy::Client::new(socket)
        }
        Transport::WebSocket => {
            let tunnel = websocket::tunnel(url, "SPDY/3.1+portforward.k8s.io").await?;
            spdy::Client::new(tunnel)
        }
    })
}

/// Returns the data and error streams of one forwarded connection.
pub(crate) async fn dial(
    client: &mut spdy::Client,
    port: &str,
    id: &str,
) -> Result<(spdy::Stream, spdy::Stream)> {
    let headers = |kind| [("streamtype", kind), ("port", port), ("requestid", id)];
    let error = client.open(&headers("error")).await?;
    client.send(error.id, b"", true).await?;
    Ok((client.open(&headers("data")).await?, error))
}

/// Reads a stream to its end.
pub(crate) async fn rest(stream: &mut spdy::Stream) -> Result<Vec<u8>> {
    let mut read = Vec::new();
    loop {
        match tokio::time::timeout(MESSAGE_TIMEOUT, stream.incoming.recv()).await {
            Ok(Some(bytes)) => read.extend_from_slice(&bytes),
            Ok(None) => return Ok(read),
            Err(_) => crate::bail!(
                "nothing more within {MESSAGE_TIMEOUT:?} after {} bytes",
                read.len()
            ),
        }
    }
}
