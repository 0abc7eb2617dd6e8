//! The streaming forms of the lists: the same answer, in batches that stay below the message limit.

use futures::stream::{self, BoxStream, StreamExt};
use tonic::{Response, Status};

/// Items of one batch. One item is a few KiB at most (labels and annotations), 256 KiB by the kubelet's limits; 16 MiB is the most a
/// client reads.
const BATCH_SIZE: usize = 50;

/// Answer of a streaming call.
pub type Stream<T> = BoxStream<'static, Result<T, Status>>;

/// `items` in batches, each made a message by `message`. No item, no message.
pub fn batches<I, T>(
    items: Vec<I>,
    message: impl Fn(Vec<I>) -> T + Send + 'static,
) -> Response<Stream<T>>
where
    I: Send + 'static,
    T: Send + 'static,
{
    let mut rest = items.into_iter().peekable();
    let batches = std::iter::from_fn(move || {
        rest.peek()?;
        Some(Ok(message(rest.by_ref().take(BATCH_SIZE).collect())))
    });
    Response::new(stream::iter(batches).boxed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_is_lost_or_doubled() {
        for count in [0, 1, 49, 50, 51, 120] {
            let batches: Vec<Vec<usize>> = batches((0..count).collect(), |batch| batch)
                .into_inner()
                .map(Result::unwrap)
                .collect()
                .await;
            assert!(
                batches
                    .iter()
                    .all(|batch| (1..=BATCH_SIZE).contains(&batch.len()))
            );
            assert_eq!(batches.concat(), (0..count).collect::<Vec<_>>());
        }
    }
}
