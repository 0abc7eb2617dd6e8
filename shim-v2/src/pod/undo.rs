//! [`Undo`]: a list of completed steps and how to undo them, in reverse order.
//!
//! A failed start, a stop and the death of the VM run the same list.

use futures::future::BoxFuture;

type Step = (
    &'static str,
    Box<dyn FnOnce() -> BoxFuture<'static, Result<(), String>> + Send>,
);

/// Undo steps, newest last. Dropping the list undoes nothing.
#[derive(Default)]
pub struct Undo(Vec<Step>);

impl Undo {
    /// Adds the undo step of a completed step.
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

    /// Adds an undo step that is one short synchronous call.
    pub fn push_call<E: std::fmt::Display + 'static>(
        &mut self,
        name: &'static str,
        call: impl FnOnce() -> Result<(), E> + Send + 'static,
    ) {
        self.push(name, move || async move { call() });
    }

    /// Appends the steps of `later`, which were completed after these.
    pub fn append(&mut self, later: Self) {
        self.0.extend(later.0);
    }

    /// Undoes all steps, newest first. A failed step is logged and does not stop the others. If the future is dropped, the
    /// older steps are not undone.
    pub async fn run(mut self) {
        while let Some((name, step)) = self.0.pop() {
            if let Err(error) = step().await {
                tracing::warn!(step = name, error, "failed to undo step");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn run_undoes_newest_first_and_continues_after_failure() {
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
