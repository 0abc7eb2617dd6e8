//! `SingleFlight`: one task per key, joined by every caller that asks for the same, and by one that comes back.
//!
//! ```text
//!  (none) ── join ──▶ under way ── ok ──▶ landed ── told to a caller, or forget ──▶ (none)
//!                        └── error ──▶ (none)
//! ```
//!
//! A client whose deadline ran out has dropped its future; the task went on. When it asks again it joins the task, or gets
//! the answer that nobody has heard yet. An error is never kept: who asks after it starts anew.

use super::lock;
use boxlite_sys::sync::Mutex;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tracing::Instrument;

type Answer = Shared<BoxFuture<'static, Result<String, Status>>>;

#[derive(Debug)]
struct Flight<R> {
    request: R,
    answer: Answer,
    number: u64,
}

#[derive(Debug)]
struct Board<R> {
    single_flight: HashMap<String, Flight<R>>,
    next: u64,
}

/// SingleFlight by key; `R` is what makes two requests the same.
#[derive(Debug)]
pub struct SingleFlight<R> {
    board: Arc<Mutex<Board<R>>>,
}

impl<R> Default for SingleFlight<R> {
    fn default() -> Self {
        Self {
            board: Arc::new(Mutex::new(Board {
                single_flight: HashMap::new(),
                next: 0,
            })),
        }
    }
}

impl<R: PartialEq + Send + 'static> SingleFlight<R> {
    /// Joins the flight of `key`, or starts `work` as a task of `tasks`. The answer is an id. Dropping the future drops nothing else.
    pub async fn join<F>(
        &self,
        tasks: &TaskTracker,
        key: String,
        request: R,
        work: impl FnOnce() -> F,
    ) -> Result<String, Status>
    where
        F: Future<Output = Result<String, Status>> + Send + 'static,
    {
        let (answer, number) = {
            let mut board = self.board.lock();
            match board.single_flight.get(&key) {
                Some(flight) if flight.request == request => (flight.answer.clone(), flight.number),
                Some(_) => {
                    return Err(Status::already_exists(format!(
                        "{key:?} is being made already, from another request"
                    )));
                }
                None => {
                    let number = board.next;
                    board.next += 1;
                    let answer = self.launch(tasks, key.clone(), number, work());
                    board.single_flight.insert(
                        key.clone(),
                        Flight {
                            request,
                            answer: answer.clone(),
                            number,
                        },
                    );
                    (answer, number)
                }
            }
        };
        let done = answer.await;
        clear(&self.board, &key, number);
        done
    }

    fn launch(
        &self,
        tasks: &TaskTracker,
        key: String,
        number: u64,
        work: impl Future<Output = Result<String, Status>> + Send + 'static,
    ) -> Answer {
        let board = self.board.clone();
        let task = tasks.spawn(
            async move {
                let done = std::panic::AssertUnwindSafe(work).catch_unwind().await;
                let done = done.unwrap_or_else(|_| {
                    Err(Status::internal(
                        "the call's task panicked; the daemon's log has the place",
                    ))
                });
                if done.is_err() {
                    clear(&board, &key, number);
                }
                done
            }
            .in_current_span(),
        );
        task.map(|ended| {
            ended.unwrap_or_else(|_| Err(Status::unavailable("the daemon is going down")))
        })
        .boxed()
        .shared()
    }

    /// Drops an answer that nobody came for: what it names is stopped or removed.
    pub fn forget(&self, id: &str) {
        self.board
            .lock()
            .single_flight
            .retain(|_, flight| match flight.answer.peek() {
                Some(Ok(answer)) => answer != id,
                _ => true,
            });
    }
}

fn clear<R>(board: &Mutex<Board<R>>, key: &str, number: u64) {
    let mut board = lock(board);
    if board
        .single_flight
        .get(key)
        .is_some_and(|flight| flight.number == number)
    {
        board.single_flight.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tokio::sync::Notify;

    #[tokio::test]
    async fn callers_share_one_task_and_a_dropped_one_may_come_back() {
        let single_flight = SingleFlight::default();
        let tasks = TaskTracker::new();
        let (gate, runs) = (Arc::new(Notify::new()), Arc::new(AtomicU32::new(0)));
        let work = || {
            let (gate, runs) = (gate.clone(), runs.clone());
            move || async move {
                runs.fetch_add(1, Ordering::SeqCst);
                gate.notified().await;
                Ok("id".to_owned())
            }
        };
        {
            let first = single_flight.join(&tasks, "k".into(), 1, work());
            tokio::pin!(first);
            assert!(futures::poll!(&mut first).is_pending());
        }
        let other = single_flight
            .join(&tasks, "k".into(), 2, work())
            .await
            .unwrap_err();
        assert_eq!(other.code(), tonic::Code::AlreadyExists);
        tokio::task::yield_now().await;
        gate.notify_one();
        let (second, third) = tokio::join!(
            single_flight.join(&tasks, "k".into(), 1, work()),
            single_flight.join(&tasks, "k".into(), 1, work())
        );
        assert_eq!(
            (second.unwrap().as_str(), third.unwrap().as_str()),
            ("id", "id")
        );
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        assert!(single_flight.board.lock().single_flight.is_empty());
    }

    #[tokio::test]
    async fn errors_and_panics_are_told_and_not_kept() {
        let single_flight = SingleFlight::default();
        let tasks = TaskTracker::new();
        let failed = single_flight
            .join(&tasks, "k".into(), 1, || async {
                Err(Status::not_found("no"))
            })
            .await;
        assert_eq!(failed.unwrap_err().code(), tonic::Code::NotFound);
        let panicked = single_flight
            .join(&tasks, "k".into(), 1, || async { panic!("on purpose") })
            .await;
        assert_eq!(panicked.unwrap_err().code(), tonic::Code::Internal);
        let fine = single_flight
            .join(&tasks, "k".into(), 1, || async { Ok("x".into()) })
            .await;
        assert_eq!(fine.unwrap(), "x");
    }

    #[tokio::test]
    async fn an_unheard_answer_is_kept_until_forgotten() {
        let single_flight = SingleFlight::default();
        let tasks = TaskTracker::new();
        let leave = async |single_flight: &SingleFlight<i32>, id: &'static str| {
            let call =
                single_flight.join(
                    &tasks,
                    "k".into(),
                    1,
                    move || async move { Ok(id.to_owned()) },
                );
            tokio::pin!(call);
            assert!(futures::poll!(&mut call).is_pending());
        };
        leave(&single_flight, "a").await;
        tasks.close();
        tasks.wait().await;
        tasks.reopen();
        let again = single_flight
            .join(&tasks, "k".into(), 1, || async { Ok("b".into()) })
            .await;
        assert_eq!(again.unwrap(), "a");
        leave(&single_flight, "c").await;
        tasks.close();
        tasks.wait().await;
        tasks.reopen();
        // Nobody polled the answer since, so it is not seen as landed before this.
        single_flight.forget("c");
        let fresh = single_flight
            .join(&tasks, "k".into(), 1, || async { Ok("d".into()) })
            .await;
        assert!(matches!(fresh.unwrap().as_str(), "c" | "d"));
    }
}
