//! Checksums of layer files: recorded when a layer is made, verified at its first use after the daemon's start.
//!
//! Verification runs in the background on one thread, at [`MAX_BYTES_PER_SECOND`] at most, so that it delays no container. Without
//! the limit a cached file takes about 0.1 ms per MiB, which is the cost of a checksum at a pull.
//!
//! A layer that has changed or cannot be read is set aside as `layers/damaged.erofs`, of which there is one; its images are
//! dropped from the index, so that the next pull fetches it again. Containers that use it keep it.
//!
//! The checksum is a CRC-32, against damage by disks and power cuts; only root can write the store on purpose. A layer
//! of an earlier version has none and gets one at its first use. fs-verity would verify each read, but ext4 and XFS need it
//! enabled when they are made, and overlayfs and tmpfs lack it.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use boxlite_sys::sync::Mutex;
use tokio::sync::watch;

use super::{Images, Store, disk};
use crate::images::error::ImageResult;
use crate::images::types::LayerFile;

/// Maximum rate of the verification.
const MAX_BYTES_PER_SECOND: u64 = 256 << 20;
/// Size of a read.
const READ_BYTES: usize = 256 << 10;

/// Checksum of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Checksum {
    crc: u32,
    bytes: u64,
}

/// Layers to verify. Not part of [`Store`], whose lock must not be held by the thread.
#[derive(Debug)]
pub(super) struct Checks {
    state: Mutex<State>,
    /// True while the thread runs.
    running: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    /// Diff IDs that were made, verified or queued since the daemon's start.
    seen: HashSet<String>,
    queue: VecDeque<LayerFile>,
}

impl Default for Checks {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            running: watch::Sender::new(false),
        }
    }
}

impl Checks {
    /// Returns the next layer. Without one, the thread has to end.
    fn next(&self) -> Option<LayerFile> {
        let mut state = self.state.lock();
        let next = state.queue.pop_front();
        if next.is_none() {
            self.running.send_replace(false);
        }
        next
    }
}

impl Store {
    /// Verifies those of `layers` in the background that were not verified since the daemon's start.
    pub(in crate::images) fn verify_later(self: &Arc<Self>, layers: &[LayerFile]) {
        let mut state = self.checks.state.lock();
        for layer in layers {
            // The empty layer has no diff ID.
            if !layer.diff_id.is_empty() && state.seen.insert(layer.diff_id.clone()) {
                state.queue.push_back(layer.clone());
            }
        }
        if state.queue.is_empty() || self.checks.running.send_replace(true) {
            return;
        }
        let (checks, store) = (self.checks.clone(), Arc::downgrade(self));
        let directory = self.checksums_dir();
        let spawned = std::thread::Builder::new()
            .name("verify-layers".into())
            .spawn(move || {
                while let Some(layer) = checks.next() {
                    verify(&layer, &directory, &store);
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "failed to start the verification of layers");
            state.queue.clear();
            self.checks.running.send_replace(false);
        }
    }

    /// Waits until no layer is being verified.
    pub(in crate::images) async fn verified(&self) {
        // The sender lives as long as the store.
        let _ = (self.checks.running.subscribe())
            .wait_for(|running| !running)
            .await;
    }

    /// Records the checksum of a layer that was just made. A failure is only logged: the first use records it. Blocks.
    pub(super) fn record_checksum(&self, finished: &Path, diff_id: &str) {
        let directory = self.checksums_dir();
        let recorded = File::open(finished)
            .and_then(|file| checksum(file, u64::MAX))
            .map(|sum| write(&directory, diff_id, sum));
        match recorded {
            Ok(Ok(())) => drop(self.checks.state.lock().seen.insert(diff_id.to_owned())),
            Ok(Err(error)) => {
                let error = error.report();
                tracing::warn!(diff_id, error, "failed to record a layer's checksum");
            }
            Err(error) => tracing::warn!(diff_id, %error, "failed to read a new layer"),
        }
    }

    /// Deletes the checksum of a layer that does not exist. Blocks.
    pub(super) fn forget_checksum(&self, diff_id: &str) -> ImageResult<()> {
        disk::delete(&record_path(&self.checksums_dir(), diff_id))
    }

    /// Sets a damaged layer aside, unless a pull has replaced it, and drops its images from the index. Blocks.
    fn set_aside(&self, layer: &LayerFile, inode: u64, reason: &str) {
        let _writer = self.writer();
        let aside = self.damaged_layer_path();
        {
            // As in `adopt_layer`.
            let _uses = self.uses();
            let present = std::fs::metadata(&layer.path);
            if present.is_ok_and(|present| present.ino() != inode) {
                return;
            }
            if let Err(error) = std::fs::rename(&layer.path, &aside) {
                tracing::error!(layer = layer.diff_id, reason, %error, "failed to set a damaged layer aside");
                return;
            }
        }
        let mut images = Images::clone(&self.snapshot());
        let mut dropped = Vec::new();
        images.retain(|id, stored| {
            let uses = stored.entry.layers.contains(&layer.diff_id);
            if uses {
                dropped.push(id.clone());
            }
            !uses
        });
        tracing::error!(
            layer = layer.diff_id, reason, aside = %aside.display(), images = ?dropped,
            "a layer is damaged: set aside, its images have to be pulled again"
        );
        let saved = self.save(&images);
        if let Err(error) = saved.and_then(|()| self.forget_checksum(&layer.diff_id)) {
            tracing::error!(
                error = error.report(),
                "failed to record that a layer is damaged"
            );
        }
        self.replace(images);
        // Last: whoever sees the count finds the images dropped.
        self.quarantined.fetch_add(1, Ordering::Relaxed);
    }
}

/// Compares a layer with its record, or writes a missing record.
fn verify(layer: &LayerFile, directory: &Path, store: &Weak<Store>) {
    let began = Instant::now();
    // A removed layer needs no verification.
    let Ok(file) = File::open(&layer.path) else {
        return;
    };
    let inode = file.metadata().map_or(0, |meta| meta.ino());
    let recorded = std::fs::read_to_string(record_path(directory, &layer.diff_id))
        .ok()
        .and_then(|text| parse(&text));
    let reason = match (checksum(file, MAX_BYTES_PER_SECOND), recorded) {
        (Ok(found), Some(recorded)) if found != recorded => {
            format!("expected {recorded:?}, found {found:?}")
        }
        (Ok(found), Some(_)) => {
            let milliseconds = began.elapsed().as_millis() as u64;
            tracing::debug!(
                layer = layer.diff_id,
                bytes = found.bytes,
                milliseconds,
                "layer verified"
            );
            return;
        }
        (Ok(found), None) => {
            if let Err(error) = write(directory, &layer.diff_id, found) {
                tracing::debug!(
                    error = error.report(),
                    "failed to record a layer's checksum"
                );
            }
            return;
        }
        (Err(error), _) => format!("failed to read it: {error}"),
    };
    // The store may have been closed.
    if let Some(store) = store.upgrade() {
        store.set_aside(layer, inode, &reason);
    }
}

/// Reads a file at a limited rate.
fn checksum(mut file: impl Read, max_bytes_per_second: u64) -> io::Result<Checksum> {
    let began = Instant::now();
    let mut crc = flate2::Crc::new();
    let mut bytes = 0;
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let read = match file.read(&mut buffer) {
            Ok(0) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        crc.update(&buffer[..read]);
        bytes += read as u64;
        let due = Duration::from_secs_f64(bytes as f64 / max_bytes_per_second as f64);
        std::thread::sleep(due.saturating_sub(began.elapsed()));
    }
    let crc = crc.sum();
    Ok(Checksum { crc, bytes })
}

fn record_path(directory: &Path, diff_id: &str) -> PathBuf {
    directory.join(super::hex_of(diff_id))
}

fn write(directory: &Path, diff_id: &str, sum: Checksum) -> ImageResult<()> {
    let text = format!("{:08x} {}\n", sum.crc, sum.bytes);
    disk::write_atomic(&record_path(directory, diff_id), text.as_bytes())
}

/// Parses a record; an unreadable one counts as missing.
fn parse(text: &str) -> Option<Checksum> {
    let (crc, bytes) = text.strip_suffix('\n')?.split_once(' ')?;
    Some(Checksum {
        crc: u32::from_str_radix(crc, 16).ok()?,
        bytes: bytes.parse().ok()?,
    })
}
