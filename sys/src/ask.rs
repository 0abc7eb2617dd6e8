//! [`ask`]: a request to a task by its channel, and the task's answer.
//!
//! Knows nothing of the requests. Limits no time: a task answers or ends.

use tokio::sync::{mpsc, oneshot};

/// Sends a task the request made with the sender of its answer, and returns the answer, or `None` if the task has ended without
/// one. The task must answer before it drops or closes the receiver. A dropped future may leave the request with the task.
pub async fn ask<R, T>(
    requests: &mpsc::Sender<R>,
    request: impl FnOnce(oneshot::Sender<T>) -> R,
) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    requests.send(request(reply)).await.ok()?;
    answered(requests, answer).await
}

/// Waits for the answer to a request that was sent.
async fn answered<R, T>(requests: &mpsc::Sender<R>, mut answer: oneshot::Receiver<T>) -> Option<T> {
    tokio::select! {
        biased;
        answer = &mut answer => answer.ok(),
        // A request that arrives while the receiver is being dropped remains in the channel, and with it the sender of the
        // answer, as long as the channel has a sender: its answer alone would be awaited forever.
        () = requests.closed() => answer.try_recv().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Request = oneshot::Sender<u8>;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(future)
    }

    #[test]
    fn answer_is_returned() {
        block_on(async {
            let (sender, mut receiver) = mpsc::channel::<Request>(1);
            let task = async { receiver.recv().await.unwrap().send(7) };
            let (answer, sent) = tokio::join!(ask(&sender, |reply| reply), task);
            assert_eq!((answer, sent), (Some(7), Ok(())));
        });
    }

    #[test]
    fn request_that_arrives_at_the_end_of_the_task_has_no_answer() {
        block_on(async {
            let (sender, receiver) = mpsc::channel::<Request>(1);
            let (reply, answer) = oneshot::channel();
            let permit = sender.reserve().await.unwrap();
            drop(receiver);
            permit.send(reply);
            assert_eq!(answered(&sender, answer).await, None);
            assert_eq!(ask(&sender, |reply| reply).await, None);
        });
    }

    #[test]
    fn answer_sent_before_the_end_of_the_task_is_returned() {
        block_on(async {
            let (sender, mut receiver) = mpsc::channel::<Request>(1);
            let (reply, answer) = oneshot::channel();
            sender.send(reply).await.unwrap();
            receiver.recv().await.unwrap().send(7).unwrap();
            drop(receiver);
            assert_eq!(answered(&sender, answer).await, Some(7));
        });
    }
}
