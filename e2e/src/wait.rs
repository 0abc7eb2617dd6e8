//! Waiting for a condition with a deadline: the only way in which anything here waits. No test sleeps a fixed time and
//! hopes.

use crate::bail;
use crate::outcome::Result;
use std::time::{Duration, Instant};

/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(25);

/// Looks until `look` gives a value; its `Err` text is what was seen instead, shown when the time is over.
pub async fn until<T, F, Fut>(what: &str, limit: Duration, mut look: F) -> Result<T>
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
        tokio::time::sleep(PAUSE).await;
    }
}
