//! [`caught`]: turns a panic of an operation into an error, so that its caller undoes its steps, as after any other failure.
//!
//! For operations with steps to undo, and for the tasks that own state. All shared state is changed by single assignments or map
//! operations (see `boxlite_sys::sync`), so it is consistent after a panic.

use crate::error::{Result, RuntimeError};
use futures::FutureExt;
use std::future::Future;
use std::panic::AssertUnwindSafe;

/// Runs `operation`.
///
/// # Errors
/// Those of `operation`; `Internal` if it panicked.
pub(crate) async fn caught<T>(operation: impl Future<Output = Result<T>>) -> Result<T> {
    let outcome = AssertUnwindSafe(operation).catch_unwind().await;
    outcome.unwrap_or_else(|_| Err(panicked()))
}

/// Returns the error of an operation that panicked; the panic hook has logged the panic.
pub(crate) fn panicked() -> RuntimeError {
    RuntimeError::Internal {
        detail: "the operation panicked, see the daemon's log".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn caught_panic_is_an_internal_error() {
        let panicking = async {
            tokio::task::yield_now().await;
            panic!("injected")
        };
        let error = caught::<()>(panicking).await.unwrap_err();
        assert!(matches!(error, RuntimeError::Internal { .. }), "{error:?}");
        assert_eq!(caught(async { Ok(7) }).await.unwrap(), 7);
    }
}
