//! The `Execution` service: processes that do not exist, and their output.

use crate::attack::{Attack, Containers};
use crate::container::{PID, fail_or_hang, impossible_exit};
use boxlite_proto::boxlite::v1::execution_server::Execution;
use boxlite_proto::boxlite::v1::*;
use boxlite_proto::names::MAX_CHUNK_BYTES;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

/// The flood of output: empty lines, which cost the host most. The log gets 41 times as much.
const LINE: &[u8] = b"\n";

pub(crate) struct ExecutionService(pub(crate) Arc<Containers>);

#[tonic::async_trait]
impl Execution for ExecutionService {
    async fn exec(&self, request: Request<ExecRequest>) -> Result<Response<ExecResponse>, Status> {
        let attack = self.0.attack(&request.into_inner().container_id);
        fail_or_hang(attack).await?;
        Ok(Response::new(ExecResponse { pid: PID }))
    }

    type AttachStream = BoxStream<'static, Result<AttachChunk, Status>>;

    /// Streams output if the attack has any, and ends when the container is killed.
    async fn attach(
        &self,
        request: Request<AttachRequest>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let AttachRequest {
            container_id,
            offset,
            ..
        } = request.into_inner();
        let data = Bytes::from(LINE.repeat(MAX_CHUNK_BYTES / LINE.len()));
        let state = (Arc::clone(&self.0), container_id, Some(offset), data);
        let output = stream::unfold(state, |(containers, id, offset, data)| async move {
            let offset = offset?;
            let seen = containers
                .wait(|c| {
                    c.id == id
                        && (c.killed
                            || c.started && c.attack == Attack::Exits
                            || c.started && c.attack == Attack::Logs && offset < c.lines)
                })
                .await;
            let mut chunk = AttachChunk {
                offset,
                stream: OutputStream::Stderr.into(),
                ..AttachChunk::default()
            };
            if seen.killed || seen.attack == Attack::Exits {
                chunk.eof = true;
                return Some((Ok(chunk), (containers, id, None, data)));
            }
            chunk.data = data.clone();
            let next = Some(offset + data.len() as u64);
            Some((Ok(chunk), (containers, id, next, data)))
        });
        Ok(Response::new(output.boxed()))
    }

    async fn ack(&self, _: Request<AckRequest>) -> Result<Response<AckResponse>, Status> {
        Ok(Response::new(AckResponse {}))
    }

    async fn send_input(
        &self,
        _: Request<Streaming<SendInputRequest>>,
    ) -> Result<Response<SendInputResponse>, Status> {
        Ok(Response::new(SendInputResponse { accepted: u64::MAX }))
    }

    async fn wait(&self, request: Request<WaitRequest>) -> Result<Response<WaitResponse>, Status> {
        let id = request.into_inner().container_id;
        self.0
            .wait(|c| c.id == id && (c.killed || c.started && c.attack == Attack::Exits))
            .await;
        Ok(Response::new(WaitResponse {
            exit: Some(impossible_exit()),
            guest_time_unix_ns: i64::MAX,
        }))
    }

    async fn kill(&self, request: Request<KillRequest>) -> Result<Response<KillResponse>, Status> {
        let request = request.into_inner();
        fail_or_hang(self.0.attack(&request.container_id)).await?;
        if request.exec_id.is_empty() {
            self.0.change(&request.container_id, |c| c.killed = true);
        }
        Ok(Response::new(KillResponse {}))
    }

    async fn resize_tty(
        &self,
        _: Request<ResizeTtyRequest>,
    ) -> Result<Response<ResizeTtyResponse>, Status> {
        Ok(Response::new(ResizeTtyResponse {}))
    }

    async fn delete(
        &self,
        request: Request<ExecDeleteRequest>,
    ) -> Result<Response<ExecDeleteResponse>, Status> {
        fail_or_hang(self.0.attack(&request.into_inner().container_id)).await?;
        Ok(Response::new(ExecDeleteResponse {}))
    }
}
