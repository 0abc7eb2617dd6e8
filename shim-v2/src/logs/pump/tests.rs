//! Pumps over a guest that buffers, blocks and disconnects, and a disk that is full, slow or writes short.

use super::source::Acker;
use super::*;
use crate::logs::cri::tests::{bytes_of, parse};
use crate::logs::file::{LogFile, Opener};
use crate::logs::sink::FileTarget;
use async_trait::async_trait;
use boxlite_portal::PortalError;
use boxlite_proto::boxlite::v1::OutputStream;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use tokio::sync::Notify;

/// Unacknowledged bytes that the fake guest keeps; few, so that a missing Ack shows as a standstill.
const GUEST_BUFFER_BYTES: u64 = 256 << 10;

/// A guest's output: all of it, what was acknowledged, and where streams break.
struct FakeGuest {
    chunks: Vec<(OutputStream, Vec<u8>)>,
    acked: Mutex<u64>,
    changed: Notify,
}

struct FakeSource {
    guest: Arc<FakeGuest>,
    at: usize,
    offset: u64,
    /// Chunks until the next break; the follower above would come back, so it is an error once.
    breaks: VecDeque<usize>,
}

#[async_trait]
impl Source for FakeSource {
    type Acker = FakeAcker;

    async fn next(&mut self) -> std::result::Result<Option<OutputChunk>, PortalError> {
        if let Some(left) = self.breaks.front_mut() {
            if *left == 0 {
                self.breaks.pop_front();
                return Err(PortalError::Transport {
                    call: "Execution.Attach",
                    source: Box::new(tonic::Status::unavailable("broken")),
                });
            }
            *left -= 1;
        }
        let Some((stream, data)) = self.guest.chunks.get(self.at) else {
            return Ok(None);
        };
        loop {
            let changed = self.guest.changed.notified();
            let acked = *self.guest.acked.lock().expect("unpoisoned");
            if self.offset + data.len() as u64 <= acked + GUEST_BUFFER_BYTES {
                break;
            }
            changed.await;
        }
        let chunk = OutputChunk {
            offset: self.offset,
            stream: *stream,
            data: data.clone().into(),
        };
        self.at += 1;
        self.offset += data.len() as u64;
        Ok(Some(chunk))
    }

    fn acker(&self) -> FakeAcker {
        FakeAcker(self.guest.clone())
    }
}

struct FakeAcker(Arc<FakeGuest>);

#[async_trait]
impl Acker for FakeAcker {
    async fn ack(&self, offset: u64) -> std::result::Result<(), PortalError> {
        *self.0.acked.lock().expect("unpoisoned") = offset;
        self.0.changed.notify_waiters();
        self.0.changed.notify_one();
        Ok(())
    }
}

/// A disk with every file opened so far, with scripted short writes and ENOSPC.
#[derive(Default)]
struct Disk {
    files: Mutex<Vec<Vec<u8>>>,
    /// One entry per write: number of bytes written, 0 for ENOSPC.
    script: Mutex<VecDeque<usize>>,
    full: std::sync::atomic::AtomicBool,
    /// Size of the largest write.
    largest_write: std::sync::atomic::AtomicUsize,
}

struct DiskFile {
    disk: Arc<Disk>,
    index: usize,
}

impl LogFile for DiskFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.disk
            .largest_write
            .fetch_max(bytes.len(), Ordering::Relaxed);
        let next = self.disk.script.lock().expect("unpoisoned").pop_front();
        let count = match next {
            _ if self.disk.full.load(Ordering::Relaxed) => 0,
            Some(most) => bytes.len().min(most),
            None => bytes.len(),
        };
        if count == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.disk.files.lock().expect("unpoisoned")[self.index].extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn truncate_tail(&mut self, count: u64) -> io::Result<()> {
        let file = &mut self.disk.files.lock().expect("unpoisoned")[self.index];
        file.truncate(file.len() - count as usize);
        Ok(())
    }
}

fn opener(disk: &Arc<Disk>) -> Opener {
    let disk = disk.clone();
    Arc::new(move |_: &Path| {
        let mut files = disk.files.lock().expect("unpoisoned");
        files.push(Vec::new());
        Ok(Box::new(DiskFile {
            disk: disk.clone(),
            index: files.len() - 1,
        }) as Box<dyn LogFile>)
    })
}

struct Setup {
    pump: LogPump,
    guest: Arc<FakeGuest>,
    disk: Arc<Disk>,
    tasks: TaskTracker,
    ended: CancellationToken,
}

fn setup(chunks: Vec<(OutputStream, Vec<u8>)>, breaks: Vec<usize>, script: Vec<usize>) -> Setup {
    let guest = Arc::new(FakeGuest {
        chunks,
        acked: Mutex::new(0),
        changed: Notify::new(),
    });
    let disk = Arc::new(Disk {
        script: Mutex::new(script.into()),
        ..Disk::default()
    });
    let source = FakeSource {
        guest: guest.clone(),
        at: 0,
        offset: 0,
        breaks: breaks.into(),
    };
    let tasks = TaskTracker::new();
    let ended = CancellationToken::new();
    let target = FileTarget::open(&PathBuf::from("/log"), opener(&disk)).expect("opens");
    let pump = LogPump::run(&tasks, source, Sink::Cri(target), ended.clone());
    Setup {
        pump,
        guest,
        disk,
        tasks,
        ended,
    }
}

async fn reopen(pump: &LogPump) {
    let (reply, answer) = oneshot::channel();
    pump.reopen(reply);
    answer.await.expect("answered").expect("reopened");
}

fn wanted(chunks: &[(OutputStream, Vec<u8>)], stream: OutputStream) -> Vec<u8> {
    chunks
        .iter()
        .filter(|(s, _)| *s == stream)
        .flat_map(|(_, d)| d.clone())
        .collect()
}

fn check(setup: &Setup) {
    let log: Vec<u8> = setup.disk.files.lock().expect("unpoisoned").concat();
    let records = parse(&log);
    for (stream, stderr) in [(OutputStream::Stdout, false), (OutputStream::Stderr, true)] {
        assert!(
            bytes_of(&records, stderr) == wanted(&setup.guest.chunks, stream),
            "{stream:?} differs"
        );
    }
    let total: usize = setup.guest.chunks.iter().map(|(_, data)| data.len()).sum();
    assert_eq!(*setup.guest.acked.lock().expect("unpoisoned"), total as u64);
}

fn chunk() -> impl Strategy<Value = (OutputStream, Vec<u8>)> {
    let data = prop_oneof![
        prop::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 1..200),
        (1usize..32_768, any::<u8>()).prop_map(|(n, byte)| vec![byte; n]),
    ];
    (any::<bool>(), data).prop_map(|(stderr, data)| {
        (
            if stderr {
                OutputStream::Stderr
            } else {
                OutputStream::Stdout
            },
            data,
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn pump_writes_each_byte_once(
        chunks in prop::collection::vec(chunk(), 0..60),
        breaks in prop::collection::vec(0usize..30, 0..3),
        script in prop::collection::vec(prop_oneof![3 => 1usize..5_000, 1 => Just(0usize)], 0..6),
        reopens in 0usize..4,
    ) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime").block_on(async {
            let setup = setup(chunks, breaks, script);
            for _ in 0..reopens {
                tokio::task::yield_now().await;
                reopen(&setup.pump).await;
            }
            assert!(setup.pump.watch_drained().within(Duration::from_secs(60)).await);
            setup.tasks.close();
            setup.tasks.wait().await;
            check(&setup);
        });
    }
}

#[tokio::test]
async fn full_disk_blocks_guest_until_rotation() {
    let line = [b"0123456789".repeat(100), b"\n".to_vec()].concat();
    let chunks: Vec<_> = (0..2_000)
        .map(|_| (OutputStream::Stdout, line.clone()))
        .collect();
    let setup = setup(chunks, vec![], vec![700]);
    setup.disk.full.store(true, Ordering::Relaxed);
    assert!(
        !setup
            .pump
            .watch_drained()
            .within(Duration::from_secs(1))
            .await,
        "the pump is blocked"
    );
    assert_eq!(
        *setup.guest.acked.lock().expect("unpoisoned"),
        0,
        "nothing is acknowledged"
    );
    setup.disk.full.store(false, Ordering::Relaxed);
    reopen(&setup.pump).await;
    assert!(
        setup
            .pump
            .watch_drained()
            .within(Duration::from_secs(10))
            .await
    );
    setup.tasks.close();
    setup.tasks.wait().await;
    check(&setup);
    // Each file consists of complete records.
    for file in setup.disk.files.lock().expect("unpoisoned").iter() {
        parse(file);
    }
}

/// Empty lines grow most when they are formatted; a reopen writes the whole queue.
#[tokio::test]
async fn flood_of_empty_lines_is_written_in_small_parts() {
    let lines = vec![b'\n'; 32 << 10];
    let chunks = vec![(OutputStream::Stdout, lines); 8];
    let setup = setup(chunks, vec![], vec![]);
    reopen(&setup.pump).await;
    assert!(
        setup
            .pump
            .watch_drained()
            .within(Duration::from_secs(10))
            .await
    );
    check(&setup);
    let largest = setup.disk.largest_write.load(Ordering::Relaxed);
    assert!((1 << 20..4 << 20).contains(&largest), "{largest} bytes");
}

#[tokio::test]
async fn end_of_vm_flushes_partial_line() {
    let setup = setup(
        vec![(OutputStream::Stdout, b"last words".to_vec())],
        vec![],
        vec![],
    );
    setup.ended.cancel();
    assert!(
        setup
            .pump
            .watch_drained()
            .within(Duration::from_secs(5))
            .await
    );
    let log = setup.disk.files.lock().expect("unpoisoned").concat();
    let records = parse(&log);
    assert_eq!(records.len(), 1);
    assert!(!records[0].full);
    assert_eq!(records[0].bytes, b"last words");
}

#[tokio::test]
async fn close_with_full_disk_returns() {
    let setup = setup(
        vec![(OutputStream::Stdout, b"x\n".to_vec())],
        vec![],
        vec![],
    );
    setup.disk.full.store(true, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(1)).await;
    tokio::time::timeout(Duration::from_secs(5), setup.pump.close())
        .await
        .expect("closes");
}

/// Prints the throughput of formatting and writing; asserts no limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pump_to_real_file_keeps_all_lines() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("0.log");
    let mut number = 0u64;
    let chunks: Vec<_> = (0..512)
        .map(|_| {
            let mut data = Vec::with_capacity(32 << 10);
            while data.len() + 64 < 32 << 10 {
                data.extend_from_slice(
                    format!("line {number} of many, with some words behind it\n").as_bytes(),
                );
                number += 1;
            }
            (OutputStream::Stdout, data)
        })
        .collect();
    let guest = Arc::new(FakeGuest {
        chunks,
        acked: Mutex::new(0),
        changed: Notify::new(),
    });
    let source = FakeSource {
        guest: guest.clone(),
        at: 0,
        offset: 0,
        breaks: VecDeque::new(),
    };
    let tasks = TaskTracker::new();
    let target = FileTarget::open(&path, crate::logs::file::opener(true)).expect("opens");
    let began = std::time::Instant::now();
    let pump = LogPump::run(&tasks, source, Sink::Cri(target), CancellationToken::new());
    assert!(pump.watch_drained().within(Duration::from_secs(60)).await);
    let took = began.elapsed();
    let log = std::fs::read(&path).expect("readable");
    let bytes = bytes_of(&parse(&log), false);
    eprintln!(
        "{} MiB of lines in {} ms",
        bytes.len() >> 20,
        took.as_millis()
    );
    assert!(bytes == wanted(&guest.chunks, OutputStream::Stdout));
}
