//! `SingleFlight`: one task per key, shared by all concurrent callers with the same request, and by a caller that
//! retries.
//!
//! ```text
//!  (none) ── join ──▶ under way ── ok ──▶ done ── returned to a caller, or forget ──▶ (none)
//!                        └── error ──▶ (none)
//! ```
//!
//! A client whose deadline expired has dropped its future, but the task continues. A retry joins the task or gets the
//! result that was not delivered yet. An error is not kept: the next caller starts a new task.

use super::error::ServiceError;
use boxlite_sys::sync::Mutex;
use boxlite_telemetry::WithTrace;
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
struct Call<R> {
    request: R,
    answer: Answer,
    number: u64,
}

#[derive(Debug)]
struct State<R> {
    calls: HashMap<String, Call<R>>,
    next: u64,
}

/// Calls in progress by key; two requests are the same if their `R` is equal.
#[derive(Debug)]
pub(crate) struct SingleFlight<R> {
    /// Kind of the object, for errors.
    subject: &'static str,
    state: Arc<Mutex<State<R>>>,
}

impl<R> SingleFlight<R> {
    /// Creates one without calls.
    pub(crate) fn new(subject: &'static str) -> Self {
        Self {
            subject,
            state: Arc::new(Mutex::new(State {
                calls: HashMap::new(),
                next: 0,
            })),
        }
    }
}

impl<R: PartialEq + Send + 'static> SingleFlight<R> {
    /// Joins the call of `key`, or starts `work` as a task of `tasks`. The result is an id. Dropping the future does
    /// not stop the task.
    pub(crate) async fn join<F>(
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
            let mut state = self.state.lock();
            match state.calls.get(&key) {
                Some(call) if call.request == request => (call.answer.clone(), call.number),
                Some(_) => {
                    let subject = self.subject;
                    return Err(ServiceError::InProgress { subject, key }.into());
                }
                None => {
                    let number = state.next;
                    state.next += 1;
                    let answer = self.launch(tasks, key.clone(), number, work());
                    state.calls.insert(
                        key.clone(),
                        Call {
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
        clear(&self.state, &key, number);
        done
    }

    fn launch(
        &self,
        tasks: &TaskTracker,
        key: String,
        number: u64,
        work: impl Future<Output = Result<String, Status>> + Send + 'static,
    ) -> Answer {
        let state = self.state.clone();
        let task = tasks.spawn(
            async move {
                let done = std::panic::AssertUnwindSafe(work).catch_unwind().await;
                let done = done.unwrap_or_else(|_| Err(ServiceError::Panicked.into()));
                if done.is_err() {
                    clear(&state, &key, number);
                }
                done
            }
            .in_current_span()
            .in_current_trace(),
        );
        task.map(|ended| ended.unwrap_or_else(|_| Err(ServiceError::ShuttingDown.into())))
            .boxed()
            .shared()
    }

    /// Drops an undelivered result: the object it names was stopped or removed.
    pub(crate) fn forget(&self, id: &str) {
        self.state
            .lock()
            .calls
            .retain(|_, call| match call.answer.peek() {
                Some(Ok(answer)) => answer != id,
                _ => true,
            });
    }
}

fn clear<R>(state: &Mutex<State<R>>, key: &str, number: u64) {
    let mut state = state.lock();
    if state
        .calls
        .get(key)
        .is_some_and(|call| call.number == number)
    {
        state.calls.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tokio::sync::Notify;

    #[tokio::test]
    async fn join_same_request_shares_one_task() {
        let single_flight = SingleFlight::new("container");
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
        assert!(single_flight.state.lock().calls.is_empty());
    }

    #[tokio::test]
    async fn join_failed_call_returns_error_and_keeps_nothing() {
        let single_flight = SingleFlight::new("container");
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
    async fn undelivered_result_is_kept_until_forgotten() {
        let single_flight = SingleFlight::new("container");
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
        // The result was not polled since, so it may not count as done yet.
        single_flight.forget("c");
        let fresh = single_flight
            .join(&tasks, "k".into(), 1, || async { Ok("d".into()) })
            .await;
        assert!(matches!(fresh.unwrap().as_str(), "c" | "d"));
    }
}
