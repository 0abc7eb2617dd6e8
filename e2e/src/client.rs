//! [`Cri`]: a CRI v1 client over the daemon's unix socket, on k8s-cri's types (not ours): what a kubelet would send.
//!
//! Every call has a deadline, as a kubelet's have. Judges nothing; tests do.

use crate::outcome::{During, Failure, Result};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// A client of both services.
#[derive(Debug, Clone)]
pub struct Cri {
    channel: Channel,
}

/// Largest answer taken, in bytes: the kubelet's.
const MESSAGE: usize = 16 << 20;

impl Cri {
    /// Connects on first use, and again after the daemon came back.
    pub fn lazy(socket: &Path) -> Result<Self> {
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

    /// The runtime service.
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE)
    }

    /// A call of the runtime service whose messages k8s-cri does not have, or not in this form.
    pub async fn raw<Q, A>(&self, method: &str, message: Q) -> std::result::Result<A, tonic::Status>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let codec = tonic_prost::ProstCodec::<Q, A>::default();
        Ok(self.unary(method, message, codec).await?.into_inner())
    }

    /// One call of the runtime service by its name, bytes in and bytes out.
    pub async fn raw_bytes(&self, method: &str, message: Vec<u8>) -> Result<Vec<u8>> {
        answer(method, self.unary(method, message, Plain).await)
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
            .map_err(|_| tonic::Status::internal(format!("{method} is no method")))?;
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        client
            .ready()
            .await
            .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        client
            .unary(tonic::Request::new(message), path, codec)
            .await
    }

    /// The image service.
    pub fn image(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE)
    }
}

/// Bytes as they are on the wire, for messages with fields that k8s-cri (1.32) does not know.
#[derive(Debug, Clone, Copy, Default)]
struct Plain;

impl tonic::codec::Codec for Plain {
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

impl tonic::codec::Encoder for Plain {
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

impl tonic::codec::Decoder for Plain {
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

/// The answer's content, or the status in words.
pub fn answer<T>(
    what: &str,
    answer: std::result::Result<tonic::Response<T>, tonic::Status>,
) -> Result<T> {
    answer
        .map(tonic::Response::into_inner)
        .map_err(|s| status_failure(&s))
        .during(what)
}

/// A status as a failure.
pub fn status_failure(status: &tonic::Status) -> Failure {
    Failure(format!("{:?}: {}", status.code(), status.message()))
}

/// A request that gives up, at both ends, after `limit`.
pub fn within<T>(limit: Duration, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(limit);
    request
}
