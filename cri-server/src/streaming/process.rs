//! Connects a client ([`Remote`]) with a process of a container: exec and attach.
//!
//! ```text
//!  stdin ─▶ Execution.SendInput        Execution.Attach ─▶ stdout, stderr
//!  resize ─▶ Execution.ResizeTty       its end, then Execution.Wait ─▶ error stream: metav1.Status
//! ```
//!
//! Nothing is buffered here: a client that does not read stops the reads of the guest's output, whose full buffer
//! then blocks an exec'd process. The init process of a container is not blocked by attached clients, because its
//! output goes to the log; a client that falls too far behind gets an error and is disconnected. A disconnecting
//! client ends the process that it started by exec.

use super::input::Input;
use super::outcome::Outcome;
use super::protocol::RequestedStreams;
use super::remote::Remote;
use boxlite_portal::{GuestErrorKind, PortalError};
use boxlite_proto::boxlite::v1::OutputStream;
use boxlite_runtime::{LiteBox, ProcessControls, ProcessSession, RuntimeError, report};
use bytes::Bytes;
use futures::Stream;
use serde::Deserialize;

/// Maximum number of bytes of an incomplete resize message.
const MAX_RESIZE_BYTES: usize = 1 << 10;

/// Request of Exec.
#[derive(Debug, Clone)]
pub(crate) struct Exec {
    pub pod: LiteBox,
    pub container: String,
    pub argv: Vec<String>,
    pub streams: RequestedStreams,
}

/// Request of Attach.
#[derive(Debug, Clone)]
pub(crate) struct Attach {
    pub pod: LiteBox,
    pub container: String,
    pub streams: RequestedStreams,
    /// True if the container has a stdin.
    pub has_stdin: bool,
}

/// Reason why a session ended.
enum Ended {
    /// The output of the process ended.
    Output,
    /// The client disconnected, or the daemon is stopping.
    Gone,
    /// The guest failed.
    Broken(PortalError),
}

/// Runs a command for `remote` to completion. After completion only processes remain that the command left behind;
/// dropping the future leaves the command running.
pub(crate) async fn exec(exec: Exec, mut remote: Remote) {
    let RequestedStreams { tty, stdin, .. } = exec.streams;
    let started = exec
        .pod
        .exec_session(&exec.container, &exec.argv, tty, stdin)
        .await;
    let mut session = match started {
        Ok(session) => session,
        Err(error) => return failed(remote, "error executing command in container", &error).await,
    };
    let outcome = match join(&mut session, &mut remote, stdin).await {
        Ended::Output => match session.wait().await {
            Ok(exit) if exit.code == 0 => Outcome::Success,
            Ok(exit) => Outcome::Exit(exit.code),
            Err(error) => broken(&exec.pod, &exec.container, error).await,
        },
        Ended::Gone => return session.end(true).await,
        Ended::Broken(error) => {
            let outcome = broken(&exec.pod, &exec.container, error).await;
            tokio::join!(remote.finish(&outcome), session.end(true));
            return;
        }
    };
    tokio::join!(remote.finish(&outcome), session.end(false));
}

/// Connects `remote` with the init process of a container until either ends. Dropping the future does not affect the
/// process.
pub(crate) async fn attach(attach: Attach, mut remote: Remote) {
    let mut session = match attach.pod.attach_session(&attach.container).await {
        Ok(session) => session,
        Err(error) => return failed(remote, "error attaching to container", &error).await,
    };
    let forwards_stdin = attach.streams.stdin && attach.has_stdin;
    let outcome = match join(&mut session, &mut remote, forwards_stdin).await {
        Ended::Output => Outcome::Success,
        Ended::Gone => {
            if forwards_stdin {
                // Also ends the stdin of the process; the guest closes it if the container requests that
                // (stdin_once).
                let _ = session
                    .controls()
                    .send_input(futures::stream::empty())
                    .await;
            }
            return;
        }
        Ended::Broken(error) if error.guest_kind() == Some(GuestErrorKind::OutputGone) => {
            Outcome::Failed("client too slow: it missed output, which is in the log".into())
        }
        Ended::Broken(error) => broken(&attach.pod, &attach.container, error).await,
    };
    remote.finish(&outcome).await;
}

/// Returns the outcome of a session whose guest failed.
async fn broken(pod: &LiteBox, container: &str, error: PortalError) -> Outcome {
    let action = format!("stream the process of container {container:?}");
    Outcome::Failed(report(&pod.guest_error(action, error).await))
}

async fn failed(remote: Remote, what: &str, error: &RuntimeError) {
    let reason = format!("{what}: {}", report(error));
    tracing::debug!(reason, "streaming session did not start");
    remote.finish(&Outcome::Failed(reason)).await;
}

/// Copies data until the output ends or the client disconnects. Without `forwards_stdin` the client's input is
/// discarded.
async fn join(session: &mut ProcessSession, remote: &mut Remote, forwards_stdin: bool) -> Ended {
    let (controls, gone) = (session.controls(), remote.gone.clone());
    let input = copy_input(remote.stdin.take(), forwards_stdin, &controls);
    let resize = resize(remote.resize.take(), &controls);
    // The end of the input does not end the session.
    let side = async {
        tokio::join!(input, resize);
        std::future::pending::<Ended>().await
    };
    tokio::select! {
        biased;
        () = gone.cancelled() => Ended::Gone,
        ended = copy_output(session, remote) => ended,
        ended = side => ended,
    }
}

/// Copies the output of the process to the client until it ends. Streams that the client did not request are read and
/// discarded.
async fn copy_output(session: &mut ProcessSession, remote: &mut Remote) -> Ended {
    let output = session.output();
    loop {
        let chunk = match output.next().await {
            Ok(Some(chunk)) => chunk,
            Ok(None) => return Ended::Output,
            Err(error) => return Ended::Broken(error),
        };
        let place = match chunk.stream {
            OutputStream::Stderr => &mut remote.stderr,
            _ => &mut remote.stdout,
        };
        if let Some(stream) = place
            && stream.write(chunk.data).await.is_err()
        {
            *place = None;
        }
        if let Err(error) = output.ack_if_due().await {
            return Ended::Broken(error);
        }
    }
}

/// Copies the client's input to the process until it ends.
async fn copy_input(input: Option<Input>, forwards_stdin: bool, controls: &ProcessControls) {
    let Some(mut input) = input else { return };
    if !forwards_stdin {
        // Read and discarded, so that the client does not block.
        while let Ok(Some(_)) = input.next().await {}
        return;
    }
    if let Err(error) = controls.send_input(chunks(input)).await {
        tracing::debug!(
            error = report(&error),
            "failed to forward input of streaming session"
        );
    }
}

/// Converts the client's input to a stream.
pub(crate) fn chunks(input: Input) -> impl Stream<Item = Bytes> + Send + 'static {
    futures::stream::unfold(input, |mut input| async move {
        let chunk = input.next().await.ok().flatten()?;
        Some((chunk, input))
    })
}

/// A terminal size in characters, in the clients' encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
struct Size {
    #[serde(rename = "Width", alias = "width")]
    width: u16,
    #[serde(rename = "Height", alias = "height")]
    height: u16,
}

/// Applies the client's resize messages until they end or one is invalid.
async fn resize(input: Option<Input>, controls: &ProcessControls) {
    let Some(mut input) = input else { return };
    let mut text = Vec::new();
    while let Ok(Some(chunk)) = input.next().await {
        text.extend_from_slice(&chunk);
        let Some((sizes, used)) = sizes(&text) else {
            tracing::debug!("client sent an invalid resize message");
            break;
        };
        text.drain(..used);
        // Only the last size matters.
        if let Some(size) = sizes.last()
            && let Err(error) = controls.resize(size.height, size.width).await
        {
            tracing::debug!(error = report(&error), "failed to resize terminal");
        }
    }
    while let Ok(Some(_)) = input.next().await {}
}

/// Parses the complete sizes at the start of `text` and returns them with their length; `None` if `text` is invalid.
fn sizes(text: &[u8]) -> Option<(Vec<Size>, usize)> {
    let mut values = serde_json::Deserializer::from_slice(text).into_iter::<Size>();
    let (mut sizes, mut used) = (Vec::new(), 0);
    loop {
        match values.next() {
            None => return Some((sizes, text.len())),
            Some(Ok(size)) => {
                sizes.push(size);
                used = values.byte_offset();
            }
            Some(Err(error)) if error.is_eof() && text.len() - used <= MAX_RESIZE_BYTES => {
                return Some((sizes, used));
            }
            Some(Err(_)) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_parses_partial_messages() {
        let size = |width, height| Size { width, height };
        let text = br#"{"Width":80,"Height":24} {"Width":132,"Height":50}{"Wid"#;
        assert_eq!(sizes(text), Some((vec![size(80, 24), size(132, 50)], 50)));
        assert_eq!(sizes(b"{"), Some((vec![], 0)));
        assert_eq!(sizes(b"nonsense"), None);
        assert_eq!(sizes(br#"{"Width":-1,"Height":24}"#), None);
        let endless = [br#"{"Width":8"#.as_slice(), &[b' '; 2 * MAX_RESIZE_BYTES]].concat();
        assert_eq!(sizes(&endless), None);
    }

    proptest! {
        #[test]
        fn sizes_never_panics(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some((_, used)) = sizes(&text) {
                prop_assert!(used <= text.len());
            }
        }
    }
}
