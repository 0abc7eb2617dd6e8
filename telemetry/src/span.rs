//! [`Span`]: a timed step of a trace, ended when it is dropped; [`traced`] runs a fallible future in one.
//!
//! A span without a parent is not started, except by [`Span::server`]: polling and background work make no traces.

use crate::context::TraceContext;
use crate::setup::tracers;
use opentelemetry::trace::{SpanBuilder, SpanKind, Status, TraceContextExt, Tracer};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::SdkTracer;
use pin_project_lite::pin_project;
use std::fmt::Display;
use std::future::Future;
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::SystemTime;

/// Role of a span in its trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A step within a process.
    Internal,
    /// A call to another process.
    Client,
    /// Handles a call of another process.
    Server,
}

impl From<Kind> for SpanKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Internal => Self::Internal,
            Kind::Client => Self::Client,
            Kind::Server => Self::Server,
        }
    }
}

/// A span; empty without an exporter or a parent. Ends when it is dropped.
#[derive(Debug, Default)]
pub struct Span(TraceContext);

impl Span {
    /// Starts the span of a call that was received from `parent`. Without a parent it begins a trace.
    pub fn server(name: &'static str, parent: &TraceContext) -> Self {
        let Some(tracers) = tracers() else {
            return Self::default();
        };
        let none = Context::new();
        let parent = parent.0.as_ref().unwrap_or(&none);
        Self::begin(&tracers.own, builder(name, Kind::Server), parent)
    }

    /// Starts a span below `parent`, unless that is empty.
    pub fn below(parent: &TraceContext, name: &'static str, kind: Kind) -> Self {
        match (tracers(), &parent.0) {
            (Some(tracers), Some(parent)) => Self::begin(&tracers.own, builder(name, kind), parent),
            _ => Self::default(),
        }
    }

    /// Starts a span below the current one, if there is one.
    pub fn child(name: &'static str, kind: Kind) -> Self {
        Self::below(&TraceContext::current(), name, kind)
    }

    /// Records a step of this process that has ended.
    pub fn record(parent: &TraceContext, name: &'static str, begin: SystemTime, end: SystemTime) {
        if let Some(tracers) = tracers() {
            drop(Self::past(&tracers.own, parent, name, begin, end));
        }
    }

    /// Records a step of the guest that has ended, and returns its position for steps below it.
    pub fn record_guest(
        parent: &TraceContext,
        name: &'static str,
        begin: SystemTime,
        end: SystemTime,
    ) -> TraceContext {
        match tracers() {
            Some(tracers) => Self::past(&tracers.guest, parent, name, begin, end),
            None => TraceContext::default(),
        }
    }

    fn past(
        tracer: &SdkTracer,
        parent: &TraceContext,
        name: &'static str,
        begin: SystemTime,
        end: SystemTime,
    ) -> TraceContext {
        let Some(parent) = &parent.0 else {
            return TraceContext::default();
        };
        let builder = builder(name, Kind::Internal).with_start_time(begin);
        let span = tracer.build_with_context(builder, parent);
        let context = parent.with_span(span);
        context.span().end_with_timestamp(end.max(begin));
        TraceContext(Some(context))
    }

    fn begin(tracer: &SdkTracer, builder: SpanBuilder, parent: &Context) -> Self {
        let span = tracer.build_with_context(builder, parent);
        Self(TraceContext(Some(parent.with_span(span))))
    }

    /// Returns the position of this span.
    pub fn context(&self) -> TraceContext {
        self.0.clone()
    }

    /// Sets an attribute. It must not be a secret or a command line.
    pub fn set(&self, key: &'static str, value: &str) {
        set(&self.0, key, value);
    }

    /// Marks the span as failed. `description` is a fixed text or a status code.
    pub fn fail(&self, description: impl Display) {
        if let Some(context) = &self.0.0 {
            let status = Status::error(description.to_string());
            context.span().set_status(status);
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(context) = &self.0.0 {
            context.span().end();
        }
    }
}

/// Sets an attribute of the current span. It must not be a secret or a command line.
pub fn set_current(key: &'static str, value: &str) {
    set(&TraceContext::current(), key, value);
}

fn set(context: &TraceContext, key: &'static str, value: &str) {
    if let Some(context) = &context.0 {
        let attribute = KeyValue::new(key, value.to_owned());
        context.span().set_attribute(attribute);
    }
}

fn builder(name: &'static str, kind: Kind) -> SpanBuilder {
    SpanBuilder::from_name(name).with_kind(kind.into())
}

pin_project! {
    /// Future of [`traced`] and [`Span::run`].
    #[derive(Debug)]
    pub struct Traced<F> {
        #[pin]
        inner: F,
        span: Option<Span>,
        name: Option<(&'static str, Kind)>,
    }

    impl<F> PinnedDrop for Traced<F> {
        fn drop(this: Pin<&mut Self>) {
            if let Some(span) = this.project().span {
                span.fail("cancelled");
            }
        }
    }
}

impl<F, T, E> Future for Traced<F>
where
    F: Future<Output = Result<T, E>>,
{
    type Output = Result<T, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Some((name, kind)) = this.name.take() {
            *this.span = Some(Span::child(name, kind));
        }
        let context = this.span.as_ref().and_then(|span| span.0.0.clone());
        let result = {
            let _attached = context.map(Context::attach);
            ready!(this.inner.poll(cx))
        };
        if let Some(span) = this.span.take()
            && result.is_err()
        {
            span.fail("");
        }
        Poll::Ready(result)
    }
}

/// Runs `work` in a span below the current one, which starts at the first poll. An error or a drop marks it as failed.
pub fn traced<F, T, E>(name: &'static str, kind: Kind, work: F) -> Traced<F>
where
    F: Future<Output = Result<T, E>>,
{
    Traced {
        inner: work,
        span: None,
        name: Some((name, kind)),
    }
}

impl Span {
    /// Runs `work` in this span. An error or a drop marks it as failed.
    pub fn run<F, T, E>(self, work: F) -> Traced<F>
    where
        F: Future<Output = Result<T, E>>,
    {
        Traced {
            inner: work,
            span: Some(self),
            name: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::WithTrace;
    use crate::setup::{ServiceName, Telemetry};
    use opentelemetry_sdk::error::OTelSdkResult;
    use opentelemetry_sdk::trace::{SpanData, SpanExporter};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    /// An exporter that keeps all spans.
    #[derive(Debug, Clone, Default)]
    struct Kept(Arc<Mutex<Vec<SpanData>>>);

    impl SpanExporter for Kept {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().expect("no panic").extend(batch);
            Ok(())
        }
    }

    #[tokio::test]
    async fn span_of_a_future_fails_with_its_error_and_its_drop() {
        assert!(
            Span::server("early", &TraceContext::default())
                .0
                .0
                .is_none()
        );
        let kept = Kept::default();
        let telemetry = Telemetry::with_exporter(kept.clone(), ServiceName::Fixed("test"), "0")
            .expect("the first");
        let call = Span::server("call", &TraceContext::default());
        let succeeded = traced("ok", Kind::Internal, async { Ok::<_, ()>(()) });
        succeeded.in_trace(call.context()).await.expect("a success");
        let failed = traced("error", Kind::Internal, async { Err::<(), _>(()) });
        failed.in_trace(call.context()).await.expect_err("an error");
        {
            let endless = traced("dropped", Kind::Internal, std::future::pending());
            let endless: Traced<std::future::Pending<Result<(), ()>>> = endless;
            let mut endless = std::pin::pin!(endless.in_trace(call.context()));
            assert!(poll_once(endless.as_mut()).is_pending());
        }
        // Never polled, and without a parent: no spans.
        drop(traced("unpolled", Kind::Internal, async {
            Ok::<_, ()>(())
        }));
        let orphan = traced("orphan", Kind::Internal, async { Ok::<_, ()>(()) });
        orphan.await.expect("a success");
        drop(call);
        telemetry.shutdown_within(Duration::from_secs(20)).await;
        let kept = kept.0.lock().expect("no panic");
        let ended: Vec<_> = kept
            .iter()
            .map(|span| (&*span.name, &span.status))
            .collect();
        let expected = [
            ("ok", &Status::Unset),
            ("error", &Status::error("")),
            ("dropped", &Status::error("cancelled")),
            ("call", &Status::Unset),
        ];
        assert_eq!(ended, expected);
    }

    fn poll_once<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
    }
}
