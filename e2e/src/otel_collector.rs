//! [`OtelCollector`]: the OpenTelemetry Collector, which prints the spans it receives and forwards them to another collector.
//!
//! Opt-in, since its build takes minutes: `make test-collectors` builds it and names it by [`PROGRAM_VARIABLE`].

use crate::failure::Result;
use crate::service::{Service, free_address};
use std::path::{Path, PathBuf};
use tokio::net::TcpStream;
use tokio::process::Command;

/// Variable with the path of the program.
const PROGRAM_VARIABLE: &str = "BOXLITE_E2E_OTELCOL";

/// A running collector; killed when dropped. What it printed is in a file beside its program.
pub(crate) struct OtelCollector {
    /// Value of `OTEL_EXPORTER_OTLP_ENDPOINT`.
    pub endpoint: String,
    _service: Service,
}

/// Returns the path of the program, if the environment has one.
pub(crate) fn program() -> Option<PathBuf> {
    std::env::var_os(PROGRAM_VARIABLE).map(PathBuf::from)
}

impl OtelCollector {
    /// Starts the collector on a free port, with its configuration in `dir`.
    pub(crate) async fn start(program: &Path, dir: &Path, forward_to: &str) -> Result<Self> {
        let free = free_address().await?;
        let file = dir.join("otelcol.yaml");
        std::fs::write(&file, configuration(&free.to_string(), forward_to))?;
        let log = program.with_extension("log");
        std::fs::write(&log, "")?;
        let service = Service::new("the OpenTelemetry Collector", log);
        let mut command = Command::new(program);
        command.arg(format!("--config=file:{}", file.display()));
        let listens = || async { Ok(TcpStream::connect(free).await.map(drop)?) };
        service.start(command, listens).await?;
        Ok(Self {
            endpoint: format!("http://{free}"),
            _service: service,
        })
    }
}

fn configuration(listen: &str, forward_to: &str) -> String {
    format!(
        "receivers:
  otlp:
    protocols:
      grpc:
        endpoint: {listen}
exporters:
  debug:
    verbosity: detailed
  otlp_grpc:
    endpoint: {forward_to}
    compression: none
    tls:
      insecure: true
    sending_queue:
      enabled: false
service:
  telemetry:
    metrics:
      level: none
  pipelines:
    traces:
      receivers: [otlp]
      exporters: [debug, otlp_grpc]
"
    )
}
