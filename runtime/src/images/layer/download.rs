//! The async side of a layer: reads the blob from the registry into the conversion's channel.
//!
//! Writes and hashes nothing. A cut connection is opened again at the byte where it ended, on the same host or the next
//! one, a bounded number of times. Called by `layer`, calls `registry`.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::images::error::{ImageError, ImageResult};
use crate::images::manifest::Descriptor;
use crate::images::registry::{BlobStream, Session};

/// Chunks between download and conversion. hyper's are at most some hundred KiB, so a few MiB wait at most.
const CHANNEL_CHUNKS: usize = 16;
/// Connections in a row that may fail without a single new byte.
const MAX_FAILURES: u32 = 5;
/// Connections of one blob at all: a server that gives a byte at a time must not keep a pull alive for ever.
const MAX_CONNECTIONS: usize = 64;
/// Pause after the first failure; doubles, up to `MAX_PAUSE`.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// What the conversion receives. A channel that closes without `End` means: give up.
#[derive(Debug)]
pub(super) enum Piece {
    Data(Bytes),
    End,
}

pub(super) fn channel() -> (mpsc::Sender<Piece>, mpsc::Receiver<Piece>) {
    mpsc::channel(CHANNEL_CHUNKS)
}

/// Sends the blob from byte `have` to its end, then `End`. `received` is told the bytes that are through, `have` included.
///
/// Ends without an error when the receiver is gone: the conversion then has the reason. Dropping the future closes the
/// channel and the connection.
pub(super) async fn feed(
    session: &Session,
    blob: &Descriptor,
    have: u64,
    sender: mpsc::Sender<Piece>,
    received: impl Fn(u64) + Send + Sync,
) -> ImageResult<()> {
    let mut done = have;
    let mut failures = 0;
    let mut connections = 0;
    while done < blob.size {
        let before = done;
        let outcome = match session.blob(&blob.digest, done, failures as usize).await {
            Ok(stream) => read(stream, blob, &mut done, &sender, &received).await,
            Err(e) => Err(e),
        };
        let Err(error) = outcome else { continue };
        connections += 1;
        failures = if done > before { 1 } else { failures + 1 };
        if !error.is_transient() || failures > MAX_FAILURES || connections > MAX_CONNECTIONS {
            return Err(error);
        }
        if sender.is_closed() {
            return Ok(());
        }
        tracing::debug!(blob = %blob.digest, at = done, error = %error.report(), "blob download continues");
        tokio::time::sleep((FIRST_PAUSE * 2u32.pow(failures - 1)).min(MAX_PAUSE)).await;
    }
    // The receiver may be gone with an error of its own.
    let _ = sender.send(Piece::End).await;
    Ok(())
}

/// Reads one connection to its end. More bytes than the descriptor has are an error at once.
async fn read(
    mut stream: BlobStream,
    blob: &Descriptor,
    done: &mut u64,
    sender: &mpsc::Sender<Piece>,
    received: &(impl Fn(u64) + Sync),
) -> ImageResult<()> {
    let what = || format!("blob {}", blob.digest);
    let size = |got: String| ImageError::corrupt(what(), format!("{} bytes", blob.size), got);
    let cut = |e| ImageError::transport(&stream.host, what(), e);
    while let Some(mut chunk) = stream.response.chunk().await.map_err(cut)? {
        if stream.skip > 0 {
            let skipped = (chunk.len() as u64).min(stream.skip);
            stream.skip -= skipped;
            drop(chunk.split_to(skipped as usize));
        }
        if chunk.is_empty() {
            continue;
        }
        if *done + chunk.len() as u64 > blob.size {
            return Err(size(format!("more (from {})", stream.host)));
        }
        let length = chunk.len() as u64;
        if sender.send(Piece::Data(chunk)).await.is_err() {
            // Counts as complete: the conversion has failed and says why.
            *done = blob.size;
            return Ok(());
        }
        *done += length;
        received(*done);
    }
    if *done < blob.size {
        return Err(size(format!("{done} (from {})", stream.host)));
    }
    Ok(())
}
