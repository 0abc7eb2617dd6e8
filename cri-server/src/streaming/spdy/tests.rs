//! Tests of framing and connections: bytes written by Kubernetes' library, hostile bytes, and back-pressure.

use super::frame::{Frame, MAX_CHUNK_BYTES, Reader};
use super::headers::{Deflater, Headers, Inflater};
use super::*;
use crate::streaming::output::Output;
use bytes::Bytes;
use proptest::prelude::*;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_util::sync::CancellationToken;

/// Three SYN_STREAM frames of one connection as written by spdystream 0.5.1 (Go), with streamType error, stdin,
/// stdout besides port 8080 and requestID 7.
const GO_FRAMES: [&str; 3] = [
    "800300010000003e0000000100000000000078f9e3c6a7c202253a703a2b294a4dcc851625aca9a0808614cb45e01c60616061c0c0c0c0590489c64c50f2663407000000ffff",
    "800300010000001a00000003000000000000c2aeb9b82425338fb06600000000ffff",
    "800300010000001c00000005000000000000c2aa99adb824251f5c0510d00d000000ffff",
];
const HOUR: Duration = Duration::from_secs(3600);

fn syn_stream(id: u32, block: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80, 3, 0, 1];
    frame.extend_from_slice(&(10 + block.len() as u32).to_be_bytes());
    frame.extend_from_slice(&id.to_be_bytes());
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(block);
    frame
}

fn data(id: u32, fin: bool, bytes: &[u8]) -> Vec<u8> {
    let mut frame = super::frame::data_head(id, bytes.len(), fin).to_vec();
    frame.extend_from_slice(bytes);
    frame
}

async fn frames(bytes: &[u8]) -> (Vec<Frame>, Option<SpdyError>) {
    let mut reader = Reader::new(bytes);
    let mut frames = Vec::new();
    loop {
        match reader.next().await {
            Ok(Some(frame)) => frames.push(frame),
            Ok(None) => return (frames, None),
            Err(error) => return (frames, Some(error)),
        }
    }
}

#[test]
fn dictionary_has_the_specified_checksum() {
    let (mut a, mut b) = (1u32, 0u32);
    for byte in dictionary::bytes() {
        a = (a + u32::from(byte)) % 65_521;
        b = (b + a) % 65_521;
    }
    assert_eq!(b << 16 | a, dictionary::ID);
}

#[tokio::test]
async fn frames_of_go_are_read() {
    let bytes: Vec<u8> = GO_FRAMES
        .iter()
        .flat_map(|frame| hex::decode(frame).unwrap())
        .collect();
    let (frames, error) = frames(&bytes).await;
    assert!(error.is_none(), "{error:?}");
    for ((frame, kind), number) in frames.iter().zip(["error", "stdin", "stdout"]).zip(0..) {
        let Frame::Open { id, fin, headers } = frame else {
            panic!("{frame:?}");
        };
        assert_eq!((*id, *fin), (1 + 2 * number, false));
        assert_eq!(headers.get("streamtype"), kind);
        assert_eq!(headers.get("port"), "8080");
        assert_eq!(headers.get("requestid"), "7");
        assert_eq!(headers.get("absent"), "");
    }
    assert_eq!(frames.len(), 3);
}

#[test]
fn empty_blocks_round_trip() {
    let (mut deflater, mut inflater) = (Deflater::default(), Inflater::new());
    for _ in 0..5 {
        assert_eq!(
            inflater.read(&deflater.empty_block()).unwrap(),
            Headers::default()
        );
    }
}

#[test]
fn oversized_header_block_is_rejected() {
    let mut bomb = Vec::new();
    let mut raw = flate2::write::ZlibEncoder::new(&mut bomb, flate2::Compression::best());
    std::io::Write::write_all(&mut raw, &vec![0; 64 << 20]).unwrap();
    raw.finish().unwrap();
    let error = Inflater::new().read(&bomb).unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid SPDY header block: block too large"
    );
}

#[tokio::test]
async fn large_data_frame_is_delivered_in_chunks() {
    let bytes = vec![7; 3 * MAX_CHUNK_BYTES + 5];
    let (frames, error) = frames(&data(9, true, &bytes)).await;
    assert!(error.is_none());
    let mut length = 0;
    for (index, frame) in frames.iter().enumerate() {
        let Frame::Data { id, fin, data } = frame else {
            panic!("{frame:?}");
        };
        assert_eq!((*id, *fin), (9, index == frames.len() - 1));
        assert!(data.len() <= MAX_CHUNK_BYTES);
        length += data.len();
    }
    assert_eq!((frames.len(), length), (4, bytes.len()));
}

proptest! {
    #[test]
    fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (frames, _) = runtime.block_on(frames(&bytes));
        prop_assert!(frames.len() <= bytes.len() / 8 + 1);
    }

    #[test]
    fn damaged_frames_never_panic(at in 0usize..140, byte in any::<u8>(), cut in 0usize..140) {
        let mut bytes: Vec<u8> = GO_FRAMES.iter().flat_map(|frame| hex::decode(frame).unwrap()).collect();
        let at = at % bytes.len();
        bytes[at] = byte;
        bytes.truncate(bytes.len() - cut % bytes.len());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (frames, _) = runtime.block_on(frames(&bytes));
        for frame in frames {
            if let Frame::Open { headers, .. } = frame {
                prop_assert!(headers.0.len() <= 64);
            }
        }
    }

    #[test]
    fn hostile_blocks_never_panic(blocks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..64), 1..4)) {
        let mut inflater = Inflater::new();
        for mut block in blocks {
            block.splice(0..0, [0x78, 0x01]);
            let _ = inflater.read(&block);
        }
    }
}

/// Returns a served connection that echoes every stream, and its client end.
fn echo() -> (DuplexStream, tokio::task::JoinHandle<()>, CancellationToken) {
    let (client, server) = tokio::io::duplex(4 << 10);
    let gone = CancellationToken::new();
    let token = gone.clone();
    let task = tokio::spawn(serve(server, HOUR, gone.clone(), |mut accept| async move {
        let mut streams = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                () = token.cancelled() => return,
                Some(mut stream) = accept.recv() => {
                    streams.spawn(async move {
                        while let Ok(Some(chunk)) = stream.input.next().await {
                            if stream.output.write(chunk).await.is_err() {
                                return;
                            }
                        }
                        Output::Spdy(stream.output).finish().await;
                    });
                }
            }
        }
    }));
    (client, task, gone)
}

/// Returns the payload of all data frames of `id` up to the last.
async fn read_stream(client: &mut DuplexStream, id: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut head = [0; 8];
    loop {
        client.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
        let mut payload = vec![0; length];
        client.read_exact(&mut payload).await.unwrap();
        let of = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        if of == id {
            bytes.extend(payload);
            if head[4] & 1 == 1 {
                return bytes;
            }
        }
    }
}

#[tokio::test]
async fn stream_is_echoed_with_half_close() {
    let (mut client, task, gone) = echo();
    let block = Deflater::default().empty_block();
    client.write_all(&syn_stream(1, &block)).await.unwrap();
    client.write_all(&data(1, false, b"hello ")).await.unwrap();
    client.write_all(&data(1, true, b"world")).await.unwrap();
    assert_eq!(read_stream(&mut client, 1).await, b"hello world");
    drop(client);
    task.await.unwrap();
    assert!(gone.is_cancelled());
}

#[tokio::test]
async fn stream_without_consumer_stalls_its_peer() {
    let (mut client, server) = tokio::io::duplex(4 << 10);
    let gone = CancellationToken::new();
    let task = tokio::spawn(serve(server, HOUR, gone.clone(), |mut accept| async move {
        let _held = accept.recv().await;
        std::future::pending::<()>().await
    }));
    let block = Deflater::default().empty_block();
    client.write_all(&syn_stream(1, &block)).await.unwrap();
    let chunk = data(1, false, &[1; MAX_CHUNK_BYTES]);
    let mut sent = 0;
    while tokio::time::timeout(Duration::from_millis(200), client.write_all(&chunk))
        .await
        .is_ok()
    {
        sent += 1;
        assert!(sent < 20, "{sent} chunks were accepted without a reader");
    }
    task.abort();
}

#[tokio::test]
async fn invalid_streams_are_reset_without_affecting_others() {
    let (mut client, task, _gone) = echo();
    let mut deflater = Deflater::default();
    for id in [4, 5, 3, 7] {
        let block = deflater.empty_block();
        client.write_all(&syn_stream(id, &block)).await.unwrap();
    }
    client.write_all(&data(99, true, b"nobody")).await.unwrap();
    client.write_all(&data(7, true, b"seven")).await.unwrap();
    let mut resets = Vec::new();
    let mut head = [0; 8];
    let echoed = loop {
        client.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
        let mut payload = vec![0; length];
        client.read_exact(&mut payload).await.unwrap();
        match head[..4] {
            [0x80, 3, 0, 3] => resets.push(payload[3]),
            [0, 0, 0, 7] if length > 0 => break payload,
            _ => {}
        }
    };
    assert_eq!(resets, [4, 3]);
    assert_eq!(echoed, b"seven");
    drop(client);
    task.await.unwrap();
}

#[tokio::test]
async fn idle_connection_is_closed() {
    let (_client, server) = tokio::io::duplex(4 << 10);
    let gone = CancellationToken::new();
    let token = gone.clone();
    let limit = Duration::from_millis(50);
    serve(server, limit, gone.clone(), |_accept| async move {
        token.cancelled().await;
    })
    .await;
    assert!(gone.is_cancelled());
}

#[tokio::test]
async fn output_after_reset_fails() {
    let (mut client, server) = tokio::io::duplex(64 << 10);
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let task = tokio::spawn(serve(
        server,
        HOUR,
        CancellationToken::new(),
        |mut accept| async move {
            let mut stream = accept.recv().await.unwrap();
            while let Ok(Some(_)) = stream.input.next().await {}
            let _ = sender.send(stream.output.write(Bytes::from_static(b"x")).await);
        },
    ));
    let block = Deflater::default().empty_block();
    client.write_all(&syn_stream(1, &block)).await.unwrap();
    client
        .write_all(&super::frame::reset(1, super::frame::Reset::Cancel))
        .await
        .unwrap();
    assert!(receiver.await.unwrap().is_err());
    drop(client);
    task.await.unwrap();
}

/// Takes one ping interval of real time.
#[tokio::test]
async fn stalled_consumer_causes_pings() {
    let (mut client, server) = tokio::io::duplex(1 << 20);
    let task = tokio::spawn(serve(
        server,
        HOUR,
        CancellationToken::new(),
        |mut accept| async move {
            let _held = accept.recv().await;
            std::future::pending::<()>().await
        },
    ));
    let block = Deflater::default().empty_block();
    client.write_all(&syn_stream(1, &block)).await.unwrap();
    for _ in 0..20 {
        let chunk = data(1, false, &[1; MAX_CHUNK_BYTES]);
        client.write_all(&chunk).await.unwrap();
    }
    let mut head = [0; 8];
    loop {
        client.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
        let mut payload = vec![0; length];
        client.read_exact(&mut payload).await.unwrap();
        if head[..4] == [0x80, 3, 0, 6] {
            assert_eq!(payload, [0, 0, 0, 2]);
            break;
        }
    }
    task.abort();
}

/// Writes `flood` repeatedly until the server stops reading; returns the number of bytes that it took.
async fn taken(client: &mut DuplexStream, flood: &[u8], rounds: usize) -> usize {
    let mut sent = 0;
    for _ in 0..rounds {
        let write = client.write_all(flood);
        if tokio::time::timeout(Duration::from_millis(300), write)
            .await
            .is_err()
        {
            break;
        }
        sent += flood.len();
    }
    sent
}

#[tokio::test]
async fn ping_flood_without_reads_stalls_the_peer() {
    let (mut client, task, _gone) = echo();
    let flood = super::frame::ping(1).repeat(1000);
    let sent = taken(&mut client, &flood, 1000).await;
    assert!(sent < 1 << 20, "{sent} bytes of pings were answered");
    task.abort();
}

#[tokio::test]
async fn window_updates_cause_no_output() {
    let (mut client, task, _gone) = echo();
    // WINDOW_UPDATE of stream 1 by 64 KiB.
    let frame = [0x80, 3, 0, 9, 0, 0, 0, 8, 0, 0, 0, 1, 0, 1, 0, 0];
    let sent = taken(&mut client, &frame.repeat(1000), 100).await;
    assert_eq!(sent, 1_600_000);
    client.write_all(&super::frame::ping(5)).await.unwrap();
    let mut answer = [0; 12];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer[..], super::frame::ping(5)[..]);
    task.abort();
}

#[tokio::test]
async fn unaccepted_streams_are_bounded() {
    let (mut client, server) = tokio::io::duplex(1 << 20);
    let task = tokio::spawn(serve(
        server,
        HOUR,
        CancellationToken::new(),
        |accept| async move {
            let _held = accept;
            std::future::pending::<()>().await
        },
    ));
    let mut deflater = Deflater::default();
    let mut flood = Vec::new();
    for id in 0..20_000u32 {
        flood.extend(syn_stream(2 * id + 1, &deflater.empty_block()));
    }
    let sent = taken(&mut client, &flood[..600_000.min(flood.len())], 1).await;
    assert!(sent > 0);
    let mut replies = 0;
    let mut frame = [0; 8];
    while tokio::time::timeout(Duration::from_millis(300), client.read_exact(&mut frame))
        .await
        .is_ok()
    {
        let length = u32::from_be_bytes([0, frame[5], frame[6], frame[7]]) as usize;
        let mut payload = vec![0; length];
        client.read_exact(&mut payload).await.unwrap();
        replies += 1;
    }
    assert!(replies <= 64, "{replies} streams without a consumer");
    task.abort();
}

#[test]
fn fuzz_frames_are_read_or_rejected_in_bounded_chunks() {
    let mut seed = Vec::new();
    for frame in GO_FRAMES {
        seed.extend(hex::decode(frame).unwrap());
    }
    // Data, a ping, a reset and the end of the connection.
    seed.extend([0, 0, 0, 3, 0, 0, 0, 2, b'h', b'i']);
    seed.extend([0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1]);
    seed.extend([0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 5]);
    seed.extend([0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 0]);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    boxlite_fuzz::Fuzz::new("spdy").seed(seed).run(|input| {
        runtime.block_on(async {
            let mut reader = Reader::new(input);
            while let Ok(Some(frame)) = reader.next().await {
                if let Frame::Data { data, .. } = frame {
                    assert!(data.len() <= MAX_CHUNK_BYTES);
                }
            }
        });
    });
}
