//! `boxlite-cri status`: state of the running daemon, queried over its CRI socket like any client.
//!
//! Exit code: 0 if the daemon answers, 1 otherwise.

#[cfg(test)]
mod tests;

use crate::config::Config;
use crate::output::{Output, VERSION, print};
use boxlite_proto::cri::v1::runtime_service_client::RuntimeServiceClient;
use boxlite_proto::cri::v1::{
    ContainerState, ListContainersRequest, ListPodSandboxRequest, PodSandboxState, StatusRequest,
    VersionRequest,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::io::ErrorKind::{ConnectionRefused, NotConnected, NotFound};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// Timeout of all answers of the daemon together. None of the calls waits for a VM.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Failure to query the daemon.
#[derive(Debug, thiserror::Error)]
enum StatusError {
    /// No process listens on the socket.
    #[error("no daemon serves {}", socket.display())]
    NotRunning {
        socket: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The socket cannot be used, for example by an unprivileged user.
    #[error("failed to connect to {}", socket.display())]
    Connect {
        socket: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// HTTP/2 could not be set up.
    #[error("failed to open a channel to {}", socket.display())]
    Channel {
        socket: PathBuf,
        #[source]
        source: tonic::transport::Error,
    },
    /// A call failed.
    #[error("the daemon at {} failed to answer", socket.display())]
    Call {
        socket: PathBuf,
        #[source]
        source: Box<tonic::Status>,
    },
    /// The calls timed out.
    #[error("the daemon at {} did not answer within {} s", socket.display(), ANSWER_TIMEOUT.as_secs())]
    Timeout { socket: PathBuf },
}

/// State of the daemon.
#[derive(Debug, Default)]
struct DaemonState {
    runtime: String,
    api: String,
    /// Settings from the verbose Status answer.
    details: Value,
    /// Condition, whether it holds, and the message if it does not.
    conditions: Vec<(String, bool, String)>,
    pods_ready: usize,
    pods_not_ready: usize,
    /// Containers by state: created, running, exited.
    containers: [usize; 3],
}

/// Queries the daemon and prints the report.
pub(crate) async fn status(config: Config, output: Output) -> ExitCode {
    let socket = &config.listen;
    match ask(socket).await {
        Ok(state) => {
            let text = match output {
                Output::Text => state.text(socket),
                Output::Json => format!("{:#}\n", state.json(socket)),
            };
            print(&text, ExitCode::SUCCESS)
        }
        Err(error) => {
            eprintln!("boxlite-cri: {}", boxlite_runtime::report(&error));
            ExitCode::FAILURE
        }
    }
}

/// Queries the daemon and returns the report as one JSON object.
///
/// # Errors
/// A sentence with its causes if the daemon does not answer.
pub(crate) async fn report_json(socket: &Path) -> Result<String, String> {
    match ask(socket).await {
        Ok(state) => Ok(format!("{:#}\n", state.json(socket))),
        Err(error) => Err(boxlite_runtime::report(&error)),
    }
}

async fn ask(socket: &Path) -> Result<DaemonState, StatusError> {
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, DaemonState::ask(socket)).await;
    answer.unwrap_or_else(|_| {
        Err(StatusError::Timeout {
            socket: socket.to_owned(),
        })
    })
}

async fn connect(socket: &Path) -> Result<RuntimeServiceClient<Channel>, StatusError> {
    let at = socket.to_owned();
    let stream = match UnixStream::connect(socket).await {
        Ok(stream) => stream,
        Err(source) if matches!(source.kind(), NotFound | ConnectionRefused) => {
            return Err(StatusError::NotRunning { socket: at, source });
        }
        Err(source) => return Err(StatusError::Connect { socket: at, source }),
    };
    // One connection, which is made already; the connector ignores the address.
    let mut stream = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_: Uri| {
        std::future::ready(stream.take().ok_or(std::io::Error::from(NotConnected)))
    });
    Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .map(RuntimeServiceClient::new)
        .map_err(|source| StatusError::Channel { socket: at, source })
}

impl DaemonState {
    async fn ask(socket: &Path) -> Result<Self, StatusError> {
        let failed = |source| StatusError::Call {
            socket: socket.to_owned(),
            source: Box::new(source),
        };
        let mut client = connect(socket).await?;
        let version = client.version(VersionRequest::default()).await;
        let version = version.map_err(failed)?.into_inner();
        let status = client.status(StatusRequest { verbose: true }).await;
        let status = status.map_err(failed)?.into_inner();
        let pods = client.list_pod_sandbox(ListPodSandboxRequest::default());
        let pods = pods.await.map_err(failed)?.into_inner().items;
        let containers = client.list_containers(ListContainersRequest::default());
        let containers = containers.await.map_err(failed)?.into_inner().containers;

        let ready = |state: i32| state == PodSandboxState::SandboxReady as i32;
        let pods_ready = pods.iter().filter(|pod| ready(pod.state)).count();
        let in_state = |state: ContainerState| {
            let state = state as i32;
            containers.iter().filter(|c| c.state == state).count()
        };
        let details = status.info.get("config").map(String::as_str);
        let conditions = status.status.unwrap_or_default().conditions;
        Ok(Self {
            runtime: format!("{} {}", version.runtime_name, version.runtime_version),
            api: version.runtime_api_version,
            details: details
                .and_then(|text| serde_json::from_str(text).ok())
                .unwrap_or_default(),
            conditions: conditions
                .into_iter()
                .map(|c| (c.r#type, c.status, c.message))
                .collect(),
            pods_ready,
            pods_not_ready: pods.len() - pods_ready,
            containers: [
                in_state(ContainerState::ContainerCreated),
                in_state(ContainerState::ContainerRunning),
                in_state(ContainerState::ContainerExited),
            ],
        })
    }

    fn detail(&self, key: &str) -> &str {
        self.details[key].as_str().unwrap_or("unknown")
    }

    fn text(&self, socket: &Path) -> String {
        let [created, running, exited] = self.containers;
        let mut lines = vec![
            ("socket", socket.display().to_string()),
            ("daemon", format!("{} {}", self.runtime, self.commit())),
            ("this program", format!("boxlite-cri {VERSION}")),
            ("CRI", self.api.clone()),
            ("VMM", self.detail("vmm").to_owned()),
        ];
        for (name, holds, message) in &self.conditions {
            let text = match holds {
                true => "true".to_owned(),
                false => format!("false: {message}"),
            };
            lines.push((name.as_str(), text));
        }
        lines.push((
            "pods",
            format!(
                "{} ready, {} not ready",
                self.pods_ready, self.pods_not_ready
            ),
        ));
        lines.push((
            "containers",
            format!("{running} running, {created} created, {exited} exited"),
        ));
        if let Some(pool) = self.pool() {
            lines.push(("warm VMs", pool));
        }
        lines
            .into_iter()
            .map(|(name, value)| format!("{name:<14} {value}\n"))
            .collect()
    }

    /// Describes the pool, unless it is off.
    fn pool(&self) -> Option<String> {
        let pool = &self.details["pool"];
        let number = |key: &str| pool[key].as_u64().unwrap_or(0);
        let warm = pool["warm"].as_array()?.len();
        let held = match pool["held"].as_str() {
            Some(reason) => format!(", not filled: {reason}"),
            None => String::new(),
        };
        Some(format!(
            "{warm} of {} waiting, {} MiB; pods served {}, missed {}, failed {}{held}",
            number("size"),
            number("bytes") >> 20,
            number("hits"),
            number("misses"),
            number("failedClaims"),
        ))
    }

    /// Commit of the daemon, in the same form as [`VERSION`]'s.
    fn commit(&self) -> String {
        format!("(commit {})", self.detail("commit"))
    }

    fn json(&self, socket: &Path) -> Value {
        let [created, running, exited] = self.containers;
        let conditions = self.conditions.iter().map(
            |(name, holds, message)| json!({"type": name, "status": holds, "message": message}),
        );
        json!({
            "socket": socket,
            "daemon": self.runtime,
            "commit": self.detail("commit"),
            "client": VERSION,
            "api": self.api,
            "vmm": self.detail("vmm"),
            "conditions": conditions.collect::<Vec<_>>(),
            "pods": {"ready": self.pods_ready, "notReady": self.pods_not_ready},
            "containers": {"created": created, "running": running, "exited": exited},
            "config": self.details,
        })
    }
}
