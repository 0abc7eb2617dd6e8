//! The `Mounts` service: exports mounts of containers to the host, by [`crate::mount_export`], and updates copies of
//! volumes, by [`crate::storage::mirror`].

use crate::agent::Agent;
use crate::container::error::ContainerError;
use crate::mount_export::server;
use crate::status::joined;
use boxlite_proto::boxlite::v1::mounts_server::Mounts;
use boxlite_proto::boxlite::v1::{
    FuseRequest, FuseResponse, RefreshRequest, RefreshResponse, WatchExportsRequest,
    WatchExportsResponse,
};
use std::pin::Pin;
use std::sync::Arc;
use tokio_stream::Stream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};

/// Implementation of the `Mounts` service.
#[derive(Debug)]
pub(crate) struct MountsService {
    agent: Arc<Agent>,
}

impl MountsService {
    /// Creates the service of `agent`.
    pub(crate) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }
}

#[tonic::async_trait]
impl Mounts for MountsService {
    type WatchExportsStream =
        Pin<Box<dyn Stream<Item = Result<WatchExportsResponse, Status>> + Send>>;

    async fn watch_exports(
        &self,
        request: Request<Streaming<WatchExportsRequest>>,
    ) -> Result<Response<Self::WatchExportsStream>, Status> {
        let exports = Arc::clone(&self.agent.pod.context.exports);
        let reader = exports.reader();
        let mut said = request.into_inner();
        let hearing = AbortOnDropHandle::new(tokio::spawn({
            let exports = Arc::clone(&exports);
            async move {
                while let Ok(Some(message)) = said.message().await {
                    exports.acknowledge(message.generation);
                }
            }
        }));
        let state = (exports, reader, hearing, None);
        let stream =
            futures::stream::unfold(state, |(exports, reader, hearing, after)| async move {
                let list = exports.next(after).await;
                let after = Some(list.generation);
                Some((Ok(list), (exports, reader, hearing, after)))
            });
        Ok(Response::new(Box::pin(stream)))
    }

    type FuseStream = Pin<Box<dyn Stream<Item = Result<FuseResponse, Status>> + Send>>;

    async fn fuse(
        &self,
        request: Request<Streaming<FuseRequest>>,
    ) -> Result<Response<Self::FuseStream>, Status> {
        let stream = server::open(&self.agent.pod.context.exports, request.into_inner()).await?;
        Ok(Response::new(Box::pin(stream)))
    }

    async fn refresh(
        &self,
        request: Request<RefreshRequest>,
    ) -> Result<Response<RefreshResponse>, Status> {
        let request = request.into_inner();
        let agent = Arc::clone(&self.agent);
        let refresh = tokio::task::spawn_blocking(move || {
            let mirrors = &agent.pod.context.mirrors;
            mirrors.refresh(&request.volume, &request.version)
        });
        let copied = joined(refresh).await?.map_err(ContainerError::from)?;
        Ok(Response::new(RefreshResponse { copied }))
    }
}
