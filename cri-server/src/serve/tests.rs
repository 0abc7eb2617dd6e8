//! Tests of the gRPC server over a real socket, with requests in bytes as grpc-go writes them.

use super::*;
use crate::service::tests::Fixture;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

/// Longest wait of a test.
const TEST_TIMEOUT: Duration = Duration::from_secs(20);

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn text(bytes: &[u8]) -> Vec<u8> {
    [&[u8::try_from(bytes.len()).unwrap()], bytes].concat()
}

/// Encodes a Version call with this `:authority`; grpc-go derives one from a socket's path.
fn version_call(authority: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86, 0x04];
    block.extend(text(b"/runtime.v1.RuntimeService/Version"));
    block.push(0x41);
    block.extend(text(authority.as_bytes()));
    block.extend([0x0f, 0x10]);
    block.extend(text(b"application/grpc"));
    block.push(0x00);
    block.extend(text(b"te"));
    block.extend(text(b"trailers"));
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[]),
        frame(1, 4, 1, &block),
        frame(0, 1, 1, &[0; 5]),
    ]
    .concat()
}

async fn answer(path: &std::path::Path, call: Vec<u8>) -> Vec<u8> {
    let mut stream = UnixStream::connect(path).await.unwrap();
    stream.write_all(&call).await.unwrap();
    let mut got = Vec::new();
    let read = async {
        // Read until the runtime's name, a reset of the stream (type 3), or the end.
        loop {
            let reset = got.windows(9).any(|w: &[u8]| w[..4] == [0, 0, 4, 3]);
            if reset || got.windows(11).any(|w| w == b"boxlite-cri") {
                return;
            }
            if stream.read_buf(&mut got).await.unwrap() == 0 {
                return;
            }
        }
    };
    tokio::time::timeout(TEST_TIMEOUT, read).await.unwrap();
    got
}

/// The gRPC server of a fixture on a socket in the fixture's directory.
pub(crate) struct Serving {
    pub socket: PathBuf,
    stop: CancellationToken,
    task: JoinHandle<Result<(), ServeError>>,
    fixture: Fixture,
}

impl Serving {
    /// Stops the server and waits for its end.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(TEST_TIMEOUT, self.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}

/// Serves a runtime without pods.
pub(crate) async fn serve_fixture() -> Serving {
    let fixture = Fixture::new().await;
    let socket = fixture.dir.path().join("run/cri.sock");
    let listener = socket::bind(&socket).unwrap();
    let stop = CancellationToken::new();
    let (server, token) = (fixture.server.clone(), stop.clone());
    Serving {
        socket,
        stop,
        task: tokio::spawn(async move { grpc(&server, listener, token).await }),
        fixture,
    }
}

#[tokio::test]
async fn grpc_answers_grpc_go_authorities_and_ends_in_time() {
    let serving = serve_fixture().await;
    for authority in [
        "localhost",
        "%2Frun%2Fboxlite%2Fcri.sock",
        "/run/boxlite/cri.sock",
    ] {
        let got = answer(&serving.socket, version_call(authority)).await;
        assert!(
            got.windows(11).any(|w| w == b"boxlite-cri"),
            "{authority}: {got:?}"
        );
    }
    // An idle client does not delay the end.
    let idle = UnixStream::connect(&serving.socket).await.unwrap();
    let begun = Instant::now();
    let drain = serving.fixture.server.config.timeouts.drain;
    serving.stop().await;
    assert!(begun.elapsed() < drain + Duration::from_secs(2));
    drop(idle);
}

#[tokio::test]
async fn metrics_client_that_stalls_does_not_block_the_end() {
    let fixture = Fixture::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let page = metrics::http::serve(
        listener,
        Arc::new(Metrics::new().unwrap()),
        fixture.server.runtime.clone(),
        stop.clone(),
    );
    let ended = CancellationToken::new();
    let guard = ended.clone().drop_guard();
    let page = AbortOnDropHandle::new(tokio::spawn(async move {
        let _guard = guard;
        page.await.unwrap();
    }));
    let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
    client
        .write_all(b"GET /metrics HTTP/1.1\r\n")
        .await
        .unwrap();
    // A complete call on another connection: the server has accepted the first one.
    let mut second = tokio::net::TcpStream::connect(address).await.unwrap();
    let call = b"GET /healthz HTTP/1.0\r\n\r\n";
    second.write_all(call).await.unwrap();
    second.read_to_end(&mut Vec::new()).await.unwrap();
    stop.cancel();
    let begun = Instant::now();
    let limit = Duration::from_millis(300);
    let joined = tokio::time::timeout(TEST_TIMEOUT, join("metrics clients", page, limit));
    joined.await.unwrap();
    assert!(begun.elapsed() >= limit, "the client did not stall the end");
    // The task was aborted rather than left behind.
    tokio::time::timeout(TEST_TIMEOUT, ended.cancelled())
        .await
        .unwrap();
}
