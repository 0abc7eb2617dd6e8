//! [`OtelCollector`]: the OpenTelemetry Collector, which prints the spans it receives and forwards them to another collector.
//!
//! Opt-in, since its build takes minutes: `make test-collectors` builds it and names it by [`PROGRAM_VARIABLE`].

use crate::failure::{During, Result};
use crate::poll;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

/// Variable with the path of the program.
const PROGRAM_VARIABLE: &str = "BOXLITE_E2E_OTELCOL";
/// Time limit for the start.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A running collector; killed when dropped. What it printed is in a file beside its program.
pub(crate) struct OtelCollector {
    /// Value of `OTEL_EXPORTER_OTLP_ENDPOINT`.
    pub endpoint: String,
    _process: Child,
}

/// Returns the path of the program, if the environment has one.
pub(crate) fn program() -> Option<PathBuf> {
    std::env::var_os(PROGRAM_VARIABLE).map(PathBuf::from)
}

impl OtelCollector {
    /// Starts the collector on a free port, with its configuration in `dir`.
    pub(crate) async fn start(program: &Path, dir: &Path, forward_to: &str) -> Result<Self> {
        let free = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
        let file = dir.join("otelcol.yaml");
        std::fs::write(&file, configuration(&free.to_string(), forward_to))?;
        let log = std::fs::File::create(program.with_extension("log"))?;
        let process = Command::new(program)
            .arg(format!("--config=file:{}", file.display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .during("the OpenTelemetry Collector")?;
        poll::until("the collector listens", START_TIMEOUT, || async {
            TcpStream::connect(free).await?;
            Ok(())
        })
        .await?;
        Ok(Self {
            endpoint: format!("http://{free}"),
            _process: process,
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
