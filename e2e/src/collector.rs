//! [`Collector`]: an OTLP collector on loopback, which decodes and keeps the spans of the programs under test.
//!
//! It has the messages and the server of OpenTelemetry's own crate. Assertions are made by the tests.

use crate::failure::Result;
use boxlite_sys::sync::Mutex;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, Span, span::SpanKind};
use std::sync::Arc;
use tokio::task::JoinSet;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// A running collector.
pub(crate) struct Collector {
    /// Value of `OTEL_EXPORTER_OTLP_ENDPOINT`.
    pub endpoint: String,
    received: Received,
    _server: JoinSet<()>,
}

/// Received spans by process.
#[derive(Clone, Default)]
struct Received(Arc<Mutex<Vec<ResourceSpans>>>);

#[tonic::async_trait]
impl TraceService for Received {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> std::result::Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().extend(request.into_inner().resource_spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// Starts a collector on a free port.
    pub(crate) fn start() -> Result<Self> {
        let incoming = TcpIncoming::bind(([127, 0, 0, 1], 0).into())?;
        let endpoint = format!("http://{}", incoming.local_addr()?);
        let received = Received::default();
        let service = TraceServiceServer::new(received.clone());
        let mut server = JoinSet::new();
        server.spawn(async move {
            let serving = Server::builder().add_service(service);
            // An error ends the collector, and the test finds no spans.
            drop(serving.serve_with_incoming(incoming).await);
        });
        Ok(Self {
            endpoint,
            received,
            _server: server,
        })
    }

    /// Returns the spans of a trace so far.
    pub(crate) fn spans(&self, trace_id: &[u8]) -> Vec<ExportedSpan> {
        let mut spans = self.all_spans();
        spans.retain(|exported| exported.span.trace_id == trace_id);
        spans
    }

    /// Returns all spans so far.
    pub(crate) fn all_spans(&self) -> Vec<ExportedSpan> {
        let mut spans = Vec::new();
        for process in self.received.0.lock().iter() {
            let resource = process.resource.clone().unwrap_or_default();
            for scope in &process.scope_spans {
                spans.extend(scope.spans.iter().map(|span| ExportedSpan {
                    service: text(&resource.attributes, "service.name").to_owned(),
                    tracer: scope.scope.clone().unwrap_or_default().name,
                    span: span.clone(),
                }));
            }
        }
        spans
    }
}

/// A received span.
#[derive(Debug, Clone)]
pub(crate) struct ExportedSpan {
    /// `service.name` of its process.
    pub service: String,
    /// Name of its tracer.
    pub tracer: String,
    /// The message.
    pub span: Span,
}

impl ExportedSpan {
    /// Returns tracer, name and, unless it is an internal one, kind.
    pub(crate) fn label(&self) -> String {
        let kind = match self.span.kind() {
            SpanKind::Internal => "",
            SpanKind::Client => " (client)",
            SpanKind::Server => " (server)",
            _ => " (other)",
        };
        format!("{}: {}{kind}", self.tracer, self.span.name)
    }

    /// Returns a text attribute; empty without one.
    pub(crate) fn attribute(&self, key: &str) -> &str {
        text(&self.span.attributes, key)
    }
}

fn text<'a>(attributes: &'a [KeyValue], key: &str) -> &'a str {
    let found = attributes.iter().find(|attribute| attribute.key == key);
    match found.and_then(|attribute| attribute.value.as_ref()?.value.as_ref()) {
        Some(Value::StringValue(text)) => text,
        _ => "",
    }
}
