//! Tests of the server over a socket in place of /dev/fuse.

use super::*;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;

const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const FSYNC: u32 = 20;
const INIT: u32 = 26;
const FALLOCATE: u32 = 43;
const DISK_BYTES: u64 = 64 << 10;

struct Kernel {
    socket: UnixDatagram,
    disk: File,
    _stop: PipeWriter,
}

impl Kernel {
    /// Creates a server with a file of numbered blocks as its disk.
    fn new(read_only: bool) -> Self {
        let disk = tempfile::tempfile().expect("a file");
        for block in 0..DISK_BYTES / 512 {
            let bytes = [u8::try_from(block).expect("few blocks"); 512];
            disk.write_all_at(&bytes, block * 512).expect("written");
        }
        let (socket, served) = UnixDatagram::pair().expect("a pair");
        served.set_nonblocking(true).expect("nonblocking");
        let limit = Some(Duration::from_secs(10));
        socket.set_read_timeout(limit).expect("a limit");
        let (stopped, stop) = io::pipe().expect("a pipe");
        let file = OneFile {
            file: Mutex::new(disk.try_clone().expect("a clone")),
            size: DISK_BYTES,
            read_only,
        };
        std::thread::spawn(move || serve(&served.into(), &stopped, file));
        Self {
            socket,
            disk,
            _stop: stop,
        }
    }

    /// Sends a request and returns the error (0 for success) and the body of the answer.
    fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        let mut message = Vec::new();
        let length = u32::try_from(40 + body.len()).expect("short");
        message.extend(length.to_ne_bytes());
        message.extend(opcode.to_ne_bytes());
        message.extend(7_u64.to_ne_bytes());
        message.extend(node.to_ne_bytes());
        message.extend([0; 16]);
        message.extend(body);
        self.socket.send(&message).expect("sent");
        self.answer()
    }

    fn answer(&self) -> (i32, Vec<u8>) {
        let mut answer = vec![0; 2 << 20];
        let length = self.socket.recv(&mut answer).expect("an answer");
        answer.truncate(length);
        let announced = u32::from_ne_bytes(*answer.first_chunk().expect("a header"));
        assert_eq!(announced as usize, length, "the length in the header");
        let error = i32::from_ne_bytes(*answer[4..].first_chunk().expect("a header"));
        (error, answer.split_off(16))
    }

    fn read(&self, offset: u64, size: u32) -> (i32, Vec<u8>) {
        let mut body = vec![0; 8];
        body.extend(offset.to_ne_bytes());
        body.extend(size.to_ne_bytes());
        body.extend([0; 20]);
        self.ask(READ, ROOT, &body)
    }

    fn write(&self, offset: u64, size: u32, data: &[u8]) -> (i32, Vec<u8>) {
        let mut body = vec![0; 8];
        body.extend(offset.to_ne_bytes());
        body.extend(size.to_ne_bytes());
        body.extend([0; 20]);
        body.extend(data);
        self.ask(WRITE, ROOT, &body)
    }

    fn fallocate(&self, mode: u32, offset: u64, length: u64) -> i32 {
        let mut body = vec![0; 8];
        body.extend(offset.to_ne_bytes());
        body.extend(length.to_ne_bytes());
        body.extend(mode.to_ne_bytes());
        body.extend([0; 4]);
        self.ask(FALLOCATE, ROOT, &body).0
    }

    fn open(&self, flags: i32) -> i32 {
        let mut body = flags.to_ne_bytes().to_vec();
        body.extend([0; 4]);
        self.ask(OPEN, ROOT, &body).0
    }
}

#[test]
fn getattr_and_read_return_the_device_contents() {
    let kernel = Kernel::new(false);
    let mut body = Vec::new();
    for number in [7_u32, 38, 1 << 17, u32::MAX] {
        body.extend(number.to_ne_bytes());
    }
    body.extend([0; 48]);
    let (error, answer) = kernel.ask(INIT, 0, &body);
    assert_eq!(error, 0);
    let most = u32::from_ne_bytes(*answer[20..].first_chunk().expect("a number"));
    assert_eq!(most, MAX_BUFFER_SIZE, "most data of a write");
    let (error, facts) = kernel.ask(GETATTR, ROOT, &[0; 16]);
    assert_eq!(error, 0);
    let size = u64::from_ne_bytes(*facts[24..].first_chunk().expect("a size"));
    assert_eq!(size, DISK_BYTES);
    assert_eq!(kernel.ask(GETATTR, 5, &[0; 16]).0, -libc::ENOENT);
    assert_eq!(kernel.open(libc::O_RDWR), 0);
    assert_eq!(kernel.read(1024, 512), (0, vec![2; 512]));
    assert_eq!(kernel.write(512, 4, b"data").0, 0);
    let mut written = [0; 4];
    kernel.disk.read_exact_at(&mut written, 512).expect("read");
    assert_eq!(&written, b"data");
    assert_eq!(kernel.ask(FSYNC, ROOT, &[0; 16]).0, 0);
}

#[test]
fn requests_beyond_the_end_are_refused() {
    let kernel = Kernel::new(false);
    assert_eq!(kernel.read(DISK_BYTES - 100, 512), (0, vec![127; 100]));
    for offset in [DISK_BYTES, DISK_BYTES + 1, u64::MAX] {
        assert_eq!(kernel.read(offset, 512), (0, Vec::new()), "{offset}");
        assert_eq!(kernel.write(offset, 4, b"data").0, -libc::ENOSPC);
    }
    assert_eq!(kernel.write(DISK_BYTES - 2, 4, b"data").0, -libc::ENOSPC);
    let length = kernel.disk.metadata().expect("its size").len();
    assert_eq!(length, DISK_BYTES, "the file did not grow");
    let discard = (FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE).bits();
    assert_eq!(
        kernel.fallocate(discard, DISK_BYTES - 512, 1024),
        -libc::ENOSPC
    );
    assert_eq!(kernel.fallocate(discard, u64::MAX, 2), -libc::ENOSPC);
    assert_eq!(kernel.fallocate(0, 0, 512), -libc::EOPNOTSUPP);
}

#[test]
fn malformed_messages_are_answered_with_errors() {
    let kernel = Kernel::new(false);
    // The header announces more data than was sent: the data sent is written and counted.
    let (error, answer) = kernel.write(0, 4096, b"short");
    let count = u32::from_ne_bytes(*answer.first_chunk().expect("a count"));
    assert_eq!((error, count), (0, 5));
    assert_eq!(kernel.read(0, u32::MAX).1.len() as u64, DISK_BYTES);
    // No header, an unknown opcode, an operation that the file does not support.
    kernel.socket.send(b"nonsense").expect("sent");
    assert_eq!(kernel.ask(9999, ROOT, &[]).0, -libc::ENOSYS);
    assert_ne!(kernel.ask(1, ROOT, b"name\0").0, 0, "LOOKUP");
    assert_eq!(
        kernel.read(0, 5),
        (0, b"short".to_vec()),
        "the server still runs"
    );
}

#[test]
fn read_only_device_refuses_writes() {
    let kernel = Kernel::new(true);
    assert_eq!(kernel.open(libc::O_RDONLY), 0);
    assert_eq!(kernel.open(libc::O_RDWR), -libc::EROFS);
    assert_eq!(kernel.write(0, 4, b"data").0, -libc::EROFS);
    let discard = (FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE).bits();
    assert_eq!(kernel.fallocate(discard, 0, 512), -libc::EROFS);
    assert_eq!(kernel.read(0, 512), (0, vec![0; 512]));
}

#[test]
fn dropping_the_server_ends_its_thread() {
    let Kernel { socket, _stop, .. } = Kernel::new(false);
    drop(_stop);
    // The thread closes the other end of the socket.
    let began = std::time::Instant::now();
    while socket.send(&[0]).is_ok() {
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "the server still runs"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}
