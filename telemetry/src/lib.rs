//! Traces of a pod's start over daemon, shim and guest, exported by OTLP.
//!
//! [`setup`] starts the exporter if `OTEL_EXPORTER_OTLP_ENDPOINT` is set; [`span`] has the spans, [`context`] carries their
//! position between tasks and processes. Without an exporter a span is an empty option, and nothing is allocated or recorded.
//!
//! Spans have fixed names and attributes that identify objects. Error texts, command lines, environments and log messages
//! must not become attributes: they may have secrets, and a collector is outside the node.

#![forbid(unsafe_code)]

pub mod context;
pub mod setup;
pub mod span;

pub use context::{InContext, TraceContext, WithTrace};
pub use setup::{ServiceName, Telemetry};
pub use span::{Kind, Span, traced};
