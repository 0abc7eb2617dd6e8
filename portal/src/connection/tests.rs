//! The Portal against an agent in this process: greeting, reconnects, output over broken connections.

mod hostile;

use super::*;
use crate::GuestSession;
use boxlite_proto::boxlite::v1::execution_server::{Execution, ExecutionServer};
use boxlite_proto::boxlite::v1::*;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use tokio::net::UnixListener;
use tonic::{Request, Response, Status, Streaming};

/// Total output of the fake process, in bytes.
const TOTAL: u64 = 1 << 20;

/// An agent with one process whose output byte `n` is `n % 251`. Each Attach breaks after `break_after` bytes and starts
/// slightly before the requested offset.
#[derive(Clone)]
struct Agent {
    break_after: u64,
    acked: Arc<AtomicU64>,
    kills: Arc<AtomicUsize>,
    ended: Arc<tokio::sync::Notify>,
    hangs: bool,
}

type Chunks = std::pin::Pin<Box<dyn futures::Stream<Item = Result<AttachChunk, Status>> + Send>>;

#[tonic::async_trait]
impl Execution for Agent {
    type AttachStream = Chunks;

    async fn exec(&self, _: Request<ExecRequest>) -> Result<Response<ExecResponse>, Status> {
        Ok(Response::new(ExecResponse { pid: 7 }))
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Result<Response<Chunks>, Status> {
        if self.hangs {
            return Ok(Response::new(Box::pin(futures::stream::pending())));
        }
        let from = request.into_inner().offset.saturating_sub(10);
        let until = (from + self.break_after).min(TOTAL);
        let chunks = (from..until).step_by(1000).map(move |offset| {
            let end = (offset + 1000).min(until);
            Ok(AttachChunk {
                offset,
                stream: OutputStream::Stdout.into(),
                data: (offset..end)
                    .map(|n| (n % 251) as u8)
                    .collect::<Vec<u8>>()
                    .into(),
                eof: end == TOTAL,
            })
        });
        let broken = (until < TOTAL).then(|| Err(Status::unavailable("cut")));
        let all: Vec<_> = chunks.chain(broken).collect();
        Ok(Response::new(Box::pin(futures::stream::iter(all))))
    }

    async fn ack(&self, request: Request<AckRequest>) -> Result<Response<AckResponse>, Status> {
        self.acked
            .fetch_max(request.into_inner().offset, Ordering::SeqCst);
        Ok(Response::new(AckResponse {}))
    }

    async fn send_input(
        &self,
        _: Request<Streaming<SendInputRequest>>,
    ) -> Result<Response<SendInputResponse>, Status> {
        Err(Status::unimplemented("not in this agent"))
    }

    async fn wait(&self, _: Request<WaitRequest>) -> Result<Response<WaitResponse>, Status> {
        if self.hangs {
            self.ended.notified().await;
        }
        let code = if self.hangs { 137 } else { 3 };
        Ok(Response::new(WaitResponse {
            exit: Some(Exit {
                code,
                ..Default::default()
            }),
            ..Default::default()
        }))
    }

    async fn kill(&self, request: Request<KillRequest>) -> Result<Response<KillResponse>, Status> {
        assert!(request.into_inner().all);
        self.kills.fetch_add(1, Ordering::SeqCst);
        self.ended.notify_one();
        Ok(Response::new(KillResponse {}))
    }

    async fn resize_tty(
        &self,
        _: Request<ResizeTtyRequest>,
    ) -> Result<Response<ResizeTtyResponse>, Status> {
        Err(Status::unimplemented("not in this agent"))
    }

    async fn delete(
        &self,
        _: Request<ExecDeleteRequest>,
    ) -> Result<Response<ExecDeleteResponse>, Status> {
        Ok(Response::new(ExecDeleteResponse {}))
    }
}

fn agent(break_after: u64, hangs: bool) -> Agent {
    Agent {
        break_after,
        acked: Arc::default(),
        kills: Arc::default(),
        ended: Arc::default(),
        hangs,
    }
}

/// Serves `agent` on a socket that requires the hybrid greeting.
fn serve_hybrid(agent: Agent, path: &Path) -> tokio::task::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    let (accepted, incoming) = tokio::sync::mpsc::channel::<io::Result<UnixStream>>(4);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut line = Vec::new();
            while let Ok(byte) = stream.read_u8().await {
                if byte == b'\n' {
                    break;
                }
                line.push(byte);
            }
            assert_eq!(line, b"CONNECT 2695");
            stream.write_all(b"OK 1073741824\n").await.unwrap();
            if accepted.send(Ok(stream)).await.is_err() {
                break;
            }
        }
    });
    tokio::spawn(async move {
        tonic::transport::Server::builder()
            .add_service(ExecutionServer::new(agent))
            .serve_with_incoming(tokio_stream::wrappers::ReceiverStream::new(incoming))
            .await
            .unwrap();
    })
}

fn session(path: PathBuf) -> GuestSession {
    GuestSession::new(Connection::lazy(GuestAddress::Hybrid { path, port: 2695 }))
}

fn request() -> ExecRequest {
    ExecRequest {
        container_id: "c".into(),
        exec_id: "e".into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn exec_sync_reads_every_byte_once_over_broken_streams() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let agent = agent(300_000, false);
    let server = serve_hybrid(agent.clone(), &path);
    let session = session(path);
    let output = session
        .execution()
        .exec_sync(request(), None, 16 << 20, std::future::pending())
        .await
        .unwrap();
    assert_eq!(output.exit_code, 3);
    assert_eq!(output.stdout.len() as u64, TOTAL);
    assert!(
        output
            .stdout
            .iter()
            .enumerate()
            .all(|(n, byte)| *byte == (n % 251) as u8)
    );
    assert!(!output.truncated);
    assert!(agent.acked.load(Ordering::SeqCst) > TOTAL / 2);
    assert_eq!(session.bytes_transferred(), TOTAL);
    server.abort();
}

#[tokio::test]
async fn exec_sync_output_is_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let server = serve_hybrid(agent(TOTAL, false), &path);
    let output = session(path)
        .execution()
        .exec_sync(request(), None, 1234, std::future::pending())
        .await
        .unwrap();
    assert_eq!(output.stdout.len(), 1234);
    assert!(output.truncated);
    server.abort();
}

#[tokio::test]
async fn exec_sync_kills_the_tree_on_timeout_and_cancellation() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let agent = agent(TOTAL, true);
    let server = serve_hybrid(agent.clone(), &path);
    let execution = session(path).execution();
    let limit = Some(Duration::from_millis(100));
    let result = execution
        .exec_sync(request(), limit, 10, std::future::pending())
        .await;
    assert!(
        matches!(result, Err(PortalError::ExecDeadline { .. })),
        "{result:?}"
    );
    assert_eq!(agent.kills.load(Ordering::SeqCst), 1);
    let result = execution
        .exec_sync(request(), None, 10, std::future::ready(()))
        .await;
    assert!(result.is_err());
    assert_eq!(agent.kills.load(Ordering::SeqCst), 2);
    server.abort();
}

#[tokio::test]
async fn calls_reconnect_after_the_agent_was_away() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let session = session(path.clone());
    let error = session.execution().delete("c", "e").await.unwrap_err();
    assert!(error.is_transport(), "{error:?}");
    let server = serve_hybrid(agent(TOTAL, false), &path);
    session.execution().delete("c", "e").await.unwrap();
    server.abort();
}

#[tokio::test]
async fn sever_ends_calls_and_retries_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    // The agent's end of the socket remains open, as a bridge that outlives its VM leaves it.
    let server = serve_hybrid(agent(TOTAL, true), &path);
    let session = session(path.clone());
    let execution = session.execution();
    let running = execution.exec_sync(request(), None, 16 << 20, std::future::pending());
    let started = std::time::Instant::now();
    let sever = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        session.sever();
    };
    let (result, ()) = tokio::join!(running, sever);
    let error = result.unwrap_err();
    assert!(error.is_transport(), "{error:?}");
    let late = session.execution().delete("c", "e").await.unwrap_err();
    assert!(late.is_transport(), "{late:?}");
    let dedicated = session.dedicated().execution();
    let late = dedicated.follow("c", "e", 0).next().await.unwrap_err();
    assert!(late.is_transport(), "{late:?}");
    assert!(started.elapsed() < Duration::from_secs(2));
    server.abort();
}

#[tokio::test]
async fn wrong_greeting_is_an_error_and_bounded() {
    let directory = tempfile::tempdir().unwrap();
    for (name, greeting) in [
        ("a", &b"NO\n"[..]),
        ("b", &[b'O'; 4096][..]),
        ("c", &b"OK \n"[..]),
        ("d", &b""[..]),
    ] {
        let path = directory.path().join(name);
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 13];
            stream.read_exact(&mut request).await.unwrap();
            let _ = stream.write_all(greeting).await;
        });
        let address = GuestAddress::Hybrid { path, port: 2695 };
        assert!(address.connect().await.is_err(), "{name}");
        server.await.unwrap();
    }
}
