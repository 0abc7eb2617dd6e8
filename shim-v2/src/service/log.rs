//! The service boxlite.v1.ShimLog: reopens container logs after rotation.

use super::Service;
use async_trait::async_trait;
use boxlite_proto::shim::shim::{ReopenLogRequest, ReopenLogResponse};
use boxlite_proto::shim::shim_ttrpc::ShimLog;
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;

#[async_trait]
impl ShimLog for Service {
    async fn reopen_log(
        &self,
        _: &TtrpcContext,
        request: ReopenLogRequest,
    ) -> ttrpc::Result<ReopenLogResponse> {
        let process = self
            .sandbox
            .containers()
            .get(&request.container_id)?
            .process("")?;
        self.detached(async move { process.reopen_log().await })
            .await?;
        Ok(ReopenLogResponse::default())
    }
}
