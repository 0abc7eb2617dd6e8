//! The connection to containerd's CRI socket: a lazy channel, which the next call dials again after a failure.

use super::error::HostPodsError;
use boxlite_proto::cri::v1::image_service_client::ImageServiceClient;
use boxlite_proto::cri::v1::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Response, Status};

/// Maximum size of a gRPC message in bytes, in both directions; kubelet and containerd set the same.
const MAX_MESSAGE_BYTES: usize = 16 << 20;
/// Time limit of a connect to the unix socket.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit of the calls that are merged with the runtime's own answers. containerd answers them from memory; the limit is that
/// of a stopped one, and long because a list that is late would make healthy pods unknown.
const MERGED_CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// The same after a call that failed, so that a stopped containerd delays each list of pods in VMs no longer than this.
const REPEATED_CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// Clients of containerd's two CRI services.
#[derive(Debug, Clone)]
pub(super) struct Client {
    endpoint: PathBuf,
    channel: Channel,
    /// Result of the last merged call.
    is_reachable: Arc<AtomicBool>,
}

impl Client {
    /// Creates a client of the socket; nothing is dialed yet.
    pub(super) fn new(endpoint: &Path) -> Self {
        let socket = endpoint.to_owned();
        // The URI only sets `:authority`; the connector ignores it. No HTTP/2 pings: a server in Go closes the connection, with
        // the pulls on it, to a client that pings more often than every 5 minutes, and a killed one closes the socket anyway.
        let channel =
            Endpoint::from_static("http://localhost")
                .connect_timeout(CONNECT_TIMEOUT)
                .connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                    let socket = socket.clone();
                    async move {
                        Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?))
                    }
                }));
        Self {
            endpoint: endpoint.to_owned(),
            channel,
            is_reachable: Arc::new(AtomicBool::new(true)),
        }
    }

    /// Returns the path of the socket.
    pub(super) fn endpoint(&self) -> &Path {
        &self.endpoint
    }

    pub(super) fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    pub(super) fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Names the endpoint in errors of the connection, and in containerd's UNAVAILABLE while it starts. Its other errors pass
    /// unchanged.
    pub(super) fn checked<T>(&self, answer: Result<T, Status>) -> Result<T, Status> {
        answer.map_err(|status| {
            // tonic's errors of a connection have a cause, or none if the channel itself is gone; those that a server sent
            // have none.
            let is_local = std::error::Error::source(&status).is_some()
                || status.message().starts_with("Service was not ready");
            if is_local || status.code() == Code::Unavailable {
                HostPodsError::unreachable(&self.endpoint, &status).into()
            } else {
                status
            }
        })
    }

    /// Awaits a call for at most `limit`. Calls that end with their client's request need none.
    pub(super) async fn within<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        match tokio::time::timeout(limit, call).await {
            Ok(answer) => self.checked(answer),
            Err(_) => Err(HostPodsError::Timeout {
                endpoint: self.endpoint.clone(),
                limit,
            }
            .into()),
        }
    }

    /// Returns the limit of the next merged call.
    fn merged_limit(&self) -> Duration {
        match self.is_reachable.load(Ordering::Relaxed) {
            true => MERGED_CALL_TIMEOUT,
            false => REPEATED_CALL_TIMEOUT,
        }
    }

    /// Awaits a call that is merged with the runtime's own answer, and logs its failure: once while containerd is unreachable.
    pub(super) async fn merged<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        let answer = self.within(self.merged_limit(), call).await;
        let is_reachable = answer.as_ref().err().map(Status::code) != Some(Code::Unavailable);
        let was_reachable = self.is_reachable.swap(is_reachable, Ordering::Relaxed);
        let endpoint = self.endpoint.display();
        if is_reachable && !was_reachable {
            tracing::info!(%endpoint, "container runtime of host pods is reachable again");
        }
        match &answer {
            Ok(_) => {}
            Err(status) if status.code() == Code::Unimplemented => {}
            Err(status) if is_reachable => {
                tracing::warn!(%endpoint, error = status.message(), "container runtime of host pods failed a call");
            }
            Err(status) if was_reachable => {
                tracing::warn!(%endpoint, error = status.message(), "container runtime of host pods is unreachable; its pods are unknown");
            }
            Err(_) => {}
        }
        answer.map(Response::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use boxlite_proto::cri::v1::VersionRequest;

    #[tokio::test]
    async fn limit_is_short_only_while_containerd_is_unreachable() {
        let client = Client::new(Path::new("/none"));
        assert_eq!(client.merged_limit(), MERGED_CALL_TIMEOUT);
        let gone = client.runtime().version(VersionRequest::default()).await;
        let error = client.merged(async { gone }).await.unwrap_err();
        assert_eq!(error.code(), Code::Unavailable);
        assert!(error.message().contains("unix:///none"), "{error}");
        assert_eq!(client.merged_limit(), REPEATED_CALL_TIMEOUT);
        // Its own error is an answer.
        let own = async { Err::<Response<()>, _>(Status::internal("on purpose")) };
        let error = client.merged(own).await.unwrap_err();
        assert_eq!(
            (error.code(), error.message()),
            (Code::Internal, "on purpose")
        );
        assert_eq!(client.merged_limit(), MERGED_CALL_TIMEOUT);
    }

    #[tokio::test]
    async fn call_without_answer_ends_with_the_endpoint() {
        let client = Client::new(Path::new("/none"));
        let hung = std::future::pending::<Result<(), Status>>();
        let limit = Duration::from_millis(5);
        let error = client.within(limit, hung).await.unwrap_err();
        assert_eq!(error.code(), Code::Unavailable);
        assert!(error.message().contains("unix:///none"), "{error}");
    }
}
