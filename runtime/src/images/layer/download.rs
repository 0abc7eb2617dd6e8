//! The async half of a layer job: reads the blob from the registry into the channel of the conversion.
//!
//! A broken connection is resumed at the byte where it ended, on the same host or the next one, a bounded number of times.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::Rate;
use crate::failpoint;
use crate::images::error::{ImageError, ImageResult};
use crate::images::manifest::Descriptor;
use crate::images::registry::{BlobStream, Session};

/// Capacity of the channel between download and conversion. hyper's chunks have at most some hundred KiB, so the channel
/// holds a few MiB.
const CHANNEL_CHUNKS: usize = 16;
/// Maximum number of consecutive connections without a new byte.
const MAX_CONSECUTIVE_FAILURES: u32 = 5;
/// Maximum number of connections per blob, so that a server that sends one byte each time cannot keep a pull alive.
const MAX_CONNECTIONS: usize = 64;
/// Delay after the first failure; doubles up to `MAX_RETRY_DELAY`.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(200);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(5);

/// Input of the conversion. A channel that closes without `End` cancels it.
#[derive(Debug)]
pub(super) enum Piece {
    Data(Bytes),
    End,
}

pub(super) fn channel() -> (mpsc::Sender<Piece>, mpsc::Receiver<Piece>) {
    mpsc::channel(CHANNEL_CHUNKS)
}

/// Sends the blob from byte `have` to its end, then `End`. `received` is called with the number of bytes sent so far,
/// including `have`.
///
/// Returns Ok if the receiver is gone: the conversion then has the error. Dropping the future closes the channel and the
/// connection.
pub(super) async fn feed(
    session: &Session,
    blob: &Descriptor,
    rate: Rate,
    have: u64,
    sender: mpsc::Sender<Piece>,
    received: impl Fn(u64) + Send + Sync,
) -> ImageResult<()> {
    failpoint::reach("image.download").await?;
    let mut done = have;
    let mut failures = 0;
    let mut connections = 0;
    while done < blob.size {
        let before = done;
        let outcome = match session.blob(&blob.digest, done, failures as usize).await {
            Ok(stream) => read(stream, blob, rate, &mut done, &sender, &received).await,
            Err(e) => Err(e),
        };
        let Err(error) = outcome else { continue };
        connections += 1;
        let slow = matches!(error, ImageError::TooSlow { .. });
        failures = if done > before && !slow {
            1
        } else {
            failures + 1
        };
        if !error.is_transient()
            || failures > MAX_CONSECUTIVE_FAILURES
            || connections > MAX_CONNECTIONS
        {
            return Err(error);
        }
        if sender.is_closed() {
            return Ok(());
        }
        tracing::debug!(blob = %blob.digest, at = done, error = %error.report(), "resuming blob download");
        tokio::time::sleep((MIN_RETRY_DELAY * 2u32.pow(failures - 1)).min(MAX_RETRY_DELAY)).await;
    }
    failpoint::reach("image.downloaded").await?;
    // The receiver may be gone after an error of the conversion.
    let _ = sender.send(Piece::End).await;
    Ok(())
}

/// Reads one connection to its end. Fails as soon as there are more bytes than in the descriptor.
async fn read(
    mut stream: BlobStream,
    blob: &Descriptor,
    rate: Rate,
    done: &mut u64,
    sender: &mpsc::Sender<Piece>,
    received: &(impl Fn(u64) + Sync),
) -> ImageResult<()> {
    let what = || format!("blob {}", blob.digest);
    let size = |got: String| ImageError::corrupt(what(), format!("{} bytes", blob.size), got);
    let cut = |e| ImageError::transport(&stream.host, what(), e);
    let mut meter = Meter::new(rate);
    loop {
        let asked = Instant::now();
        let Some(mut chunk) = stream.response.chunk().await.map_err(cut)? else {
            break;
        };
        if let Some(measured) = meter.slow(asked.elapsed(), chunk.len() as u64) {
            return Err(ImageError::TooSlow {
                host: stream.host,
                subject: what(),
                rate: measured,
                minimum: rate.minimum,
            });
        }
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
            // Counts as complete: the conversion has failed and reports the error.
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

/// Measures the rate of a connection over consecutive windows.
struct Meter {
    rate: Rate,
    /// Time spent waiting for the registry, and bytes received, in this window.
    waited: Duration,
    bytes: u64,
}

impl Meter {
    fn new(rate: Rate) -> Self {
        Self {
            rate,
            waited: Duration::ZERO,
            bytes: 0,
        }
    }

    /// Adds a chunk. Returns the rate in bytes per second if it was below the minimum for a whole window.
    fn slow(&mut self, waited: Duration, bytes: u64) -> Option<u64> {
        self.waited += waited;
        self.bytes += bytes;
        if self.waited < self.rate.window {
            return None;
        }
        let measured = (self.bytes as f64 / self.waited.as_secs_f64()) as u64;
        (self.waited, self.bytes) = (Duration::ZERO, 0);
        (measured < self.rate.minimum).then_some(measured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meter_reports_rates_below_minimum_per_window() {
        let second = Duration::from_secs(1);
        let mut meter = Meter::new(Rate {
            minimum: 100,
            window: 10 * second,
        });
        // A burst counts for its window only.
        assert_eq!(meter.slow(second, 1_000_000), None);
        assert_eq!(meter.slow(9 * second, 1), None);
        assert!((0..9).all(|_| meter.slow(second, 99).is_none()));
        assert_eq!(meter.slow(second, 99), Some(99));
        assert!((0..10).all(|_| meter.slow(second, 100).is_none()));
        let mut any = Meter::new(Rate {
            minimum: 0,
            window: second,
        });
        assert_eq!(any.slow(60 * second, 1), None);
    }
}
