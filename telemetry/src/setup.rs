//! [`Telemetry`]: the exporter of this process, configured by the `OTEL_*` variables.
//!
//! Spans go into a bounded queue, which a thread empties in batches. A full queue drops spans, and a collector that does not
//! answer delays only that thread.

use boxlite_sys::report::Report;
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::resource::{EnvResourceDetector, ResourceDetector};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SdkTracer, SdkTracerProvider, SpanData,
    SpanExporter as Exporter,
};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Capacity of the queue in spans, unless `OTEL_BSP_MAX_QUEUE_SIZE` is set. A pod's start has some 30.
const QUEUE_CAPACITY: usize = 512;
/// Variable that replaces [`QUEUE_CAPACITY`].
const QUEUE_VARIABLE: &str = "OTEL_BSP_MAX_QUEUE_SIZE";
/// Variables with the endpoint; the first one that is set counts.
const ENDPOINT_VARIABLES: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
];
/// Variables with the protocol; the first one that is set counts.
const PROTOCOL_VARIABLES: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "OTEL_EXPORTER_OTLP_PROTOCOL",
];
/// Time limit for exporting the last spans. A daemon waits for its shims to exit.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);
/// The supported protocol.
const PROTOCOL: &str = "grpc";

static TRACERS: OnceLock<Tracers> = OnceLock::new();

/// Tracers of this process.
#[derive(Debug)]
pub(crate) struct Tracers {
    /// Spans of this process.
    pub(crate) own: SdkTracer,
    /// Spans that the guest has reported.
    pub(crate) guest: SdkTracer,
}

/// Errors of the exporter's configuration. The process runs without traces then.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// A protocol other than gRPC.
    #[error("invalid OTLP protocol {protocol:?}: only {PROTOCOL:?} is supported")]
    Protocol { protocol: String },
    /// An invalid endpoint, header or timeout.
    #[error("failed to configure the OTLP exporter")]
    Exporter(#[from] ExporterBuildError),
    /// The exporter of this process has been started before.
    #[error("the OTLP exporter is running already")]
    Running,
}

/// Name of a process in its traces.
#[derive(Debug, Clone, Copy)]
pub enum ServiceName {
    /// Name unless `OTEL_SERVICE_NAME` or `OTEL_RESOURCE_ATTRIBUTES` has one.
    Default(&'static str),
    /// Name of a process whose environment is its parent's, and so are the names in it: containerd, for one, sets its own.
    Fixed(&'static str),
}

impl ServiceName {
    fn text(self) -> &'static str {
        match self {
            Self::Default(name) | Self::Fixed(name) => name,
        }
    }
}

/// The running exporter.
#[derive(Debug)]
pub struct Telemetry {
    provider: SdkTracerProvider,
}

impl Telemetry {
    /// Starts the exporter if the environment asks for it. Must be called in an async runtime, which the connection uses. A failure
    /// is logged: the process runs without traces then.
    pub fn start(service: ServiceName, version: &'static str) -> Option<Self> {
        match Self::try_start(service, version) {
            Ok(telemetry) => telemetry,
            Err(error) => {
                let error = Report(&error);
                tracing::warn!(%error, "failed to start the exporter of traces");
                None
            }
        }
    }

    fn try_start(
        service: ServiceName,
        version: &'static str,
    ) -> Result<Option<Self>, TelemetryError> {
        if !requested(|name| std::env::var(name).ok()) {
            return Ok(None);
        }
        check_protocol(|name| std::env::var(name).ok())?;
        let exporter = SpanExporter::builder().with_tonic().build()?;
        Self::with_exporter(Reporting::new(exporter), service, version).map(Some)
    }

    pub(crate) fn with_exporter(
        exporter: impl Exporter + 'static,
        service: ServiceName,
        version: &'static str,
    ) -> Result<Self, TelemetryError> {
        let telemetry = Self::unregistered(exporter, service, version);
        let tracers = Tracers {
            own: telemetry.provider.tracer(service.text()),
            guest: telemetry.provider.tracer("boxlite-guest"),
        };
        match TRACERS.set(tracers) {
            Ok(()) => Ok(telemetry),
            Err(_) => Err(TelemetryError::Running),
        }
    }

    fn unregistered(
        exporter: impl Exporter + 'static,
        service: ServiceName,
        version: &'static str,
    ) -> Self {
        let mut batches = BatchConfigBuilder::default();
        if std::env::var_os(QUEUE_VARIABLE).is_none() {
            batches = batches.with_max_queue_size(QUEUE_CAPACITY);
        }
        let processor = BatchSpanProcessor::builder(exporter)
            .with_batch_config(batches.build())
            .build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_resource(resource(service, version))
            .build();
        Self { provider }
    }

    /// Exports the queued spans, at most for [`FLUSH_TIMEOUT`], and stops.
    pub async fn shutdown(self) {
        self.shutdown_within(FLUSH_TIMEOUT).await;
    }

    pub(crate) async fn shutdown_within(self, limit: Duration) {
        let stop = move || self.provider.shutdown_with_timeout(limit);
        match tokio::task::spawn_blocking(stop).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "failed to export the last spans"),
            Err(error) => tracing::debug!(%error, "exporter panicked"),
        }
    }
}

/// Returns the tracers, or `None` without an exporter.
pub(crate) fn tracers() -> Option<&'static Tracers> {
    TRACERS.get()
}

/// Returns whether the environment asks for traces.
fn requested(variable: impl Fn(&str) -> Option<String>) -> bool {
    let is = |name: &str, value: &str| {
        variable(name).is_some_and(|set| set.trim().eq_ignore_ascii_case(value))
    };
    if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
        return false;
    }
    ENDPOINT_VARIABLES
        .iter()
        .any(|name| variable(name).is_some_and(|endpoint| !endpoint.trim().is_empty()))
}

fn check_protocol(variable: impl Fn(&str) -> Option<String>) -> Result<(), TelemetryError> {
    let set = PROTOCOL_VARIABLES.iter().find_map(|name| variable(name));
    match set {
        Some(protocol) if protocol.trim() != PROTOCOL => Err(TelemetryError::Protocol { protocol }),
        _ => Ok(()),
    }
}

fn resource(service: ServiceName, version: &'static str) -> Resource {
    let resource = Resource::builder().with_attribute(KeyValue::new("service.version", version));
    match service {
        ServiceName::Default(_) if is_named() => resource.build(),
        _ => resource.with_service_name(service.text()).build(),
    }
}

/// Returns whether the environment has the service's name.
fn is_named() -> bool {
    let name = opentelemetry::Key::from_static_str("service.name");
    std::env::var("OTEL_SERVICE_NAME").is_ok_and(|name| !name.is_empty())
        || EnvResourceDetector::new().detect().get(&name).is_some()
}

/// An exporter that logs when a collector fails and when it works again. The SDK is built without its own log.
#[derive(Debug)]
struct Reporting<E> {
    inner: E,
    failing: AtomicBool,
}

impl<E> Reporting<E> {
    fn new(inner: E) -> Self {
        Self {
            inner,
            failing: AtomicBool::new(false),
        }
    }
}

impl<E: Exporter> Exporter for Reporting<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let result = self.inner.export(batch).await;
        match &result {
            Ok(()) if self.failing.swap(false, Ordering::Relaxed) => {
                tracing::info!("collector accepts traces again");
            }
            Err(error) if !self.failing.swap(true, Ordering::Relaxed) => {
                tracing::warn!(%error, spans, "failed to export traces, dropping spans");
            }
            _ => {}
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::{Span, Tracer};
    use opentelemetry_otlp::WithExportConfig;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;
    use std::time::Instant;

    /// Timeout for steps that do not depend on a collector.
    const STEP_TIMEOUT: Duration = Duration::from_secs(20);

    fn of(set: &'static [(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        |name| {
            let found = set.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        }
    }

    #[test]
    fn requested_needs_an_endpoint_and_no_switch() {
        const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317");
        assert!(!requested(of(&[])));
        assert!(!requested(of(&[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")])));
        assert!(requested(of(&[ENDPOINT])));
        assert!(requested(of(&[(
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "http://[::1]:4317"
        )])));
        assert!(!requested(of(&[ENDPOINT, ("OTEL_SDK_DISABLED", "True")])));
        assert!(!requested(of(&[
            ENDPOINT,
            ("OTEL_TRACES_EXPORTER", "none")
        ])));
    }

    #[test]
    fn check_protocol_accepts_grpc_only() {
        assert!(check_protocol(of(&[])).is_ok());
        assert!(check_protocol(of(&[("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")])).is_ok());
        let refused = check_protocol(of(&[("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")]));
        assert!(refused.unwrap_err().to_string().contains("http/protobuf"));
        assert!(
            check_protocol(of(&[
                ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
                ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
            ]))
            .is_ok()
        );
    }

    /// An exporter that reports its calls and answers when it is released.
    #[derive(Debug)]
    struct Blocked {
        exported: Arc<AtomicUsize>,
        called: mpsc::Sender<()>,
        released: std::sync::Mutex<mpsc::Receiver<()>>,
    }

    impl Exporter for Blocked {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.exported.fetch_add(batch.len(), Ordering::Relaxed);
            let _ = self.called.send(());
            let _ = self.released.lock().map(|released| released.recv());
            Ok(())
        }
    }

    fn spans(telemetry: &Telemetry, count: usize) {
        let tracer = telemetry.provider.tracer("test");
        for _ in 0..count {
            tracer.start("step").end();
        }
    }

    #[tokio::test]
    async fn blocked_exporter_keeps_a_bounded_number_of_spans() {
        let (called, calls) = mpsc::channel();
        let (release, released) = mpsc::channel();
        let exported = Arc::default();
        let exporter = Blocked {
            exported: Arc::clone(&exported),
            called,
            released: std::sync::Mutex::new(released),
        };
        let telemetry = Telemetry::unregistered(exporter, ServiceName::Fixed("test"), "0");
        spans(&telemetry, QUEUE_CAPACITY);
        calls.recv_timeout(STEP_TIMEOUT).expect("an export begins");
        spans(&telemetry, 20 * QUEUE_CAPACITY);
        drop(release);
        telemetry.shutdown_within(STEP_TIMEOUT).await;
        // The batch in progress and a full queue.
        let exported = exported.load(Ordering::Relaxed);
        assert!(exported > QUEUE_CAPACITY, "{exported}");
        assert!(exported <= 2 * QUEUE_CAPACITY, "{exported}");
    }

    /// Returns an endpoint whose connections are served by `answer`.
    fn collector(answer: impl Fn(TcpStream) + Send + 'static) -> (String, mpsc::Receiver<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("an address");
        let (connected, connections) = mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let _ = connected.send(());
                answer(stream);
            }
        });
        (format!("http://{address}"), connections)
    }

    async fn shutdown_with(
        answer: impl Fn(TcpStream) + Send + 'static,
        limit: Duration,
    ) -> Duration {
        let (endpoint, connections) = collector(answer);
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(10 * STEP_TIMEOUT)
            .build()
            .expect("an exporter");
        let telemetry =
            Telemetry::unregistered(Reporting::new(exporter), ServiceName::Fixed("test"), "0");
        spans(&telemetry, 2 * QUEUE_CAPACITY);
        let connected = tokio::task::spawn_blocking(move || connections.recv_timeout(STEP_TIMEOUT));
        let connected = connected.await.expect("no panic");
        connected.expect("the exporter connects");
        let begun = Instant::now();
        telemetry.shutdown_within(limit).await;
        begun.elapsed()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn silent_collector_delays_shutdown_by_its_limit_only() {
        let limit = Duration::from_millis(100);
        let kept = std::sync::Mutex::new(Vec::new());
        let silent = move |stream| {
            let _ = kept.lock().map(|mut kept| kept.push(stream));
        };
        let took = shutdown_with(silent, limit).await;
        assert!(took >= limit, "the collector was not silent: {took:?}");
        assert!(took < STEP_TIMEOUT, "{took:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn garbage_of_a_collector_fails_the_export() {
        let garbage = |mut stream: TcpStream| {
            let _ = stream.write_all(&[0xA5; 1 << 16]);
            let _ = stream.read(&mut [0; 1024]);
        };
        let took = shutdown_with(garbage, 10 * STEP_TIMEOUT).await;
        assert!(took < STEP_TIMEOUT, "{took:?}");
    }
}
