//! [`Undo`]: what has been done so far and how to take it back, in reverse order.
//!
//! Knows nothing of what the steps are. A start that fails, a stop, and a VM that died all run the same list.

use futures::future::BoxFuture;

type Step = (
    &'static str,
    Box<dyn FnOnce() -> BoxFuture<'static, Result<(), String>> + Send>,
);

/// Steps to be taken back, newest last. Dropping it takes nothing back.
#[derive(Default)]
pub struct Undo(Vec<Step>);

impl Undo {
    /// Remembers how to take a step back that has just been done.
    pub fn push<F, E>(&mut self, name: &'static str, step: impl FnOnce() -> F + Send + 'static)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: std::fmt::Display + 'static,
    {
        self.0.push((
            name,
            Box::new(move || {
                let future = step();
                Box::pin(async move { future.await.map_err(|error| error.to_string()) })
            }),
        ));
    }

    /// As [`Undo::push`] for a step that is one quick call.
    pub fn push_call<E: std::fmt::Display + 'static>(
        &mut self,
        name: &'static str,
        call: impl FnOnce() -> Result<(), E> + Send + 'static,
    ) {
        self.push(name, move || async move { call() });
    }

    /// Adds the steps of `later`, which were done after these.
    pub fn append(&mut self, later: Self) {
        self.0.extend(later.0);
    }

    /// Takes everything back, newest first. A step that fails is logged and does not stop the others. Once begun this
    /// should be driven to its end: dropped, it leaves the older steps as they are.
    pub async fn run(mut self) {
        while let Some((name, step)) = self.0.pop() {
            if let Err(error) = step().await {
                tracing::warn!(step = name, error, "cannot take back");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn newest_first_and_a_failure_stops_nothing() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut undo = Undo::default();
        for n in 0..3 {
            let seen = seen.clone();
            undo.push("step", move || async move {
                seen.lock().expect("unpoisoned").push(n);
                if n == 1 { Err("no") } else { Ok(()) }
            });
        }
        undo.run().await;
        assert_eq!(*seen.lock().expect("unpoisoned"), [2, 1, 0]);
    }
}
