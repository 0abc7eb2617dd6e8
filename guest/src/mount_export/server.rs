//! Answers the host's FUSE requests for one exported mount: [`open`]. The file server is fuse-backend-rs.
//!
//! Each mount has its own thread, so a file system that hangs stops only the answers for its mount. The server sets
//! the thread's umask and switches to the user and group of each request. The thread ends when the host drops the
//! stream; a thread that hangs in the kernel ends with the VM.

use super::ExportList;
use crate::status::status;
use boxlite_proto::boxlite::v1::{ErrorKind, FuseRequest, FuseResponse};
use boxlite_proto::names::MAX_CHUNK_BYTES;
use boxlite_sys::fuse::{Frames, MAX_MESSAGE_BYTES, MAX_WRITE_BYTES};
use bytes::Bytes;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::{Config, PassthroughFs};
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{MemfdFlags, SeekFrom, ftruncate, memfd_create, seek};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, Streaming};

/// Capacity of the queues of requests to the thread and of chunks to the host.
const CHANNEL_CAPACITY: usize = 4;
/// Time the host's kernel caches names and attributes; the guest changes files without notifying it.
const CACHE_TIMEOUT: Duration = Duration::from_secs(1);

/// FUSE opcodes: INIT, and the requests that have no reply.
const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const INIT: u32 = 26;
/// Size of a request's header, in bytes.
const REQUEST_HEADER_BYTES: usize = 40;
/// FUSE features handled by the host's kernel that the server does not negotiate: async reads, large writes, cache
/// invalidation on modification, parallel operations in a directory.
const KERNEL_FEATURES: u32 = 1 | 1 << 5 | 1 << 12 | 1 << 18;

/// Reads the first message, starts the server, and returns the stream of replies.
pub(crate) async fn open(
    exports: &ExportList,
    mut requests: Streaming<FuseRequest>,
) -> Result<impl Stream<Item = Result<FuseResponse, Status>> + Send + 'static, Status> {
    let first = requests.message().await?.ok_or_else(|| {
        status(
            ErrorKind::InvalidArgument,
            "id",
            "the first message must name the mount",
        )
    })?;
    let id = first.id.to_string();
    let tree = exports.tree(first.id).ok_or_else(|| {
        status(
            ErrorKind::NotFound,
            &id,
            format!("exported mount {id} not found"),
        )
    })?;
    let (work, queue) = mpsc::channel(CHANNEL_CAPACITY);
    let (answers, stream) = mpsc::channel(CHANNEL_CAPACITY);
    // Not joined: a file system that hangs blocks it until the VM ends.
    std::thread::Builder::new()
        .name(format!("fuse {id}"))
        .spawn(move || {
            if let Err(error) = serve(&tree, queue, &answers) {
                tracing::warn!(%error, "file server of an exported mount failed");
            }
        })
        .map_err(|error| status(ErrorKind::Internal, &id, error.to_string()))?;
    let feeding = AbortOnDropHandle::new(tokio::spawn(async move {
        let mut frames = Frames::default();
        let mut message = Some(first);
        while let Some(request) = message {
            frames.push(&request.data);
            loop {
                match frames.cut() {
                    Ok(Some(request)) => {
                        if work.send(request).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::warn!(%error, "received an invalid FUSE message from the host");
                        return;
                    }
                }
            }
            message = requests.message().await.ok().flatten();
        }
    }));
    let state = (stream, feeding);
    Ok(futures::stream::unfold(state, async |mut state| {
        let data = state.0.recv().await?;
        Some((Ok(FuseResponse { data }), state))
    }))
}

/// Serves requests until the queue or the host's end is closed. Blocks.
fn serve(
    tree: &Arc<OwnedFd>,
    mut queue: mpsc::Receiver<Vec<u8>>,
    answers: &mpsc::Sender<Bytes>,
) -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS)?;
    let config = Config {
        // The trailing dot makes it a path that can be opened with O_NOFOLLOW.
        root_dir: format!("/proc/self/fd/{}/.", tree.as_raw_fd()),
        entry_timeout: CACHE_TIMEOUT,
        attr_timeout: CACHE_TIMEOUT,
        ..Config::default()
    };
    let server = Server::new(PassthroughFs::<()>::new(config)?);
    // The server writes each reply to a descriptor in one call.
    let answer = File::from(memfd_create("answer", MemfdFlags::CLOEXEC)?);
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    while let Some(mut request) = queue.blocking_recv() {
        let reply = answer_to(&server, &mut request, &answer, &mut buffer)?;
        for chunk in reply.chunks(MAX_CHUNK_BYTES) {
            if answers
                .blocking_send(Bytes::copy_from_slice(chunk))
                .is_err()
            {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Returns the reply to one request; empty if the request has none.
fn answer_to(
    server: &Server<PassthroughFs<()>>,
    request: &mut [u8],
    answer: &File,
    buffer: &mut [u8],
) -> io::Result<Vec<u8>> {
    if request.len() < REQUEST_HEADER_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let head: Vec<u8> = request[..request.len().min(REQUEST_HEADER_BYTES + 16)].to_vec();
    ftruncate(answer, 0)?;
    seek(answer, SeekFrom::Start(0))?;
    let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(request)).map_err(io::Error::other)?;
    let writer = FuseDevWriter::<()>::new(answer.as_raw_fd(), buffer).map_err(io::Error::other)?;
    if let Err(error) = server.handle_message(reader, Writer::FuseDev(writer), None, None) {
        tracing::debug!(%error, "failed to handle a FUSE request");
    }
    let length = usize::try_from(answer.metadata()?.len()).unwrap_or(0);
    let mut reply = vec![0; length];
    answer.read_exact_at(&mut reply, 0)?;
    let opcode = number(&head, 4);
    if reply.is_empty() && ![FORGET, BATCH_FORGET, INTERRUPT].contains(&opcode) {
        // Without a reply the process on the host would block forever.
        reply.extend_from_slice(&16_u32.to_ne_bytes());
        reply.extend_from_slice(&(-libc::EIO).to_ne_bytes());
        reply.extend_from_slice(&head[8..16]);
    }
    if opcode == INIT {
        extend(&head, &mut reply);
    }
    Ok(reply)
}

/// Completes the reply to INIT: flags at offset 28, maximum write size at 36. The kernel's flags are at offset 52 of
/// the request.
fn extend(request: &[u8], reply: &mut [u8]) {
    if reply.len() < 40 || request.len() < REQUEST_HEADER_BYTES + 16 {
        return;
    }
    let flags = number(reply, 28) | (number(request, 52) & KERNEL_FEATURES);
    reply[28..32].copy_from_slice(&flags.to_ne_bytes());
    reply[36..40].copy_from_slice(&MAX_WRITE_BYTES.to_ne_bytes());
}

fn number(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk::<4>())
        .map_or(0, |four| u32::from_ne_bytes(*four))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds a request of a header with opcode and node, followed by the body.
    fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; REQUEST_HEADER_BYTES];
        let length = u32::try_from(REQUEST_HEADER_BYTES + body.len()).unwrap();
        bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
        bytes[8..16].copy_from_slice(&77_u64.to_ne_bytes());
        bytes[16..24].copy_from_slice(&node.to_ne_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn server_serves_a_directory_from_memory() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("flag"), "inside").unwrap();
        let tree: OwnedFd = File::open(dir.path()).unwrap().into();
        let tree = Arc::new(tree);
        let (work, queue) = mpsc::channel(8);
        let (answers, mut stream) = mpsc::channel(8);
        let serving = std::thread::spawn(move || serve(&tree, queue, &answers));
        let mut ask = |message: Vec<u8>| {
            work.blocking_send(message).unwrap();
            stream.blocking_recv().unwrap()
        };
        let mut init = Vec::new();
        for field in [7_u32, 38, 1 << 17, 1 << 12, 0, 0, 0, 0] {
            init.extend_from_slice(&field.to_ne_bytes());
        }
        init.resize(64, 0);
        let reply = ask(request(INIT, 0, &init));
        assert_eq!(number(&reply, 4), 0, "INIT");
        assert_eq!(number(&reply, 36), MAX_WRITE_BYTES);
        assert_eq!(
            number(&reply, 28) & KERNEL_FEATURES,
            1 << 12,
            "only offered features"
        );
        let reply = ask(request(1, 1, b"flag\0"));
        assert_eq!(number(&reply, 4), 0, "LOOKUP");
        assert_eq!(&reply[8..16], &77_u64.to_ne_bytes());
        let reply = ask(request(1, 1, b"nothing\0"));
        assert_eq!(number(&reply, 4), (-libc::ENOENT).cast_unsigned());
        let reply = ask(request(9999, 1, b""));
        assert_ne!(number(&reply, 4), 0, "an unknown request");
        drop((work, stream));
        serving.join().unwrap().unwrap();
    }
}
