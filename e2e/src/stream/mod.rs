//! Streaming client like kubectl and the kubelet: exec and attach sessions over SPDY/3.1 and WebSocket, and port-forward
//! over SPDY, plain or tunneled.
//!
//! Implements SPDY itself (`spdy`), WebSocket with tungstenite (`websocket`) and port-forward (`forward`), and shares no code with the product.
//! `cases/streaming.rs` makes the assertions.

pub(crate) mod forward;
pub(crate) mod spdy;
pub(crate) mod websocket;

use crate::failure::Result;
use crate::{bail, ensure};
use bytes::Bytes;
use std::collections::HashMap;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// Time limit for one message of the server, generous for a busy machine.
pub(crate) const MESSAGE_TIMEOUT: Duration = Duration::from_secs(60);

/// Transport of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Spdy,
    /// WebSocket with version 5 of the channel protocol.
    WebSocket,
}

/// Streams of a session by their Kubernetes names.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Streams {
    pub stdin: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// An exec or attach session.
pub(crate) struct Session {
    incoming: HashMap<&'static str, mpsc::UnboundedReceiver<Bytes>>,
    wire: Wire,
}

enum Wire {
    Spdy {
        client: spdy::Client,
        ids: HashMap<&'static str, u32>,
    },
    WebSocket(websocket::Channels),
}

impl Session {
    /// Connects to the URL of an Exec or Attach response. Stdout is always requested.
    pub(crate) async fn open(url: &str, transport: Transport, streams: Streams) -> Result<Self> {
        let mut names = vec!["error"];
        for (name, wanted) in [
            ("stdin", streams.stdin),
            ("stdout", true),
            ("stderr", streams.stderr),
            ("resize", streams.tty),
        ] {
            if wanted {
                names.push(name);
            }
        }
        if transport == Transport::WebSocket {
            let (channels, incoming) = websocket::open(url, &names).await?;
            return Ok(Self {
                incoming,
                wire: Wire::WebSocket(channels),
            });
        }
        let (socket, protocol) = upgrade_spdy(url, "v4.channel.k8s.io").await?;
        ensure!(protocol == "v4.channel.k8s.io", "negotiated {protocol:?}");
        let mut client = spdy::Client::new(socket);
        let (mut ids, mut incoming) = (HashMap::new(), HashMap::new());
        for name in names {
            let stream = client.open(&[("streamtype", name)]).await?;
            ids.insert(name, stream.id);
            incoming.insert(name, stream.incoming);
        }
        Ok(Self {
            incoming,
            wire: Wire::Spdy { client, ids },
        })
    }

    /// Sends bytes on a stream.
    pub(crate) async fn send(&mut self, name: &str, data: &[u8]) -> Result {
        match &mut self.wire {
            Wire::Spdy { client, ids } => client.send(ids[name], data, false).await,
            Wire::WebSocket(channels) => channels.send(name, data).await,
        }
    }

    /// Half-closes a stream.
    pub(crate) async fn close(&mut self, name: &str) -> Result {
        match &mut self.wire {
            Wire::Spdy { client, ids } => client.send(ids[name], b"", true).await,
            Wire::WebSocket(channels) => channels.close(name).await,
        }
    }

    /// Sends the terminal size.
    pub(crate) async fn resize(&mut self, width: u16, height: u16) -> Result {
        let size = serde_json::json!({ "Width": width, "Height": height }).to_string();
        self.send("resize", size.as_bytes()).await
    }

    /// Sends the terminal size and waits until a command that answers each line with `stty size` reports it.
    pub(crate) async fn resize_and_see(&mut self, width: u16, height: u16) -> Result {
        self.resize(width, height).await?;
        let size = format!("{height} {width}");
        let mut seen = String::new();
        // The size uses another channel than the input and may arrive later.
        for _ in 0..200 {
            self.send("stdin", b"\n").await?;
            seen = self.until("stdout", "\n").await?;
            if seen.contains(&size) {
                break;
            }
        }
        ensure!(seen.contains(&size), "{size} was not seen: {seen:?}");
        Ok(())
    }

    /// Returns the next bytes of a stream, or `None` at its end.
    pub(crate) async fn next(&mut self, name: &str) -> Result<Option<Bytes>> {
        let Some(incoming) = self.incoming.get_mut(name) else {
            bail!("the session has no {name}");
        };
        match tokio::time::timeout(MESSAGE_TIMEOUT, incoming.recv()).await {
            Ok(bytes) => Ok(bytes),
            Err(_) => bail!("nothing on {name} within {MESSAGE_TIMEOUT:?}"),
        }
    }

    /// Reads a stream until it contains `text` and returns everything read.
    pub(crate) async fn until(&mut self, name: &str, text: &str) -> Result<String> {
        let mut read = Vec::new();
        let mut looked = 0;
        loop {
            let from = read.len().min(looked);
            if read[from..]
                .windows(text.len())
                .any(|at| at == text.as_bytes())
            {
                return Ok(String::from_utf8_lossy(&read).into_owned());
            }
            looked = read.len().saturating_sub(text.len());
            match self.next(name).await? {
                Some(bytes) => read.extend_from_slice(&bytes),
                None => bail!(
                    "{name} ended without {text:?}: {:?}",
                    String::from_utf8_lossy(&read)
                ),
            }
        }
    }

    /// Returns the remaining bytes of a stream.
    pub(crate) async fn rest(&mut self, name: &str) -> Result<Vec<u8>> {
        let mut read = Vec::new();
        while let Some(bytes) = self.next(name).await? {
            read.extend_from_slice(&bytes);
        }
        Ok(read)
    }

    /// Returns the exit code from the error stream.
    pub(crate) async fn exit_code(&mut self) -> Result<i32> {
        let status = self.status().await?;
        if status["status"] == "Success" {
            return Ok(0);
        }
        ensure!(status["reason"] == "NonZeroExitCode", "{status}");
        let code = &status["details"]["causes"][0];
        ensure!(code["reason"] == "ExitCode", "{status}");
        Ok(code["message"].as_str().unwrap_or_default().parse()?)
    }

    /// Returns the metav1.Status from the error stream.
    pub(crate) async fn status(&mut self) -> Result<serde_json::Value> {
        let bytes = self.rest("error").await?;
        ensure!(!bytes.is_empty(), "the error stream ended without a status");
        Ok(serde_json::from_slice(&bytes)?)
    }
}

/// Upgrades a connection to SPDY. Returns it with the protocol that the server selected.
pub(crate) async fn upgrade_spdy(url: &str, protocol: &str) -> Result<(TcpStream, String)> {
    let head = format!(
        "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocol}\r\n"
    );
    let (socket, status, answer) = request(url, "POST", &head).await?;
    ensure!(status == 101, "{answer}");
    let chosen = answer
        .lines()
        .find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("x-stream-protocol-version")
                .then(|| value.trim().to_owned())
        })
        .unwrap_or_default();
    Ok((socket, chosen))
}

/// Sends a request head to `url` and reads the response head. Returns the socket, positioned after both.
pub(crate) async fn request(
    url: &str,
    method: &str,
    headers: &str,
) -> Result<(TcpStream, u16, String)> {
    let Some((host, path)) = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split_once('/'))
    else {
        bail!("{url:?} is not an http URL");
    };
    let mut socket = TcpStream::connect(host).await?;
    socket.set_nodelay(true)?;
    let head = format!("{method} /{path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n");
    socket.write_all(head.as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        ensure!(answer.len() < 8192, "an endless head");
        match tokio::time::timeout(MESSAGE_TIMEOUT, socket.read_u8()).await {
            Ok(byte) => answer.push(byte?),
            Err(_) => bail!("no answer to {method} within {MESSAGE_TIMEOUT:?}"),
        }
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer
        .split_whitespace()
        .nth(1)
        .unwrap_or_default()
        .parse()?;
    Ok((socket, status, answer))
}
