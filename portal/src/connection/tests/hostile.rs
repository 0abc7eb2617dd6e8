//! Agents that attack the host by HTTP/2: every byte that daemon and shim read from a guest comes through this connection.
//! A call must fail within its limit, and the host's memory must not grow with the attack.

use super::*;

/// Timeout of the attacked calls.
const CALL_TIMEOUT: Duration = Duration::from_millis(500);
/// Time by which a call may exceed its limit on a busy machine.
const SLACK: Duration = Duration::from_secs(10);
/// Growth of this process's memory during all attacks together, in KiB.
const MAX_GROWTH_KIB: u64 = 128 << 10;
/// Bytes that one attack sends at most.
const MAX_ATTACK_BYTES: usize = 512 << 20;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
/// `:status: 200` and `content-type: application/grpc` in HPACK.
const GRPC_HEADERS: &[u8] = b"\x88\x0f\x10\x10application/grpc";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// An attack: bytes sent once, then bytes repeated until the host hangs up.
struct Attack {
    name: &'static str,
    once: Vec<u8>,
    again: Vec<u8>,
    /// The agent reads the host's bytes. Otherwise answers of the host pile up at its end.
    reads: bool,
}

fn attacks() -> Vec<Attack> {
    let settings = frame(SETTINGS, 0, 0, &[]);
    let after = |frames: &[Vec<u8>]| [settings.clone(), frames.concat()].concat();
    let headers = frame(HEADERS, END_HEADERS, 1, GRPC_HEADERS);
    let attack = |name, once: Vec<u8>, again: Vec<u8>, reads| Attack {
        name,
        once,
        again,
        reads,
    };
    let noise: Vec<u8> = (0..4096_u32).map(|n| ((n * n) >> 3) as u8).collect();
    vec![
        attack("noise", Vec::new(), noise, true),
        attack("silence", Vec::new(), Vec::new(), true),
        attack("pings", after(&[]), frame(PING, 0, 0, &[1; 8]), false),
        attack("settings", after(&[]), settings.clone(), false),
        attack(
            "windows",
            after(&[]),
            frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]),
            true,
        ),
        attack(
            "endless headers",
            after(&[frame(HEADERS, 0, 1, GRPC_HEADERS)]),
            frame(
                CONTINUATION,
                0,
                1,
                &[b"\0\x01a\x7f\x80\x3e", &[b'x'; 8127][..]].concat(),
            ),
            true,
        ),
        attack(
            "message of 4 GiB",
            after(&[
                headers.clone(),
                frame(DATA, 0, 1, &[0, 0xff, 0xff, 0xff, 0xff]),
            ]),
            frame(DATA, 0, 1, &[0; 8192]),
            true,
        ),
        attack(
            "endless small messages",
            after(std::slice::from_ref(&headers)),
            frame(DATA, 0, 1, &[0, 0, 0, 0, 0].repeat(1000)),
            true,
        ),
        attack(
            "unknown streams",
            after(&[]),
            [
                frame(DATA, 0, 9, &[0; 100]),
                frame(PUSH_PROMISE, 4, 1, &[0, 0, 0, 2, 0x88]),
            ]
            .concat(),
            true,
        ),
        attack(
            "resets",
            after(&[]),
            frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]),
            true,
        ),
        attack(
            "farewells",
            after(&[]),
            frame(
                GOAWAY,
                0,
                0,
                &[&[0, 0, 0, 1, 0, 0, 0, 0][..], &[b'x'; 8000]].concat(),
            ),
            true,
        ),
    ]
}

/// Serves the attack on every connection.
async fn attack(listener: UnixListener, attack: Arc<Attack>) {
    while let Ok((stream, _)) = listener.accept().await {
        let attack = Arc::clone(&attack);
        tokio::spawn(async move {
            // The half that is not read remains open as long as the other one.
            let (mut reader, mut writer) = stream.into_split();
            if attack.reads {
                tokio::spawn(
                    async move { tokio::io::copy(&mut reader, &mut tokio::io::sink()).await },
                );
            }
            let mut sent = writer.write_all(&attack.once).await;
            if attack.again.is_empty() {
                return std::future::pending().await;
            }
            let block = attack.again.repeat(1 + (64 << 10) / attack.again.len());
            let mut total = 0;
            while sent.is_ok() && total < MAX_ATTACK_BYTES {
                sent = writer.write_all(&block).await;
                total += block.len();
            }
        });
    }
}

fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.unwrap().split_ascii_whitespace().next().unwrap();
    number.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_agents_fail_their_calls_in_bounded_memory() {
    let directory = tempfile::tempdir().unwrap();
    let before = peak_kib();
    let calls = attacks().into_iter().map(|each| {
        let path = directory.path().join(each.name.replace(' ', "-"));
        let listener = UnixListener::bind(&path).unwrap();
        async move {
            let name = each.name;
            let agent = tokio::spawn(attack(listener, Arc::new(each)));
            let session = GuestSession::new(Connection::lazy(GuestAddress::Direct(path)));
            let start = std::time::Instant::now();
            let error = session.guest().stats(CALL_TIMEOUT).await.unwrap_err();
            let took = start.elapsed();
            assert!(took < CALL_TIMEOUT + SLACK, "{name}: {took:?}");
            let text = boxlite_sys::report::report(&error);
            assert!(
                text.len() < 2 * crate::error::MAX_TEXT_BYTES,
                "{name}: {}",
                text.len()
            );
            agent.abort();
        }
    });
    futures::future::join_all(calls).await;
    let growth = peak_kib() - before;
    println!("memory grew by {growth} KiB");
    assert!(growth < MAX_GROWTH_KIB, "{growth} KiB");
}
