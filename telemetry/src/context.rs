//! [`TraceContext`]: a position in a trace, carried between tasks and, as W3C headers, between processes.
//!
//! It does not start or end spans; see [`crate::span`].

use crate::setup::tracers;
use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use pin_project_lite::pin_project;
use std::future::Future;
use std::pin::Pin;
use std::task::Poll;

/// Header with trace, parent span and flags.
pub const TRACEPARENT: &str = "traceparent";
/// Header with the data of other tracing systems.
pub const TRACESTATE: &str = "tracestate";
/// Maximum length of a header that is accepted.
const MAX_HEADER_BYTES: usize = 512;

/// A position in a trace; empty without one.
#[derive(Debug, Clone, Default)]
pub struct TraceContext(pub(crate) Option<Context>);

impl TraceContext {
    /// Returns the position of the current task.
    pub fn current() -> Self {
        if tracers().is_none() {
            return Self(None);
        }
        let context = Context::current();
        let valid = context.span().span_context().is_valid();
        Self(valid.then_some(context))
    }

    /// Reads a caller's position from its headers. Invalid ones count as none.
    pub fn extract<'a>(header: impl Fn(&'static str) -> Option<&'a str>) -> Self {
        if tracers().is_none() {
            return Self(None);
        }
        let read = |name| header(name).filter(|text| text.len() <= MAX_HEADER_BYTES);
        let headers = Headers {
            parent: read(TRACEPARENT).map(str::to_owned),
            state: read(TRACESTATE).map(str::to_owned),
        };
        let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
        let valid = context.span().span_context().is_valid();
        Self(valid.then_some(context))
    }

    /// Returns the headers for a callee.
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        let Some(context) = &self.0 else {
            return Vec::new();
        };
        let mut headers = Headers::default();
        TraceContextPropagator::new().inject_context(context, &mut headers);
        let parent = headers.parent.map(|text| (TRACEPARENT, text));
        let state = headers.state.filter(|text| !text.is_empty());
        parent
            .into_iter()
            .chain(state.map(|text| (TRACESTATE, text)))
            .collect()
    }

    /// Returns whether spans at this position are exported.
    pub fn is_sampled(&self) -> bool {
        let sampled = |context: &Context| context.span().span_context().is_sampled();
        self.0.as_ref().is_some_and(sampled)
    }
}

/// The two headers of W3C Trace Context.
#[derive(Debug, Default)]
struct Headers {
    parent: Option<String>,
    state: Option<String>,
}

impl Extractor for Headers {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            TRACEPARENT => self.parent.as_deref(),
            TRACESTATE => self.state.as_deref(),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT, TRACESTATE]
    }
}

impl Injector for Headers {
    fn set(&mut self, key: &str, value: String) {
        match key {
            TRACEPARENT => self.parent = Some(value),
            TRACESTATE => self.state = Some(value),
            _ => {}
        }
    }
}

pin_project! {
    /// A future that runs at a position in a trace.
    #[derive(Debug)]
    pub struct InContext<F> {
        #[pin]
        inner: F,
        context: TraceContext,
    }
}

impl<F: Future> Future for InContext<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let _attached = this.context.0.clone().map(Context::attach);
        this.inner.poll(cx)
    }
}

/// Runs futures at a position in a trace.
pub trait WithTrace: Future + Sized {
    /// Runs the future at `context`.
    fn in_trace(self, context: TraceContext) -> InContext<Self> {
        InContext {
            inner: self,
            context,
        }
    }

    /// Runs the future at the current position, for a new task.
    fn in_current_trace(self) -> InContext<Self> {
        self.in_trace(TraceContext::current())
    }
}

impl<F: Future> WithTrace for F {}
