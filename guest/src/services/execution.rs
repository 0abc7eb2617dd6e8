//! The `Execution` service: processes of containers and their streams.

use crate::agent::Agent;
use crate::container::error::ContainerError;
use crate::container::{Container, exec, kill_all, signal_of};
use crate::execution::Process;
use crate::execution::output::{Found, Observer};
use crate::spawner::set_terminal_size;
use crate::status::status;
use boxlite_proto::boxlite::v1::execution_server::Execution;
use boxlite_proto::boxlite::v1::{
    AckRequest, AckResponse, AttachChunk, AttachRequest, ErrorKind, ExecDeleteRequest,
    ExecDeleteResponse, ExecRequest, ExecResponse, KillRequest, KillResponse, OutputStream,
    ResizeTtyRequest, ResizeTtyResponse, SendInputRequest, SendInputResponse, WaitRequest,
    WaitResponse,
};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

/// Implementation of the `Execution` service.
#[derive(Debug)]
pub(crate) struct ExecutionService {
    agent: Arc<Agent>,
}

impl ExecutionService {
    /// Creates the service of `agent`.
    pub(crate) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    async fn container(&self, id: &str) -> Result<Arc<Container>, Status> {
        Ok(self.agent.pod.get(id).await?)
    }

    async fn process(&self, container_id: &str, exec_id: &str) -> Result<Arc<Process>, Status> {
        Ok(self.container(container_id).await?.process(exec_id).await?)
    }
}

/// Minimum interval between two chunks of a reader. If the last chunk is more recent, the next is held back until it
/// is full or the interval has passed: otherwise a process that writes line by line would cost a message, and a
/// wake-up of the host, per line. The first chunk after a pause, and the output left when the process ends, are sent
/// immediately.
const COALESCE_INTERVAL: Duration = Duration::from_millis(20);
/// The same for a terminal, because a user waits for the echo.
const TERMINAL_COALESCE_INTERVAL: Duration = Duration::from_millis(2);

/// State of an Attach stream.
struct AttachStream {
    process: Arc<Process>,
    offset: u64,
    /// Time of the last chunk.
    last: Option<Instant>,
    /// Present if the reader never acknowledges.
    _observer: Option<Observer>,
}

impl AttachStream {
    /// Returns the next chunk; the last one has `eof` set, and an error also ends the stream.
    async fn next(stream: Option<Self>) -> Option<(Result<AttachChunk, Status>, Option<Self>)> {
        let mut stream = stream?;
        let pause = if stream.process.terminal.is_some() {
            TERMINAL_COALESCE_INTERVAL
        } else {
            COALESCE_INTERVAL
        };
        if let Some(last) = stream.last
            && last.elapsed() < pause
        {
            let filled = stream.process.output.fills_chunk(stream.offset);
            let _ = tokio::time::timeout_at(last + pause, filled).await;
        }
        match stream.process.output.read(stream.offset).await {
            Found::Data(chunk) => {
                stream.offset = chunk.offset + chunk.data.len() as u64;
                stream.last = Some(Instant::now());
                let message = AttachChunk {
                    offset: chunk.offset,
                    stream: chunk.stream.into(),
                    data: chunk.data,
                    eof: false,
                };
                Some((Ok(message), Some(stream)))
            }
            Found::Gone(first) => {
                let message = format!(
                    "output below offset {first} was freed, requested offset {}",
                    stream.offset
                );
                Some((
                    Err(status(ErrorKind::OutputGone, &first.to_string(), message)),
                    None,
                ))
            }
            Found::End | Found::Later => {
                let message = AttachChunk {
                    offset: stream.process.output.end(),
                    stream: OutputStream::Unspecified.into(),
                    data: Default::default(),
                    eof: true,
                };
                Some((Ok(message), None))
            }
        }
    }
}

#[tonic::async_trait]
impl Execution for ExecutionService {
    async fn exec(&self, request: Request<ExecRequest>) -> Result<Response<ExecResponse>, Status> {
        let request = request.into_inner();
        let container = self.container(&request.container_id).await?;
        let process = exec::exec(&self.agent.pod.context, &container, request).await?;
        Ok(Response::new(ExecResponse {
            pid: process.pid.unsigned_abs(),
        }))
    }

    type AttachStream = Pin<Box<dyn Stream<Item = Result<AttachChunk, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<AttachRequest>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let request = request.into_inner();
        let process = self
            .process(&request.container_id, &request.exec_id)
            .await?;
        let observer = request.observer.then(|| Observer::of(&process.output));
        let offset = if request.from_end {
            process.output.end()
        } else {
            request.offset
        };
        if offset > process.output.end() {
            let message = format!(
                "offset {offset} is beyond the end of the output, {}",
                process.output.end()
            );
            return Err(status(ErrorKind::InvalidArgument, "offset", message));
        }
        let stream = AttachStream {
            process,
            offset,
            last: None,
            _observer: observer,
        };
        Ok(Response::new(Box::pin(futures::stream::unfold(
            Some(stream),
            AttachStream::next,
        ))))
    }

    async fn ack(&self, request: Request<AckRequest>) -> Result<Response<AckResponse>, Status> {
        let request = request.into_inner();
        let process = self
            .process(&request.container_id, &request.exec_id)
            .await?;
        process.output.ack(request.offset);
        Ok(Response::new(AckResponse {}))
    }

    async fn send_input(
        &self,
        request: Request<Streaming<SendInputRequest>>,
    ) -> Result<Response<SendInputResponse>, Status> {
        let mut stream = request.into_inner();
        let Some(first) = stream.message().await? else {
            return Err(status(
                ErrorKind::InvalidArgument,
                "container_id",
                "the first message must name the process",
            ));
        };
        let process = self.process(&first.container_id, &first.exec_id).await?;
        let writer = first.writer.clone();
        let mut message = Some(first);
        let mut accepted = 0;
        while let Some(chunk) = message {
            accepted = process
                .input
                .write(&writer, chunk.offset, &chunk.data, chunk.eof)
                .await?;
            if chunk.eof {
                break;
            }
            message = stream.message().await?;
        }
        Ok(Response::new(SendInputResponse { accepted }))
    }

    async fn wait(&self, request: Request<WaitRequest>) -> Result<Response<WaitResponse>, Status> {
        let request = request.into_inner();
        let process = self
            .process(&request.container_id, &request.exec_id)
            .await?;
        let exit = process.wait().await;
        Ok(Response::new(WaitResponse {
            exit: Some(exit),
            guest_time_unix_ns: crate::system::unix_time_ns(),
        }))
    }

    async fn kill(&self, request: Request<KillRequest>) -> Result<Response<KillResponse>, Status> {
        let request = request.into_inner();
        let container = self.container(&request.container_id).await?;
        if request.exec_id.is_empty() {
            container.kill(request.signal, request.all)?;
            return Ok(Response::new(KillResponse {}));
        }
        let process = container.process(&request.exec_id).await?;
        let signal = signal_of(request.signal)?;
        if request.all {
            kill_all(&process.cgroup, signal)?;
        } else {
            process
                .kill(signal)
                .map_err(|source| ContainerError::Step {
                    step: "failed to signal the process",
                    source,
                })?;
        }
        Ok(Response::new(KillResponse {}))
    }

    async fn resize_tty(
        &self,
        request: Request<ResizeTtyRequest>,
    ) -> Result<Response<ResizeTtyResponse>, Status> {
        let request = request.into_inner();
        let process = self
            .process(&request.container_id, &request.exec_id)
            .await?;
        let Some(terminal) = &process.terminal else {
            return Err(status(
                ErrorKind::WrongState,
                "terminal",
                "the process has no terminal",
            ));
        };
        let cells = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        set_terminal_size(terminal.get(), cells(request.rows), cells(request.cols))
            .map_err(|errno| status(ErrorKind::Internal, "terminal", errno.to_string()))?;
        Ok(Response::new(ResizeTtyResponse {}))
    }

    async fn delete(
        &self,
        request: Request<ExecDeleteRequest>,
    ) -> Result<Response<ExecDeleteResponse>, Status> {
        let request = request.into_inner();
        match self.agent.pod.get(&request.container_id).await {
            Ok(container) => exec::delete(&container, &request.exec_id).await?,
            // An exec does not outlive its container.
            Err(ContainerError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Response::new(ExecDeleteResponse {}))
    }
}
