//! Layer around every call: a span, one log line, the latency, the client's deadline, and INTERNAL for panics.
//!
//! tonic enforces the deadline, too, but answers CANCELLED; a kubelet recognizes only DEADLINE_EXCEEDED.
//!
//! It reads the method's name and the status of the answer, not the messages, which carry secrets (registry credentials,
//! environments).

use crate::metrics::RpcMetrics;
use boxlite_telemetry::{Span, TraceContext, WithTrace};
use futures::FutureExt;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::Instrument;
use tracing::field::Empty;

/// Reasons why a call ends without its handler's answer.
#[derive(Debug, Clone, Copy, thiserror::Error)]
pub(crate) enum CallError {
    /// The client's deadline expired.
    #[error("the client's deadline has passed")]
    Deadline,
    /// A bug of this daemon.
    #[error("internal error: the handler of the call panicked, see the daemon's log")]
    Panicked,
}

impl CallError {
    /// Returns the gRPC status.
    pub(crate) fn status(self) -> Status {
        let code = match self {
            Self::Deadline => Code::DeadlineExceeded,
            Self::Panicked => Code::Internal,
        };
        Status::new(code, self.to_string())
    }
}

/// Creates [`CallService`]s.
#[derive(Debug, Clone)]
pub(crate) struct CallLayer {
    metrics: Arc<RpcMetrics>,
}

impl CallLayer {
    /// Creates a layer that records latencies in `metrics`.
    pub(crate) fn new(metrics: Arc<RpcMetrics>) -> Self {
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

/// The wrapper around all services.
#[derive(Debug, Clone)]
pub(crate) struct CallService<S> {
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
        // Of the highest level, so that warnings have it at every level of the log.
        let span = tracing::error_span!("cri", method, namespace = Empty, pod = Empty);
        let trace = CallTrace::begin(&method, request.headers());
        let metrics = self.metrics.clone();
        // Created before tonic's timer, which starts when this returns, so that this one expires first.
        let limit = deadline(request.headers()).map(tokio::time::sleep);
        // The service that was polled ready serves this call; its clone serves the next.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        async move {
            let begun = Instant::now();
            let call = AssertUnwindSafe(async move {
                let Some(limit) = limit else {
                    return inner.call(request).await;
                };
                tokio::select! {
                    biased;
                    response = inner.call(request) => response,
                    () = limit => Ok(CallError::Deadline.status().into_http()),
                }
            });
            let call = call.catch_unwind().in_trace(trace.span.context());
            let response = match call.await {
                Ok(Ok(response)) => response,
                Ok(Err(never)) => match never {},
                Err(_) => CallError::Panicked.status().into_http(),
            };
            let code = code_of(&response);
            trace.answered(code);
            let elapsed = begun.elapsed();
            metrics.observe(&method, code, elapsed);
            log(&method, code, &response, elapsed.as_secs_f64() * 1e3);
            Ok(response)
        }
        .instrument(span)
        .boxed()
    }
}

/// Calls that are traced: those that change a pod. Reads come every second.
const TRACED_METHODS: [&str; 8] = [
    "RunPodSandbox",
    "StopPodSandbox",
    "RemovePodSandbox",
    "CreateContainer",
    "StartContainer",
    "StopContainer",
    "RemoveContainer",
    "PullImage",
];

/// The span of a call. It fails if it is dropped without an answer, because the client is gone.
struct CallTrace {
    span: Span,
    answered: bool,
}

impl CallTrace {
    fn begin(method: &str, headers: &HeaderMap) -> Self {
        let traced = TRACED_METHODS.into_iter().find(|name| *name == method);
        let header = |name| headers.get(name)?.to_str().ok();
        let span = traced.map(|name| Span::server(name, &TraceContext::extract(header)));
        Self {
            span: span.unwrap_or_default(),
            answered: false,
        }
    }

    /// Ends the span. It gets the code of an error only, since the message may quote the request.
    fn answered(mut self, code: Code) {
        self.answered = true;
        if code != Code::Ok {
            self.span.fail(format_args!("{code:?}"));
        }
    }
}

impl Drop for CallTrace {
    fn drop(&mut self) {
        if !self.answered {
            self.span.fail(format_args!("{:?}", Code::Cancelled));
        }
    }
}

/// Parses the client's `grpc-timeout`: up to eight digits and a unit, as the gRPC protocol specifies.
fn deadline(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// Returns the status in the headers, which contain errors. The status of a success is in the trailers, which come later.
fn code_of(response: &Response<Body>) -> Code {
    response
        .headers()
        .get("grpc-status")
        .map_or(Code::Ok, |value| Code::from_bytes(value.as_bytes()))
}

/// Returns whether a call is logged at debug level only: reads and lists come every second.
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
        // NotFound is the ordinary answer for removed objects.
        if code == Code::NotFound {
            tracing::info!(method, ?code, milliseconds, message, "call answered");
        } else {
            tracing::warn!(method, ?code, milliseconds, message, "call answered");
        }
    } else if quiet {
        tracing::debug!(method, milliseconds, "call answered");
    } else {
        tracing::info!(method, milliseconds, "call answered");
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
    async fn expired_deadline_answers_deadline_exceeded() {
        let inner = tower::service_fn(|_: Request<Body>| async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            Ok::<_, Infallible>(Response::new(Body::empty()))
        });
        for (header, code) in [
            ("1m", Code::DeadlineExceeded),
            ("20000u", Code::DeadlineExceeded),
            ("1M", Code::Ok),
            ("2H", Code::Ok),
            ("nonsense", Code::Ok),
            ("", Code::Ok),
        ] {
            let service = CallLayer::new(Metrics::new().unwrap().rpc()).layer(inner);
            let request = Request::builder()
                .uri("/runtime.v1.ImageService/PullImage")
                .header("grpc-timeout", header)
                .body(Body::empty())
                .unwrap();
            let Ok(response) = service.oneshot(request).await;
            assert_eq!(code_of(&response), code, "{header:?}");
        }
    }

    #[tokio::test]
    async fn panic_is_internal_and_error_passes() {
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
