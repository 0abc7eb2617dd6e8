//! Polls a condition with a deadline. Tests wait through this module instead of sleeping for a fixed time.

use crate::bail;
use crate::failure::Result;
use std::time::{Duration, Instant};

/// Interval between two attempts.
const POLL_INTERVAL: Duration = Duration::from_millis(25);

/// Repeats `look` until it returns a value. Its error text describes the current state and is part of the failure after
/// the time limit.
pub(crate) async fn until<T, F, Fut>(what: &str, limit: Duration, look: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    until_every(POLL_INTERVAL, what, limit, look).await
}

/// Repeats `look` as [`until`] does, with another interval for an attempt that costs more, such as a program.
pub(crate) async fn until_every<T, F, Fut>(
    interval: Duration,
    what: &str,
    limit: Duration,
    mut look: F,
) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let start = Instant::now();
    loop {
        let seen = match look().await {
            Ok(value) => return Ok(value),
            Err(seen) => seen,
        };
        if start.elapsed() > limit {
            bail!(
                "{what}: not within {:.1} s; last seen: {seen}",
                limit.as_secs_f64()
            );
        }
        tokio::time::sleep(interval).await;
    }
}
