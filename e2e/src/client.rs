//! [`Cri`]: a CRI v1 client on the daemon's unix socket that sends a kubelet's requests, with the types of k8s-cri.
//!
//! Every call has a deadline, as a kubelet's calls do. Assertions are made by the tests.

use crate::failure::{During, Failure, Result};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{RemovePodSandboxRequest, StopPodSandboxRequest};
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// Client of the runtime and image services.
#[derive(Debug, Clone)]
pub(crate) struct Cri {
    channel: Channel,
}

/// Maximum size of a response: the kubelet's limit.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

impl Cri {
    /// Creates a client that connects on first use and reconnects after a restart of the daemon.
    pub(crate) fn lazy(socket: &Path) -> Result<Self> {
        let socket = socket.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::try_from("http://localhost")?
            .timeout(Duration::from_secs(300))
            .connect_with_connector_lazy(connector);
        Ok(Self { channel })
    }

    /// Returns a client of the runtime service.
    pub(crate) fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Calls a method of the runtime service whose messages k8s-cri does not define, or not in this form.
    pub(crate) async fn raw<Q, A>(
        &self,
        method: &str,
        message: Q,
    ) -> std::result::Result<A, tonic::Status>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let codec = tonic_prost::ProstCodec::<Q, A>::default();
        Ok(self.unary(method, message, codec).await?.into_inner())
    }

    /// Calls a method of the runtime service by name, with raw bytes in both directions.
    pub(crate) async fn raw_bytes(&self, method: &str, message: Vec<u8>) -> Result<Vec<u8>> {
        answer(method, self.unary(method, message, RawCodec).await)
    }

    async fn unary<C>(
        &self,
        method: &str,
        message: C::Encode,
        codec: C,
    ) -> std::result::Result<tonic::Response<C::Decode>, tonic::Status>
    where
        C: tonic::codec::Codec,
        C::Encode: Send + Sync + 'static,
        C::Decode: Send + Sync + 'static,
    {
        let path = format!("/runtime.v1.RuntimeService/{method}");
        let path = path
            .parse()
            .map_err(|_| tonic::Status::internal(format!("invalid method: {method}")))?;
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        client
            .ready()
            .await
            .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        client
            .unary(tonic::Request::new(message), path, codec)
            .await
    }

    /// Stops and removes a pod.
    pub(crate) async fn remove_pod(&self, pod_sandbox_id: String) -> Result {
        let mut client = self.runtime();
        let stop = StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        client.stop_pod_sandbox(stop).await?;
        let remove = RemovePodSandboxRequest { pod_sandbox_id };
        client.remove_pod_sandbox(remove).await?;
        Ok(())
    }

    /// Returns a client of the image service.
    pub(crate) fn image(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }
}

/// Codec that passes raw bytes, for messages with fields that k8s-cri (1.32) does not define.
#[derive(Debug, Clone, Copy, Default)]
struct RawCodec;

impl tonic::codec::Codec for RawCodec {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        *self
    }
    fn decoder(&mut self) -> Self {
        *self
    }
}

impl tonic::codec::Encoder for RawCodec {
    type Item = Vec<u8>;
    type Error = tonic::Status;
    fn encode(
        &mut self,
        item: Vec<u8>,
        out: &mut tonic::codec::EncodeBuf<'_>,
    ) -> std::result::Result<(), tonic::Status> {
        bytes::BufMut::put_slice(out, &item);
        Ok(())
    }
}

impl tonic::codec::Decoder for RawCodec {
    type Item = Vec<u8>;
    type Error = tonic::Status;
    fn decode(
        &mut self,
        input: &mut tonic::codec::DecodeBuf<'_>,
    ) -> std::result::Result<Option<Vec<u8>>, tonic::Status> {
        let mut item = vec![0; bytes::Buf::remaining(input)];
        bytes::Buf::copy_to_slice(input, &mut item);
        Ok(Some(item))
    }
}

/// Returns the response's message, or the status as a failure.
pub(crate) fn answer<T>(
    what: &str,
    answer: std::result::Result<tonic::Response<T>, tonic::Status>,
) -> Result<T> {
    answer
        .map(tonic::Response::into_inner)
        .map_err(|s| status_failure(&s))
        .during(what)
}

/// Converts a status into a failure.
pub(crate) fn status_failure(status: &tonic::Status) -> Failure {
    Failure(format!("{:?}: {}", status.code(), status.message()))
}

/// Wraps a message in a request with a deadline on both ends.
pub(crate) fn within<T>(limit: Duration, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(limit);
    request
}
