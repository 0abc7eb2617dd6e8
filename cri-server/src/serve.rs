//! `boxlite-cri serve`: from the configuration to a serving daemon, and its end.
//!
//! ```text
//!  choose VMM → open runtime (re-adopts live pods) → bind socket → remove leaks → NRI's plugins → serve
//!  SIGTERM/SIGINT → stop accepting → drain calls, bounded → plugins → runtime's tasks → exit; pods go on
//! ```

#[cfg(test)]
mod tests;

use crate::config::Config;
use crate::metrics::{self, Metrics};
use crate::server::connection::Connection;
use crate::server::layer::CallLayer;
use crate::server::socket;
use crate::service::Server;
use crate::streaming::{self, Streaming};
use crate::vmm;
use boxlite_proto::cri::v1::image_service_server::ImageServiceServer;
use boxlite_proto::cri::v1::runtime_service_server::RuntimeServiceServer;
use boxlite_proto::vmm::Installation;
use boxlite_runtime::images::RegistryOptions;
use boxlite_runtime::{BoxliteRuntime, RuntimeOptions};
use std::process::ExitCode;
use std::sync::Arc;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;

/// Largest gRPC message taken or sent, in bytes: what kubelet and crictl set on their side.
const MESSAGE_LIMIT: usize = 16 << 20;

/// Why the daemon could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No VMM.
    #[error("no VMM can be chosen")]
    Vmm(#[source] boxlite_runtime::RuntimeError),
    /// The runtime could not be opened.
    #[error("cannot open the runtime")]
    Runtime(#[source] boxlite_runtime::RuntimeError),
    /// The CRI socket.
    #[error("cannot serve the CRI")]
    Socket(#[from] socket::SocketError),
    /// NRI's socket.
    #[error("cannot serve NRI's plugins (nri.socket_path)")]
    Nri(#[source] socket::SocketError),
    /// The metrics page's address.
    #[error("cannot serve metrics on {address}")]
    Metrics {
        address: std::net::SocketAddr,
        #[source]
        source: std::io::Error,
    },
    /// The streaming server's address.
    #[error("cannot serve streams on {address}")]
    Streaming {
        address: std::net::SocketAddr,
        #[source]
        source: std::io::Error,
    },
    /// Metrics of one name: a bug.
    #[error("cannot set metrics up")]
    Counters(#[from] prometheus::Error),
    /// Signal handlers.
    #[error("cannot wait for signals")]
    Signals(#[source] std::io::Error),
    /// The gRPC server broke.
    #[error("the gRPC server failed")]
    Grpc(#[from] tonic::transport::Error),
}

/// The verb.
pub async fn serve(config: Config) -> ExitCode {
    match run(config).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("boxlite-cri: {}", boxlite_runtime::report(&error));
            ExitCode::FAILURE
        }
    }
}

/// Files and programs of a VM by the configuration.
pub fn installation(config: &Config) -> Installation {
    let paths = config.paths.clone();
    Installation {
        guest: paths.guest,
        libkrunfw: paths.libkrunfw,
        qemu: paths.qemu,
        virtiofsd: paths.virtiofsd,
        vhost_device_vsock: paths.vhost_device_vsock,
        cache: config.root.join("cache"),
    }
}

async fn run(config: Config) -> Result<(), ServeError> {
    let stop = stop_on_signal()?;
    let choice = vmm::choose(&config).await.map_err(ServeError::Vmm)?;
    eprintln!("boxlite-cri {}: {choice}", env!("CARGO_PKG_VERSION"));
    let options = RuntimeOptions {
        root: config.root.clone(),
        state: config.state.clone(),
        scratch_dir: None,
        shim: config.paths.shim.clone(),
        installation: installation(&config),
        vmm: choice.kind.clone(),
        acceleration: choice.acceleration,
        start_limit: config.timeouts.run_pod,
        registry: RegistryOptions {
            certs_dir: config.registry.config_path.clone(),
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
    server.start_nri().await.map_err(ServeError::Nri)?;
    tracing::info!(socket = %config.listen.display(), pods = runtime.boxes().len(), "serving");
    let served = grpc(&server, listener, stop.clone()).await;
    stop.cancel();
    if let Some(page) = page {
        let _ = page.await;
    }
    if tokio::time::timeout(config.timeouts.drain, streams)
        .await
        .is_err()
    {
        tracing::warn!("streaming sessions did not end in time");
    }
    if tokio::time::timeout(config.timeouts.drain, server.wait_for_tasks())
        .await
        .is_err()
    {
        tracing::warn!(
            "calls are still under way; their pods are taken up again at the next start"
        );
    }
    server.stop_nri().await;
    runtime.shutdown().await;
    let _ = std::fs::remove_file(&config.listen);
    tracing::info!("stopped; pods go on");
    served
}

/// Serves until `stop`, then waits for calls under way, at most the configured time.
async fn grpc(
    server: &Server,
    listener: UnixListener,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let runtime_service = RuntimeServiceServer::new(server.clone())
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT);
    let image_service = ImageServiceServer::new(server.clone())
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT);
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

async fn metrics_page(
    config: &Config,
    counters: &Arc<Metrics>,
    runtime: &BoxliteRuntime,
    stop: &CancellationToken,
) -> Result<Option<JoinHandle<()>>, ServeError> {
    let Some(address) = config.metrics.listen else {
        return Ok(None);
    };
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| ServeError::Metrics { address, source })?;
    let page = metrics::http::serve(listener, counters.clone(), runtime.clone(), stop.clone());
    Ok(Some(tokio::spawn(async move {
        if let Err(error) = page.await {
            tracing::error!(%error, "the metrics page ended");
        }
    })))
}

/// Starts the streaming server; its task ends after `stop`, when its sessions have.
async fn stream_server(
    config: &Config,
    stop: &CancellationToken,
) -> Result<(JoinHandle<()>, Streaming), ServeError> {
    let address = (config.streaming.address, config.streaming.port).into();
    let failed = |source| ServeError::Streaming { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let streaming = Streaming::new(config.streaming, address);
    let serving = streaming::serve(listener, streaming.clone(), stop.clone());
    Ok((tokio::spawn(serving), streaming))
}

/// A token that SIGTERM and SIGINT cancel. A second signal ends the process at once: who asks twice does not want to wait.
fn stop_on_signal() -> Result<CancellationToken, ServeError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Signals)?;
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        for round in 0..2 {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if round == 0 {
                tracing::info!("stopping: no new calls");
                token.cancel();
            }
        }
        std::process::exit(1);
    });
    Ok(stop)
}
