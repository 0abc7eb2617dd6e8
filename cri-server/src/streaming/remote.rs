//! The client of an exec or attach as a set of streams: [`Remote`]. Created here from SPDY streams, and in
//! `websocket` from channels.

use super::outcome::Outcome;
use super::pipe::{Input, Output};
use super::spdy;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Streams requested by a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RequestedStreams {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// Version of the remote command protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    /// Errors are plain text.
    V1,
    /// V1 with corrections.
    V2,
    /// Adds resize.
    V3,
    /// Adds metav1.Status on the error stream.
    V4,
    /// Adds half-close over WebSocket.
    V5,
}

impl Version {
    /// Parses the name of a subprotocol without base64.
    pub(crate) fn named(name: &str) -> Option<Self> {
        match name {
            "channel.k8s.io" => Some(Self::V1),
            "v2.channel.k8s.io" => Some(Self::V2),
            "v3.channel.k8s.io" => Some(Self::V3),
            "v4.channel.k8s.io" => Some(Self::V4),
            "v5.channel.k8s.io" => Some(Self::V5),
            _ => None,
        }
    }

    /// Returns whether errors are JSON.
    pub(crate) fn json(self) -> bool {
        self >= Self::V4
    }

    fn resizes(self) -> bool {
        self >= Self::V3
    }
}

/// A client with its streams.
#[derive(Debug)]
pub(crate) struct Remote {
    pub stdin: Option<Input>,
    pub stdout: Option<Output>,
    pub stderr: Option<Output>,
    pub error: Output,
    pub resize: Option<Input>,
    pub version: Version,
    /// Cancelled when the client disconnects.
    pub gone: CancellationToken,
    /// Unused halves of streams, which end with the session.
    pub unused: Vec<Output>,
}

impl Remote {
    /// Sends the outcome to the client and ends all its streams, output first: clients treat the end of the error
    /// stream as the end of the session.
    pub(crate) async fn finish(self, outcome: &Outcome) {
        let Self {
            stdout,
            stderr,
            mut error,
            version,
            unused,
            ..
        } = self;
        for output in [stdout, stderr].into_iter().flatten() {
            output.finish().await;
        }
        if let Some(message) = outcome.message(version.json()) {
            let _ = error.write(message).await;
        }
        error.finish().await;
        for output in unused {
            output.finish().await;
        }
    }
}

/// Reason why a client did not become a [`Remote`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoteError {
    /// It disconnected.
    #[error("client disconnected before it opened all streams")]
    Left,
    /// It did not open all requested streams.
    #[error("client opened {opened} of {expected} streams within {limit:?}")]
    Late {
        opened: usize,
        expected: usize,
        limit: Duration,
    },
}

/// Waits until the client has opened all requested streams, at most for `limit`. Other streams are reset.
///
/// # Errors
/// The client did not open them in time.
pub(crate) async fn collect(
    accept: &mut spdy::Accept,
    wanted: RequestedStreams,
    version: Version,
    gone: CancellationToken,
    limit: Duration,
) -> Result<Remote, RemoteError> {
    let mut streams = Streams::default();
    let expected = Streams::expected(wanted, version);
    let collecting = async {
        while streams.count() < expected {
            let stream = accept.recv().await.ok_or(RemoteError::Left)?;
            if let Some(stream) = streams.place(stream, wanted, version) {
                tracing::debug!(
                    kind = stream.headers.get(STREAM_TYPE),
                    "resetting unexpected stream of client"
                );
                stream.output.reset().await;
            }
        }
        Ok(())
    };
    let collected = tokio::select! {
        collected = tokio::time::timeout(limit, collecting) => collected,
        () = gone.cancelled() => return Err(RemoteError::Left),
    };
    match collected {
        Ok(done) => done?,
        Err(_) => {
            return Err(RemoteError::Late {
                opened: streams.count(),
                expected,
                limit,
            });
        }
    }
    streams.into_remote(version, gone).ok_or(RemoteError::Left)
}

/// Header with the purpose of a stream.
pub(crate) const STREAM_TYPE: &str = "streamtype";

#[derive(Default)]
struct Streams {
    stdin: Option<spdy::Stream>,
    stdout: Option<spdy::Stream>,
    stderr: Option<spdy::Stream>,
    error: Option<spdy::Stream>,
    resize: Option<spdy::Stream>,
}

impl Streams {
    fn expected(wanted: RequestedStreams, version: Version) -> usize {
        let resize = wanted.tty && version.resizes();
        1 + [wanted.stdin, wanted.stdout, wanted.stderr, resize]
            .into_iter()
            .filter(|asked| *asked)
            .count()
    }

    fn count(&self) -> usize {
        [
            &self.stdin,
            &self.stdout,
            &self.stderr,
            &self.error,
            &self.resize,
        ]
        .into_iter()
        .flatten()
        .count()
    }

    /// Assigns a stream; returns it if it is unexpected.
    fn place(
        &mut self,
        stream: spdy::Stream,
        wanted: RequestedStreams,
        version: Version,
    ) -> Option<spdy::Stream> {
        let place = match stream.headers.get(STREAM_TYPE) {
            "error" => &mut self.error,
            "stdin" if wanted.stdin => &mut self.stdin,
            "stdout" if wanted.stdout => &mut self.stdout,
            "stderr" if wanted.stderr => &mut self.stderr,
            "resize" if wanted.tty && version.resizes() => &mut self.resize,
            _ => return Some(stream),
        };
        if place.is_some() {
            return Some(stream);
        }
        *place = Some(stream);
        None
    }

    fn into_remote(self, version: Version, gone: CancellationToken) -> Option<Remote> {
        let mut unused = Vec::new();
        let mut input = |stream: Option<spdy::Stream>| {
            stream.map(|stream| {
                unused.push(Output::Spdy(stream.output));
                stream.input
            })
        };
        let output =
            |stream: Option<spdy::Stream>| stream.map(|stream| Output::Spdy(stream.output));
        Some(Remote {
            stdin: input(self.stdin),
            resize: input(self.resize),
            stdout: output(self.stdout),
            stderr: output(self.stderr),
            error: output(self.error)?,
            version,
            gone,
            unused,
        })
    }
}
