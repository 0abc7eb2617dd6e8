//! Tests of the channel codec, of channels and of the tunnel, against tungstenite's client side.

use super::channels::{decode, encode};
use super::*;
use crate::streaming::outcome::Outcome;
use crate::streaming::protocol::RequestedStreams;
use crate::streaming::remote::Remote;
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;

const HOUR: Duration = Duration::from_secs(3600);

async fn pair() -> (WebSocketStream<DuplexStream>, WebSocketStream<DuplexStream>) {
    let (client, server) = tokio::io::duplex(4 << 10);
    let client = WebSocketStream::from_raw_socket(client, Role::Client, None).await;
    (client, accept(server).await)
}

#[test]
fn subprotocols_match_kubernetes() {
    let version = |name| match Subprotocol::of_command(name) {
        Some(Subprotocol::Channels { version, base64 }) => Some((version, base64)),
        _ => None,
    };
    assert_eq!(version("v5.channel.k8s.io"), Some((Version::V5, false)));
    assert_eq!(
        version("v4.base64.channel.k8s.io"),
        Some((Version::V4, true))
    );
    assert_eq!(version(""), Some((Version::V1, false)));
    assert_eq!(version("v6.channel.k8s.io"), None);
    assert_eq!(
        Subprotocol::of_forward("SPDY/3.1+portforward.k8s.io"),
        Some(Subprotocol::Tunnel)
    );
    assert_eq!(Subprotocol::of_forward("v5.channel.k8s.io"), None);
}

proptest! {
    #[test]
    fn messages_survive_both_encodings(channel in 0u8..5, data in proptest::collection::vec(any::<u8>(), 0..100), base64: bool) {
        let message = encode((channel, Bytes::from(data.clone())), base64);
        let (of, bytes) = decode(message, base64).unwrap();
        prop_assert_eq!((of, bytes.as_ref()), (channel, data.as_slice()));
    }

    #[test]
    fn hostile_messages_never_panic(data in proptest::collection::vec(any::<u8>(), 0..100), text in ".{0,40}", base64: bool) {
        let _ = decode(Message::Binary(data.into()), base64);
        let _ = decode(Message::text(text), base64);
    }
}

#[tokio::test]
async fn close_message_ends_stdin_and_status_is_last() {
    let (mut client, server) = pair().await;
    let wanted = RequestedStreams {
        stdin: true,
        stdout: true,
        stderr: false,
        tty: false,
    };
    let task = tokio::spawn(channels::serve(
        server,
        (Version::V5, false),
        HOUR,
        CancellationToken::new(),
        move |channels| {
            let mut remote = Remote::of_channels(channels, wanted, Version::V5);
            async move {
                let mut input = remote.stdin.take().unwrap();
                while let Ok(Some(chunk)) = input.next().await {
                    remote.stdout.as_mut().unwrap().write(chunk).await.unwrap();
                }
                remote.finish(&Outcome::Exit(3)).await;
            }
        },
    ));
    let mut sent = vec![7; 100_000];
    sent[0] = 0;
    client
        .send(Message::Binary(sent.clone().into()))
        .await
        .unwrap();
    client
        .send(Message::Binary(vec![255, 0].into()))
        .await
        .unwrap();
    let (mut output, mut status) = (Vec::new(), Vec::new());
    while let Some(Ok(message)) = client.next().await {
        match message {
            Message::Binary(bytes) if bytes[0] == 1 => output.extend_from_slice(&bytes[1..]),
            Message::Binary(bytes) if bytes[0] == 3 => status.extend_from_slice(&bytes[1..]),
            Message::Close(frame) => assert_eq!(u16::from(frame.unwrap().code), 1000),
            message => panic!("{message:?}"),
        }
    }
    assert_eq!(output, sent[1..]);
    let status: serde_json::Value = serde_json::from_slice(&status).unwrap();
    assert_eq!(status["details"]["causes"][0]["message"], "3");
    task.await.unwrap();
}

#[tokio::test]
async fn invalid_message_ends_the_session() {
    let (mut client, server) = pair().await;
    let gone = CancellationToken::new();
    let token = gone.clone();
    let task = tokio::spawn(channels::serve(
        server,
        (Version::V4, true),
        HOUR,
        gone,
        move |_| async move { token.cancelled().await },
    ));
    client
        .send(Message::Binary(vec![0, 1].into()))
        .await
        .unwrap();
    tokio::time::timeout(HOUR, task).await.unwrap().unwrap();
}

#[tokio::test]
async fn tunnel_carries_bytes_across_messages() {
    let (client, server) = pair().await;
    let bytes: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
    let sent = bytes.clone();
    let sending = tokio::spawn(async move {
        let mut tunnel = Tunnel::new(client);
        tunnel.write_all(&sent).await.unwrap();
        tunnel.shutdown().await.unwrap();
        let mut rest = Vec::new();
        let _ = tunnel.read_to_end(&mut rest).await;
        rest
    });
    let mut tunnel = Tunnel::new(server);
    let mut received = Vec::new();
    tunnel.read_to_end(&mut received).await.unwrap();
    assert_eq!(received, bytes);
    let _ = tunnel.shutdown().await;
    drop(tunnel);
    assert!(sending.await.unwrap().is_empty());
}

#[tokio::test]
async fn ping_flood_without_reads_is_bounded() {
    let (client, server) = tokio::io::duplex(4 << 10);
    let gone = CancellationToken::new();
    let token = gone.clone();
    let task = tokio::spawn(async move {
        let server = accept(server).await;
        let kind = (Version::V5, false);
        channels::serve(server, kind, HOUR, gone, move |channels| {
            let output = channels.output(1);
            async move {
                token.cancelled().await;
                drop(output);
            }
        })
        .await;
    });
    let (mut reader, mut writer) = tokio::io::split(client);
    // A masked ping with the maximum payload; a mask of zeros does not change it.
    let mut ping = vec![0x89, 0x80 | 125, 0, 0, 0, 0];
    ping.extend([7; 125]);
    let flood = ping.repeat(1000);
    for _ in 0..100 {
        // 13 MB in all; a server that stops reading is bounded, too.
        let sent = tokio::time::timeout(Duration::from_secs(5), writer.write_all(&flood));
        if sent.await.is_err() {
            break;
        }
    }
    let mut received = 0;
    let mut buffer = vec![0; 64 << 10];
    while let Ok(Ok(read)) =
        tokio::time::timeout(Duration::from_millis(500), reader.read(&mut buffer)).await
    {
        if read == 0 {
            break;
        }
        received += read;
    }
    assert!(received > 0, "no pong");
    assert!(received < 1 << 20, "{received} bytes of pongs were queued");
    task.abort();
}

#[test]
fn fuzz_messages_of_channels_are_decoded_or_dropped() {
    let fuzz = boxlite_fuzz::Fuzz::new("channels");
    fuzz.seed(*b"\x00stdin").seed(*b"0c3RkaW4=").run(|input| {
        let binary = Message::Binary(Bytes::copy_from_slice(input));
        if let Some((channel, data)) = decode(binary, false) {
            assert_eq!((channel, &data[..]), (input[0], &input[1..]));
        }
        let text = String::from_utf8_lossy(input).into_owned();
        if let Some((channel, _)) = decode(Message::Text(text.into()), true) {
            assert!(channel < 10);
        }
    });
}
