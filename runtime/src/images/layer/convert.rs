//! The blocking side of a layer: compressed bytes in, an EROFS file in the store out.
//!
//! Downloads nothing. One thread per layer. What is wrong is reported in the order of trust: the download's own failure,
//! then the blob's digest, then its content, then the diff ID, so that a damaged transfer never looks like a bad image.

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, oneshot};

use super::LayerRequest;
use super::download::Piece;
use super::source::Source;
use crate::images::error::{ImageError, ImageErrorKind, ImageResult};
use crate::images::manifest::Compression;
use crate::images::reference::Digest;
use crate::images::store::{self, Store};

/// Bytes read from the source at a time.
const BUFFER: usize = 256 << 10;
/// Largest zstd window as a power of two: 128 MiB, what the zstd tool itself accepts without asking.
const ZSTD_WINDOW_LOG: u32 = 27;

/// One conversion.
pub(super) struct Task {
    pub store: Arc<Store>,
    pub request: LayerRequest,
    pub partial: PathBuf,
    pub input: mpsc::Receiver<Piece>,
}

impl Task {
    /// Tells `started` how many bytes of the blob are on disk already, then runs to the end of the input.
    ///
    /// Afterwards the partial file is gone, unless the input was cut: then it holds what came.
    pub(super) fn run(self, started: oneshot::Sender<u64>) -> ImageResult<()> {
        let (mut source, replay) = Source::open(&self.partial, self.request.blob.size, self.input)?;
        // The job may be gone; then the channel is closed and reading says so.
        let _ = started.send(replay);
        let outcome = convert(&self.store, &self.request, &mut source);
        let cut = outcome.as_ref().err().is_some_and(ImageError::is_transient);
        // Looked at last: the pull sets it before it deletes the partial file itself.
        let keep = cut && !self.request.abandoned.load(Ordering::SeqCst);
        if !keep {
            store::delete(&self.partial)?;
        }
        outcome
    }
}

fn convert(store: &Store, request: &LayerRequest, source: &mut Source) -> ImageResult<()> {
    let ingest = store.ingest_dir();
    let file = tempfile::Builder::new()
        .prefix("layer-")
        .tempfile_in(&ingest)
        .map_err(|e| ImageError::io("creating a layer in", &ingest, e))?;
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
    let failed = |e| ImageError::io("finishing the layer", file.path(), e);
    file.as_file()
        .set_permissions(std::fs::Permissions::from_mode(0o444))
        .map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    // Renamed away, the temporary file's own deletion finds nothing.
    store.adopt_layer(file.path(), &request.diff_id)
}

/// Writes the layer's tree into `file`; gives the digest of the tar stream.
fn unpack(
    request: &LayerRequest,
    source: &mut Source,
    file: &tempfile::NamedTempFile,
    scratch: &std::path::Path,
) -> ImageResult<Digest> {
    let mut input = BufReader::with_capacity(BUFFER, source);
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
    };
    let target = boxlite_erofs::Target {
        file: file.as_file(),
        path: file.path(),
        scratch,
        cancelled: &|| request.abandoned.load(Ordering::SeqCst),
    };
    let tree = boxlite_erofs::write_image(&mut plain, &what, target)
        .map_err(ImageError::from)
        .and_then(|()| drain(&mut plain, &what));
    if plain.exceeded {
        let what = format!("the unpacked layer {}", request.diff_id);
        return Err(ImageError::TooLarge {
            what,
            limit: request.max_bytes,
            unit: "bytes",
        });
    }
    tree?;
    Ok(Digest::from_hash(plain.hash.finalize()))
}

/// Reads what follows the end of the archive: it belongs to the diff ID.
fn drain(plain: &mut impl Read, what: &str) -> ImageResult<()> {
    let mut rest = vec![0; BUFFER];
    while plain.read(&mut rest).map_err(|e| stream_error(what, &e))? > 0 {}
    Ok(())
}

/// An error of the decompressor. The source's own ones are recognised before this text is ever shown.
fn stream_error(what: &str, error: &io::Error) -> ImageError {
    ImageError::corrupt(what, "valid data to its end", error.to_string())
}

/// Hashes and bounds what is read through it.
struct Hashing<R> {
    inner: R,
    hash: Sha256,
    left: u64,
    exceeded: bool,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
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
