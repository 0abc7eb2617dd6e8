//! The client of an exec or attach as a set of streams: [`Remote`], created from SPDY streams or from channels of a
//! WebSocket.

use super::input::Input;
use super::outcome::Outcome;
use super::output::Output;
use super::protocol::{RequestedStreams, Version};
use super::spdy;
use super::websocket::channels::{self, Channels};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

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
    /// Creates a remote from the channels of a WebSocket. An empty message on the lowest channel signals the connection
    /// to the client.
    pub(crate) fn of_channels(
        channels: &mut Channels,
        wanted: RequestedStreams,
        version: Version,
    ) -> Self {
        let lowest = match wanted {
            RequestedStreams { stdout: true, .. } => channels::STDOUT,
            RequestedStreams { stderr: true, .. } => channels::STDERR,
            _ => channels::ERROR,
        };
        channels.announce(lowest);
        let output = |channel| Output::Channel(channels.output(channel));
        let (stdout, stderr) = (
            wanted.stdout.then(|| output(channels::STDOUT)),
            wanted.stderr.then(|| output(channels::STDERR)),
        );
        let error = output(channels::ERROR);
        Self {
            stdin: wanted.stdin.then(|| channels.input(channels::STDIN)),
            stdout,
            stderr,
            error,
            resize: wanted.tty.then(|| channels.input(channels::RESIZE)),
            version,
            gone: channels.gone().clone(),
            unused: Vec::new(),
        }
    }

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
