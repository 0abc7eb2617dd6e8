//! One typed client per service of the guest: a thin method per RPC with its deadline.
//!
//! Dropping a method's future cancels its HTTP/2 stream. The guest may or may not have done the work; since every RPC is
//! idempotent by id, the caller may repeat it.

pub mod container;
pub mod execution;
pub mod follow;
pub mod guest;
pub mod mounts;

use super::error::PortalError;
use std::future::Future;
use std::time::Duration;
use tonic::{Response, Status};

/// Time limit of calls that only read or signal: an agent answers in milliseconds, an emulated one under load in
/// seconds.
pub const QUICK_CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// Time limit of calls that mount, fork or wait for a cgroup to empty.
pub const LONG_CALL_TIMEOUT: Duration = Duration::from_secs(120);

/// Runs one unary call with a deadline.
async fn unary<T>(
    call: &'static str,
    limit: Duration,
    future: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, PortalError> {
    match tokio::time::timeout(limit, future).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(PortalError::from_status(call, status)),
        Err(_) => Err(PortalError::Deadline { call, limit }),
    }
}
