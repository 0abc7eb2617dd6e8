//! Client side of WebSocket, based on tungstenite: version 5 of the channel protocol, and a byte tunnel for SPDY.

use crate::failure::Result;
use crate::{bail, ensure};
use bytes::Bytes;
use futures::stream::SplitSink;
use futures::{SinkExt, StreamExt};
use std::collections::HashMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;

/// Names of the channels by number.
const NAMES: [&str; 5] = ["stdin", "stdout", "stderr", "error", "resize"];

type Socket = WebSocketStream<TcpStream>;

/// Connects with one subprotocol, which the server must select.
pub(crate) async fn connect(url: &str, subprotocol: &str) -> Result<Socket> {
    let mut request = url.replacen("http://", "ws://", 1).into_client_request()?;
    request.headers_mut().insert(
        "Sec-WebSocket-Protocol",
        HeaderValue::from_str(subprotocol)?,
    );
    let host = request.uri().authority().map(ToString::to_string);
    let socket = TcpStream::connect(host.unwrap_or_default()).await?;
    socket.set_nodelay(true)?;
    let (socket, answer) = tokio_tungstenite::client_async(request, socket).await?;
    let chosen = answer.headers().get("Sec-WebSocket-Protocol");
    ensure!(
        chosen.is_some_and(|chosen| chosen == subprotocol),
        "the server chose {chosen:?}"
    );
    Ok(socket)
}

/// Sending half of a session.
pub(crate) struct Channels {
    sink: SplitSink<Socket, Message>,
    reading: JoinHandle<()>,
}

impl Channels {
    /// Sends bytes on a channel.
    pub(crate) async fn send(&mut self, name: &str, data: &[u8]) -> Result {
        for piece in data.chunks(32 << 10) {
            let message = [&[number(name)?], piece].concat();
            self.sink.send(Message::Binary(message.into())).await?;
        }
        Ok(())
    }

    /// Half-closes a channel.
    pub(crate) async fn close(&mut self, name: &str) -> Result {
        let message = vec![255, number(name)?];
        Ok(self.sink.send(Message::Binary(message.into())).await?)
    }
}

impl Drop for Channels {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

fn number(name: &str) -> Result<u8> {
    match NAMES.iter().position(|&known| known == name) {
        Some(number) => Ok(number as u8),
        None => bail!("no channel {name}"),
    }
}

type Incoming = HashMap<&'static str, mpsc::UnboundedReceiver<Bytes>>;

/// Opens a session with these channels.
pub(crate) async fn open(url: &str, names: &[&'static str]) -> Result<(Channels, Incoming)> {
    let (sink, mut source) = connect(url, "v5.channel.k8s.io").await?.split();
    let (mut senders, mut incoming) = (HashMap::new(), HashMap::new());
    for &name in names {
        let (sender, receiver) = mpsc::unbounded_channel();
        senders.insert(number(name)?, sender);
        incoming.insert(name, receiver);
    }
    let reading = tokio::spawn(async move {
        while let Some(Ok(message)) = source.next().await {
            if let Message::Binary(bytes) = message
                && let Some(sender) = bytes.first().and_then(|channel| senders.get(channel))
                && bytes.len() > 1
            {
                let _ = sender.send(bytes.slice(1..));
            }
        }
    });
    Ok((Channels { sink, reading }, incoming))
}

/// Opens a byte stream through a WebSocket, for SPDY in binary messages.
pub(crate) async fn tunnel(url: &str, subprotocol: &str) -> Result<DuplexStream> {
    let (mut sink, mut source) = connect(url, subprotocol).await?.split();
    let (near, far) = tokio::io::duplex(64 << 10);
    let (mut from, mut to) = tokio::io::split(far);
    // Both tasks end with the connection or the returned half.
    tokio::spawn(async move {
        while let Some(Ok(message)) = source.next().await {
            if let Message::Binary(bytes) = message
                && to.write_all(&bytes).await.is_err()
            {
                break;
            }
        }
        let _ = to.shutdown().await;
    });
    tokio::spawn(async move {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            let message = Message::Binary(Bytes::copy_from_slice(&buffer[..length]));
            if sink.send(message).await.is_err() {
                break;
            }
        }
        let _ = sink.close().await;
    });
    Ok(near)
}
