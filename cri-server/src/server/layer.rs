//! What every call passes: a span, one log line, its latency, and panics turned into INTERNAL.
//!
//! It sees the method's name and the answer's status, never a message: those carry secrets (registry auth, environments).

use crate::metrics::RpcMetrics;
use futures::FutureExt;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::Instrument;

/// Makes [`CallService`]s.
#[derive(Debug, Clone)]
pub struct CallLayer {
    metrics: Arc<RpcMetrics>,
}

impl CallLayer {
    /// Latencies go to `metrics`.
    pub fn new(metrics: Arc<RpcMetrics>) -> Self {
        Self { metrics }
    }
}

impl<S> Layer<S> for CallLayer {
    type Service = CallService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        CallService {
            inner,
            metrics: self.metrics.clone(),
        }
    }
}

/// The decorator around all services.
#[derive(Debug, Clone)]
pub struct CallService<S> {
    inner: S,
    metrics: Arc<RpcMetrics>,
}

impl<S> Service<Request<Body>> for CallService<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = futures::future::BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let method = request
            .uri()
            .path()
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_owned();
        let span = tracing::info_span!("cri", method);
        let metrics = self.metrics.clone();
        // The service that was polled ready serves this call; its clone takes the next.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        async move {
            let begun = Instant::now();
            let call = AssertUnwindSafe(async move { inner.call(request).await });
            let response = match call.catch_unwind().await {
                Ok(Ok(response)) => response,
                Ok(Err(never)) => match never {},
                Err(_) => Status::internal("the call panicked; the daemon's log has the place")
                    .into_http(),
            };
            let code = code_of(&response);
            let elapsed = begun.elapsed();
            metrics.observe(&method, code, elapsed);
            log(&method, code, &response, elapsed.as_secs_f64() * 1e3);
            Ok(response)
        }
        .instrument(span)
        .boxed()
    }
}

/// The status in the headers: an error is there. A success has it in the trailers, which come later.
fn code_of(response: &Response<Body>) -> Code {
    response
        .headers()
        .get("grpc-status")
        .map_or(Code::Ok, |value| Code::from_bytes(value.as_bytes()))
}

/// Reads and lists come every second: they are worth a line only at debug level.
fn log(method: &str, code: Code, response: &Response<Body>, milliseconds: f64) {
    let reads = [
        "List",
        "Stream",
        "Version",
        "Status",
        "ImageFsInfo",
        "RuntimeConfig",
    ];
    let quiet = reads.iter().any(|prefix| method.starts_with(prefix))
        || method.ends_with("Status")
        || method.ends_with("Stats");
    if code != Code::Ok {
        let message = Status::from_header_map(response.headers())
            .map(|status| status.message().to_owned())
            .unwrap_or_default();
        // NotFound is the everyday answer about what is gone.
        if code == Code::NotFound {
            tracing::info!(method, ?code, milliseconds, message, "answered");
        } else {
            tracing::warn!(method, ?code, milliseconds, message, "answered");
        }
    } else if quiet {
        tracing::debug!(method, milliseconds, "answered");
    } else {
        tracing::info!(method, milliseconds, "answered");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use tower::ServiceExt;

    async fn answered(path: &'static str) -> Response<Body> {
        let inner = tower::service_fn(|request: Request<Body>| async move {
            assert!(!request.uri().path().ends_with("Panic"), "on purpose");
            Ok::<_, Infallible>(Status::not_found("gone").into_http())
        });
        let metrics = Metrics::new().unwrap().rpc();
        let service = CallLayer::new(metrics).layer(inner);
        let request = Request::builder().uri(path).body(Body::empty()).unwrap();
        match service.oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }

    #[tokio::test]
    async fn a_panic_is_internal_and_an_error_passes() {
        assert_eq!(
            code_of(&answered("/runtime.v1.RuntimeService/Panic").await),
            Code::Internal
        );
        assert_eq!(
            code_of(&answered("/runtime.v1.RuntimeService/Version").await),
            Code::NotFound
        );
    }
}
