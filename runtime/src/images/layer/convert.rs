//! The blocking half of a layer job: converts the compressed bytes to an EROFS file in the store, on one thread per layer.
//!
//! Errors are reported in the order download, digest of the blob, content, diff ID, so that a damaged transfer is not
//! reported as a bad image.

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::LayerRequest;
use super::download::Piece;
use super::source::{Control, Source};
use super::turn::Turn;
use crate::failpoint;
use crate::images::error::{ImageError, ImageErrorKind, ImageResult};
use crate::images::manifest::Compression;
use crate::images::reference::Digest;
use crate::images::store::{self, Store};

/// Size of the read buffer.
const READ_BUFFER_BYTES: usize = 256 << 10;
/// Maximum zstd window as a power of two: 128 MiB, the default limit of the zstd tool.
const ZSTD_WINDOW_LOG: u32 = 27;

/// A conversion.
pub(super) struct Task {
    pub store: Arc<Store>,
    pub request: LayerRequest,
    pub partial: PathBuf,
    pub input: mpsc::Receiver<Piece>,
    pub turn: Turn,
    /// Cancelled when the job is dropped: its last caller is gone.
    pub cancelled: CancellationToken,
}

impl Task {
    /// Sends the number of bytes already on disk to `started`, then runs to the end of the input.
    ///
    /// Deletes the partial file, unless the download was interrupted: then it keeps the received bytes.
    pub(super) fn run(self, started: oneshot::Sender<u64>) -> ImageResult<()> {
        let (mut source, replay) = Source::open(
            &self.partial,
            self.request.blob.size,
            self.input,
            self.turn,
            self.cancelled,
        )?;
        // The job may be gone; then reading from its channel fails.
        let _ = started.send(replay);
        let outcome = convert(&self.store, &self.request, &mut source);
        let cut = outcome.as_ref().err().is_some_and(ImageError::is_transient);
        // Checked last: the pull sets `abandoned` before it deletes the partial file itself.
        let keep = cut && !self.request.abandoned.load(Ordering::SeqCst);
        if keep {
            source.keep_rest();
        } else {
            store::delete(&self.partial)?;
        }
        outcome
    }
}

fn convert(store: &Store, request: &LayerRequest, source: &mut Source) -> ImageResult<()> {
    failpoint::hit("image.convert")?;
    let ingest = store.ingest_dir();
    let file = tempfile::Builder::new()
        .prefix("layer-")
        .tempfile_in(&ingest)
        .map_err(|e| ImageError::io("create a layer in", &ingest, e))?;
    let written = unpack(request, source, &file, &ingest);
    if let Some(error) = source.failure() {
        return Err(error);
    }
    if let Err(error) = &written
        && matches!(
            error.kind(),
            ImageErrorKind::NoSpace | ImageErrorKind::Internal | ImageErrorKind::Cancelled
        )
    {
        return written.map(drop);
    }
    let blob = &request.blob;
    let (digest, bytes) = source.finish()?;
    if digest != blob.digest || bytes != blob.size {
        let show = |d: &Digest, size| format!("{d} ({size} bytes)");
        return Err(ImageError::corrupt(
            "the layer's blob",
            show(&blob.digest, blob.size),
            show(&digest, bytes),
        ));
    }
    let diff_id = written?;
    if diff_id != request.diff_id {
        return Err(ImageError::corrupt(
            "the layer's tar stream (diff ID)",
            request.diff_id.as_str(),
            diff_id.as_str(),
        ));
    }
    let failed = |e| ImageError::io("finish layer", file.path(), e);
    file.as_file()
        .set_permissions(std::fs::Permissions::from_mode(0o444))
        .map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    failpoint::hit("image.converted")?;
    // The temporary file's deletion on drop finds nothing after the rename.
    store.adopt_layer(file.path(), &request.diff_id)
}

/// Writes the layer's tree into `file` and returns the digest of the tar stream.
fn unpack(
    request: &LayerRequest,
    source: &mut Source,
    file: &tempfile::NamedTempFile,
    scratch: &std::path::Path,
) -> ImageResult<Digest> {
    let control = source.control();
    let mut input = BufReader::with_capacity(READ_BUFFER_BYTES, source);
    let start = input
        .fill_buf()
        .map_err(|e| stream_error("the layer's blob", &e))?;
    let compression = Compression::sniff(start);
    let (name, plain): (&str, Box<dyn Read + '_>) = match compression {
        Compression::Plain => ("tar stream", Box::new(input)),
        Compression::Gzip => (
            "gzip stream",
            Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        ),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)
                .map_err(|e| stream_error("the layer's zstd stream", &e))?;
            decoder
                .window_log_max(ZSTD_WINDOW_LOG)
                .map_err(|e| stream_error("the layer's zstd stream", &e))?;
            ("zstd stream", Box::new(decoder))
        }
    };
    let what = format!("the layer's {name}");
    let mut plain = Hashing {
        inner: plain,
        hash: Sha256::new(),
        left: request.max_bytes,
        exceeded: false,
        control: &control,
    };
    let target = boxlite_erofs::Target {
        file: file.as_file(),
        path: file.path(),
        scratch,
        cancelled: &|| control.is_cancelled() || request.abandoned.load(Ordering::SeqCst),
    };
    let tree = boxlite_erofs::write_image(&mut plain, &what, target)
        .map_err(ImageError::from)
        .and_then(|()| drain(&mut plain, &what));
    if plain.exceeded {
        let what = format!("the unpacked layer {}", request.diff_id);
        return Err(ImageError::TooLarge {
            subject: what,
            limit: request.max_bytes,
            unit: "bytes",
        });
    }
    tree?;
    Ok(Digest::from_hash(plain.hash.finalize()))
}

/// Reads the bytes after the end of the archive, which are part of the diff ID.
fn drain(plain: &mut impl Read, what: &str) -> ImageResult<()> {
    let mut rest = vec![0; READ_BUFFER_BYTES];
    while plain.read(&mut rest).map_err(|e| stream_error(what, &e))? > 0 {}
    Ok(())
}

/// Wraps an error of the decompressor. Errors of the source take precedence over it.
fn stream_error(what: &str, error: &io::Error) -> ImageError {
    ImageError::corrupt(what, "valid data to its end", error.to_string())
}

/// Reader that hashes and limits the bytes read through it.
struct Hashing<'a, R> {
    inner: R,
    hash: Sha256,
    left: u64,
    exceeded: bool,
    control: &'a Control,
}

impl<R: Read> Read for Hashing<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Few bytes of the source may unpack to many.
        self.control.turn.take();
        if self.control.is_cancelled() {
            // `convert` asks the source, which reports the cancellation.
            return Err(io::Error::other("the conversion was cancelled"));
        }
        let read = self.inner.read(buffer)?;
        if read as u64 > self.left {
            self.exceeded = true;
            return Err(io::Error::other("the layer is too large"));
        }
        self.left -= read as u64;
        self.hash.update(&buffer[..read]);
        Ok(read)
    }
}
