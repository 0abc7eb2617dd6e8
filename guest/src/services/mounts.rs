//! The `Mounts` service: mounts of containers that the host shows, too. All of it is [`crate::shown`]'s.

use crate::agent::Agent;
use crate::shown::server;
use boxlite_proto::boxlite::v1::mounts_server::Mounts;
use boxlite_proto::boxlite::v1::{FuseRequest, FuseResponse, ShownRequest, ShownResponse};
use std::pin::Pin;
use std::sync::Arc;
use tokio::task::JoinHandle;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

/// See the service in `service.proto`.
#[derive(Debug)]
pub struct MountsService {
    agent: Arc<Agent>,
}

impl MountsService {
    /// The service of `agent`.
    pub fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[tonic::async_trait]
impl Mounts for MountsService {
    type ShownStream = Pin<Box<dyn Stream<Item = Result<ShownResponse, Status>> + Send>>;

    async fn shown(
        &self,
        request: Request<Streaming<ShownRequest>>,
    ) -> Result<Response<Self::ShownStream>, Status> {
        let shown = Arc::clone(&self.agent.pod.shown);
        let reader = shown.reader();
        let mut said = request.into_inner();
        let hearing = tokio::spawn({
            let shown = Arc::clone(&shown);
            async move {
                while let Ok(Some(message)) = said.message().await {
                    shown.acknowledge(message.generation);
                }
            }
        });
        let state = (shown, reader, AbortOnDrop(hearing), None);
        let stream = futures::stream::unfold(state, |(shown, reader, hearing, after)| async move {
            let list = shown.next(after).await;
            let after = Some(list.generation);
            Some((Ok(list), (shown, reader, hearing, after)))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    type FuseStream = Pin<Box<dyn Stream<Item = Result<FuseResponse, Status>> + Send>>;

    async fn fuse(
        &self,
        request: Request<Streaming<FuseRequest>>,
    ) -> Result<Response<Self::FuseStream>, Status> {
        let stream = server::open(&self.agent.pod.shown, request.into_inner()).await?;
        Ok(Response::new(Box::pin(stream)))
    }
}
