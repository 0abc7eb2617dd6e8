//! Streaming variants of the list calls: the same items, in batches below the message size limit.

use futures::stream::{self, BoxStream, StreamExt};
use tonic::{Response, Status};

/// Items per batch. An item is a few KiB (labels and annotations), 256 KiB at most by the kubelet's limits; clients
/// read up to 16 MiB.
const MAX_BATCH_ITEMS: usize = 50;

/// Response of a streaming call.
pub(crate) type Stream<T> = BoxStream<'static, Result<T, Status>>;

/// Returns `items` in batches, each converted by `message`. Without items there is no message.
pub(crate) fn batches<I, T>(
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
        Some(Ok(message(rest.by_ref().take(MAX_BATCH_ITEMS).collect())))
    });
    Response::new(stream::iter(batches).boxed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn batches_keep_all_items_in_order() {
        for count in [0, 1, 49, 50, 51, 120] {
            let batches: Vec<Vec<usize>> = batches((0..count).collect(), |batch| batch)
                .into_inner()
                .map(Result::unwrap)
                .collect()
                .await;
            assert!(
                batches
                    .iter()
                    .all(|batch| (1..=MAX_BATCH_ITEMS).contains(&batch.len()))
            );
            assert_eq!(batches.concat(), (0..count).collect::<Vec<_>>());
        }
    }
}
