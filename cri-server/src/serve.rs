//! `boxlite-cri serve`: starts the daemon from its configuration, serves, and shuts down.
//!
//! ```text
//!  choose VMM → open runtime (re-adopts live pods) → bind socket → remove leaks → NRI plugins → notify systemd → serve
//!  SIGTERM/SIGINT → stop accepting → drain calls, bounded → plugins → runtime's tasks → exit; pods keep running
//! ```

#[cfg(test)]
pub(crate) mod tests;

use crate::config::Config;
use crate::host_pods::Router;
use crate::layout::Layout;
use crate::metrics::{self, Metrics};
use crate::output::VERSION;
use crate::server::connection::Connection;
use crate::server::layer::CallLayer;
use crate::server::socket;
use crate::service::Server;
use crate::streaming::{self, Streaming};
use crate::{notify, vmm};
use boxlite_proto::cri::v1::image_service_server::ImageServiceServer;
use boxlite_proto::cri::v1::runtime_service_server::RuntimeServiceServer;
use boxlite_proto::vmm::Installation;
use boxlite_runtime::images::RegistryOptions;
use boxlite_runtime::{BoxliteRuntime, RuntimeOptions};
use boxlite_telemetry::{ServiceName, Telemetry};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Maximum size of a gRPC message in bytes, in both directions; kubelet and crictl set the same.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Errors that prevent or end the service.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// No VMM can be used.
    #[error("failed to choose a VMM")]
    Vmm(#[source] boxlite_runtime::RuntimeError),
    /// The runtime could not be opened.
    #[error("failed to open the runtime")]
    Runtime(#[source] boxlite_runtime::RuntimeError),
    /// The CRI socket could not be bound.
    #[error("failed to serve the CRI")]
    Socket(#[from] socket::SocketError),
    /// The NRI socket could not be bound.
    #[error("failed to serve NRI plugins (nri.socket_path)")]
    Nri(#[source] socket::SocketError),
    /// The address of the metrics page could not be bound.
    #[error("failed to serve metrics on {address}")]
    Metrics {
        address: std::net::SocketAddr,
        #[source]
        source: std::io::Error,
    },
    /// The address of the streaming server could not be bound.
    #[error("failed to serve streams on {address}")]
    Streaming {
        address: std::net::SocketAddr,
        #[source]
        source: std::io::Error,
    },
    /// Two metrics have the same name, which is a bug.
    #[error("failed to register metrics")]
    Counters(#[from] prometheus::Error),
    /// The signal handlers could not be installed.
    #[error("failed to install signal handlers")]
    Signals(#[source] std::io::Error),
    /// The gRPC server ended with an error.
    #[error("failed to run the gRPC server")]
    Grpc(#[from] tonic::transport::Error),
}

/// Serves until SIGTERM.
pub(crate) async fn serve(config: Config) -> ExitCode {
    match run(config).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("boxlite-cri: {}", boxlite_runtime::report(&error));
            ExitCode::FAILURE
        }
    }
}

/// Returns the configured files and programs of a VM.
pub(crate) fn installation(config: &Config) -> Installation {
    let layout = Layout::new(&config.root, &config.state);
    config.paths.installation(layout.cache())
}

async fn run(mut config: Config) -> Result<(), ServeError> {
    // A core dump would contain registry credentials and the environment of containers. A failure does not stop the pods.
    if let Err(error) = boxlite_sys::core_dumps::forbid() {
        tracing::warn!(%error, "failed to forbid core dumps");
    }
    let telemetry = Telemetry::start(
        ServiceName::Default("boxlite-cri"),
        env!("CARGO_PKG_VERSION"),
    );
    let (stop, _signals) = stop_on_signal()?;
    let choice = vmm::choose(&config).await.map_err(ServeError::Vmm)?;
    eprintln!("boxlite-cri {VERSION}: {choice}");
    config.pod = config.pod.for_node(choice.acceleration);
    let options = RuntimeOptions {
        root: config.root.clone(),
        state: config.state.clone(),
        scratch_dir: Some(config.scratch_dir()),
        shim: config.shim.clone(),
        installation: installation(&config),
        vmm: choice.kind.clone(),
        acceleration: choice.acceleration,
        start_limit: config.timeouts.run_pod,
        registry: RegistryOptions {
            certs_dir: config.registry.config_path.clone(),
            min_bytes_per_second: config.registry.min_bytes_per_second,
            pull_timeout: config.registry.pull_timeout,
            max_partial_bytes: config.registry.max_partial_bytes,
            ..RegistryOptions::default()
        },
    };
    let runtime = BoxliteRuntime::open(options)
        .await
        .map_err(ServeError::Runtime)?;
    let counters = Arc::new(Metrics::new()?);
    let listener = socket::bind(&config.listen)?;
    let page = metrics_page(&config, &counters, &runtime, &stop).await?;
    let (streams, streaming) = stream_server(&config, &stop).await?;
    let server = Server::new(
        runtime.clone(),
        config.clone(),
        counters,
        choice.to_string(),
        streaming,
    );
    server.remove_orphans().await;
    server.restore_shared_volumes();
    server.start_nri().await.map_err(ServeError::Nri)?;
    crate::warm::start(&server);
    tracing::info!(socket = %config.listen.display(), pods = runtime.boxes().len(), "serving the CRI");
    notify::ready(&format!("serving, {choice}"));
    let served = grpc(&server, listener, stop.clone()).await;
    stop.cancel();
    if let Some(page) = page {
        join("metrics clients", page, config.timeouts.drain).await;
    }
    join("streaming sessions", streams, config.timeouts.drain).await;
    if tokio::time::timeout(config.timeouts.drain, server.wait_for_tasks())
        .await
        .is_err()
    {
        tracing::warn!("calls still in progress; their pods will be re-adopted at the next start");
    }
    server.stop_nri().await;
    runtime.shutdown().await;
    let _ = std::fs::remove_file(&config.listen);
    if let Some(telemetry) = telemetry {
        telemetry.shutdown().await;
    }
    tracing::info!("daemon stopped; pods keep running");
    served
}

/// Serves until `stop`, then waits for calls in progress, at most for the configured time.
async fn grpc(
    server: &Server,
    listener: UnixListener,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let layout = Layout::new(&server.config.root, &server.config.state);
    let table = layout.host_pods();
    let router = Router::new(server.clone(), &server.config.host_pods, table);
    router.start().await;
    let runtime_service = RuntimeServiceServer::new(router.clone())
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let image_service = ImageServiceServer::new(router)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let connections =
        UnixListenerStream::new(listener).map(|accepted| accepted.map(Connection::new));
    let serving = tonic::transport::Server::builder()
        .layer(CallLayer::new(server.metrics.rpc()))
        .add_service(runtime_service)
        .add_service(image_service)
        .serve_with_incoming_shutdown(connections, stop.clone().cancelled_owned());
    tokio::pin!(serving);
    tokio::select! {
        done = &mut serving => return Ok(done?),
        () = stop.cancelled() => {}
    }
    server.close_streams();
    match tokio::time::timeout(server.config.timeouts.drain, serving).await {
        Ok(done) => Ok(done?),
        Err(_) => {
            tracing::warn!(
                seconds = server.config.timeouts.drain.as_secs(),
                "clients did not finish in time"
            );
            Ok(())
        }
    }
}

/// Waits for `task` at most `limit`, then aborts it.
async fn join(name: &'static str, task: AbortOnDropHandle<()>, limit: Duration) {
    if tokio::time::timeout(limit, task).await.is_err() {
        tracing::warn!(name, "task did not end in time");
    }
}

async fn metrics_page(
    config: &Config,
    counters: &Arc<Metrics>,
    runtime: &BoxliteRuntime,
    stop: &CancellationToken,
) -> Result<Option<AbortOnDropHandle<()>>, ServeError> {
    let Some(address) = config.metrics.listen else {
        return Ok(None);
    };
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| ServeError::Metrics { address, source })?;
    let page = metrics::http::serve(listener, counters.clone(), runtime.clone(), stop.clone());
    Ok(Some(AbortOnDropHandle::new(tokio::spawn(async move {
        if let Err(error) = page.await {
            tracing::error!(%error, "metrics server failed");
        }
    }))))
}

/// Starts the streaming server. Its task ends after `stop`, once its sessions have ended.
async fn stream_server(
    config: &Config,
    stop: &CancellationToken,
) -> Result<(AbortOnDropHandle<()>, Streaming), ServeError> {
    let address = (config.streaming.address, config.streaming.port).into();
    let failed = |source| ServeError::Streaming { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let streaming = Streaming::new(config.streaming, address);
    let serving = streaming::serve(listener, streaming.clone(), stop.clone());
    Ok((AbortOnDropHandle::new(tokio::spawn(serving)), streaming))
}

/// Returns a token that SIGTERM and SIGINT cancel, and the task that waits for them. A second signal ends the process at
/// once.
fn stop_on_signal() -> Result<(CancellationToken, AbortOnDropHandle<()>), ServeError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Signals)?;
    let stop = CancellationToken::new();
    let token = stop.clone();
    let waiting = AbortOnDropHandle::new(tokio::spawn(async move {
        for round in 0..2 {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if round == 0 {
                tracing::info!("received signal, draining calls");
                notify::stopping();
                token.cancel();
            }
        }
        std::process::exit(1);
    }));
    Ok((stop, waiting))
}
