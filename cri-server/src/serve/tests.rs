//! The gRPC server over a real socket, spoken to in bytes as grpc-go would.

use super::*;
use crate::service::tests::Fixture;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Limit of each test's waits.
const PATIENCE: Duration = Duration::from_secs(20);

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

/// A Version call whose `:authority` is what grpc-go makes of a socket's path.
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
        // Until the runtime's name, or a reset of the stream (type 3), or the end.
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
    tokio::time::timeout(PATIENCE, read).await.unwrap();
    got
}

#[tokio::test]
async fn authorities_of_grpc_go_are_answered_and_the_end_is_bounded() {
    let fixture = Fixture::new().await;
    let path = fixture.dir.path().join("run/cri.sock");
    let listener = socket::bind(&path).unwrap();
    let stop = CancellationToken::new();
    let token = stop.clone();
    let server = fixture.server.clone();
    let serving = tokio::spawn(async move { grpc(&server, listener, token).await });
    for authority in [
        "localhost",
        "%2Frun%2Fboxlite%2Fcri.sock",
        "/run/boxlite/cri.sock",
    ] {
        let got = answer(&path, version_call(authority)).await;
        assert!(
            got.windows(11).any(|w| w == b"boxlite-cri"),
            "{authority}: {got:?}"
        );
    }
    // A client that stays connected and asks nothing holds nobody up.
    let idle = UnixStream::connect(&path).await.unwrap();
    let begun = Instant::now();
    stop.cancel();
    tokio::time::timeout(PATIENCE, serving)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(begun.elapsed() < fixture.server.config.timeouts.drain + Duration::from_secs(2));
    drop(idle);
}
