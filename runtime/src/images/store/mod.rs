//! [`Store`]: images with their manifests, configs and layer files, on disk and in memory.
//!
//! Downloads and conversions are in `layer`; only complete content is added here. Called by `ImageManager` and `pull`.
//!
//! On disk, below the store's directory (0700):
//!
//! ```text
//! index.json                   images with tags, digests and layers; replaced atomically, 0600
//! index.backup.json            a copy, for a damaged index; see `rebuild`
//! blobs/sha256/<hex>           manifests, indexes and configs, unchanged
//! layers/sha256/<hex>.erofs    one file per layer, by diff ID, 0444
//! layers/checksums/<hex>       their checksums; see `checksums`
//! layers/damaged.erofs         the last layer that was found damaged
//! layers/empty.erofs           empty file system, for images without layers
//! ingest/                      incomplete files; see `layer`
//! lock                         held while a process has the store open
//! ```
//!
//! The index is a JSON file instead of a database: it has a few hundred entries at most, is rewritten only by pulls and
//! removals, and a rename moves a tag from one image to another atomically. A crash leaves either the old or the new
//! index, and possibly unreferenced files, which `open` and every removal delete.
//!
//! Readers use an immutable snapshot; writers are serialized by `writer`. Holds and leases are in memory only: holders
//! take their holds again after a restart, before the first removal is served.

mod checksums;
mod disk;
mod rebuild;

pub(super) use disk::{PARTIAL_SUFFIX, delete};

use boxlite_sys::file_lock::FileLock;
use boxlite_sys::sync::{Mutex, RwLock};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};

use serde::{Deserialize, Serialize};

use super::error::{ImageError, ImageResult};
use super::manifest::{self, Platform};
use super::reference::{Digest, Reference};
use super::types::{ImageFsInfo, ImageRecord, LayerFile};
use crate::failpoint;

/// Version of `index.json`; other versions are refused, so that an older daemon does not destroy a newer store.
const INDEX_VERSION: u32 = 1;

/// An open image store.
pub(super) struct Store {
    dir: PathBuf,
    images: RwLock<Arc<Images>>,
    uses: Mutex<Uses>,
    /// Held while files or the index change; only on blocking threads.
    writer: Mutex<()>,
    /// Damaged images, index files and layers found since the start.
    quarantined: AtomicU64,
    checks: Arc<checksums::Checks>,
    /// Locks the store against other processes.
    _lock: FileLock,
}

type Images = BTreeMap<String, Arc<Stored>>;

/// An image: its index entry and its public record.
struct Stored {
    entry: IndexEntry,
    record: ImageRecord,
}

#[derive(Serialize, Deserialize)]
struct IndexFile {
    version: u32,
    images: Vec<IndexEntry>,
}

#[derive(Serialize, Deserialize, Clone)]
#[serde(deny_unknown_fields)]
struct IndexEntry {
    /// Digest of the config.
    id: String,
    tags: BTreeSet<String>,
    digests: BTreeSet<String>,
    /// Digests of the manifest, of the indexes above it, and of the config.
    blobs: BTreeSet<String>,
    /// Diff IDs, lowest first.
    layers: Vec<String>,
}

#[derive(Default)]
struct Uses {
    /// Holders by image ID.
    holds: HashMap<String, BTreeSet<String>>,
    /// Number of running pulls by layer digest.
    leases: HashMap<String, usize>,
    /// Images that are being removed and cannot be held.
    removing: HashSet<String>,
}

/// Content of a new image.
pub(super) struct NewImage {
    pub reference: Reference,
    /// Digest of the index or manifest that the reference names.
    pub target: Digest,
    /// Manifest and indexes with their digests.
    pub documents: Vec<(Digest, Vec<u8>)>,
    pub config: (Digest, Vec<u8>),
    /// Diff IDs, lowest first; their files are in the store.
    pub layers: Vec<Digest>,
}

/// Protects layers from deletion while a pull needs them, until it is dropped.
pub(super) struct Lease {
    store: Arc<Store>,
    layers: Vec<String>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut uses = self.store.uses();
        for layer in &self.layers {
            if let Some(count) = uses.leases.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    uses.leases.remove(layer);
                }
            }
        }
    }
}

impl Store {
    /// Opens or creates the store. Drops images with missing or damaged files, with a warning, and deletes the leftovers of
    /// a crash; recent partial downloads are kept (see `disk::clean_ingest`). Blocks.
    pub(super) fn open(dir: &Path) -> ImageResult<Arc<Self>> {
        for sub in [
            "",
            "blobs/sha256",
            "layers/sha256",
            "layers/checksums",
            "ingest",
        ] {
            disk::private_dir(&dir.join(sub))?;
        }
        let lock = disk::lock(dir)?;
        let store = Self {
            dir: dir.to_path_buf(),
            images: RwLock::default(),
            uses: Mutex::default(),
            writer: Mutex::default(),
            quarantined: AtomicU64::new(0),
            checks: Arc::default(),
            _lock: lock,
        };
        let entries = store.entries()?;
        let mut images = Images::new();
        for entry in entries {
            let id = entry.id.clone();
            match store.load(entry) {
                Ok(stored) => drop(images.insert(id, Arc::new(stored))),
                Err(e) => {
                    tracing::error!(image = %id, error = %e.report(), "dropping damaged image");
                    store.quarantined.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        store.replace(images);
        if let Err(e) = store.write_empty_layer() {
            tracing::warn!(error = %e.report(), "failed to write the empty layer");
        }
        if store.quarantined() > 0
            && let Err(e) = store.save(&store.snapshot())
        {
            tracing::error!(error = %e.report(), "failed to write the repaired index");
        }
        disk::clean_ingest(&store.ingest_dir())?;
        store.collect()?;
        Ok(Arc::new(store))
    }

    /// Returns the number of damaged images, index files and layers found since the start.
    pub(super) fn quarantined(&self) -> u64 {
        self.quarantined.load(Ordering::Relaxed)
    }

    /// Builds the record of an index entry and checks its files.
    fn load(&self, entry: IndexEntry) -> ImageResult<Stored> {
        let bad = |reason: String| ImageError::invalid(format!("image {}", entry.id), reason);
        let id = Digest::parse(&entry.id).map_err(bad)?;
        let path = self.blob_path(&id);
        let bytes = disk::read(&path)?.ok_or_else(|| bad("its config is missing".into()))?;
        if Digest::of(&bytes) != id {
            return Err(ImageError::corrupt(
                format!("config {id}"),
                id.as_str(),
                Digest::of(&bytes).as_str(),
            ));
        }
        let what = format!("config {id}");
        let (config, diff_ids) =
            manifest::parse_config(&what, &bytes, entry.layers.len(), Platform::host())?;
        let mut size_bytes = 0;
        for digest in &diff_ids {
            size_bytes += self
                .layer(digest)?
                .ok_or_else(|| bad(format!("its layer {digest} is missing")))?
                .bytes;
        }
        for blob in &entry.blobs {
            let blob = Digest::parse(blob).map_err(bad)?;
            size_bytes += std::fs::metadata(self.blob_path(&blob))
                .map(|m| m.len())
                .unwrap_or(0);
        }
        let record = ImageRecord {
            id: entry.id.clone(),
            repo_tags: entry.tags.iter().cloned().collect(),
            repo_digests: entry.digests.iter().cloned().collect(),
            size_bytes,
            layers: diff_ids.iter().map(Digest::to_string).collect(),
            config: Arc::new(config),
            pinned: false,
        };
        Ok(Stored { entry, record })
    }

    /// Adds an image, or adds the reference to an existing image; a tag of another image moves. On an error the index is
    /// unchanged. Blocks.
    pub(super) fn commit(&self, new: NewImage) -> ImageResult<ImageRecord> {
        let _writer = self.writer();
        let mut images = Images::clone(&self.snapshot());
        let id = new.config.0.to_string();
        failpoint::hit("image.commit")?;
        for (digest, bytes) in new.documents.iter().chain([&new.config]) {
            disk::write_atomic(&self.blob_path(digest), bytes)?;
        }
        let mut entry = images.get(&id).map_or_else(
            || IndexEntry {
                id: id.clone(),
                tags: BTreeSet::new(),
                digests: BTreeSet::new(),
                blobs: BTreeSet::new(),
                layers: new.layers.iter().map(Digest::to_string).collect(),
            },
            |stored| stored.entry.clone(),
        );
        entry.digests.insert(new.reference.with_digest(&new.target));
        entry.blobs.extend(
            new.documents
                .iter()
                .chain([&new.config])
                .map(|(d, _)| d.to_string()),
        );
        if new.reference.tag().is_some() {
            let tag = new.reference.to_string();
            let owner = images
                .iter()
                .find(|(i, s)| **i != id && s.entry.tags.contains(&tag));
            if let Some((owner, stored)) = owner.map(|(i, s)| (i.clone(), s.clone())) {
                let mut untagged = stored.entry.clone();
                untagged.tags.remove(&tag);
                images.insert(owner, Arc::new(self.load(untagged)?));
            }
            entry.tags.insert(tag);
        }
        if entry.layers.is_empty() {
            self.write_empty_layer()?;
        }
        let stored = Arc::new(self.load(entry)?);
        images.insert(id, stored.clone());
        failpoint::hit("image.record")?;
        self.save(&images)?;
        failpoint::hit("image.recorded")?;
        self.replace(images);
        Ok(stored.record.clone())
    }

    /// Removes the image with all its references, and the files that no other image needs. Returns false if it does not
    /// exist. Blocks.
    pub(super) fn remove(&self, what: &str) -> ImageResult<bool> {
        let _writer = self.writer();
        let Some(record) = self.find(what) else {
            return Ok(false);
        };
        {
            let mut uses = self.uses();
            if let Some(holders) = uses.holds.get(&record.id) {
                return Err(ImageError::InUse {
                    image: record.id,
                    holders: holders.iter().cloned().collect(),
                });
            }
            uses.removing.insert(record.id.clone());
        }
        let mut images = Images::clone(&self.snapshot());
        images.remove(&record.id);
        self.replace(images.clone());
        self.uses().removing.remove(&record.id);
        failpoint::hit("image.remove")?;
        // The files first: writing the index may need the space that they free. An index that still lists the image is
        // harmless, because `open` drops images without a config.
        self.collect()?;
        if let Err(e) = self.save(&images) {
            tracing::error!(image = record.id, error = %e.report(), "failed to write the index after a removal");
        }
        Ok(true)
    }

    /// Deletes layers and blobs that no image and no running pull needs. Blocks; the caller holds `writer` or is `open`.
    fn collect(&self) -> ImageResult<()> {
        let images = self.snapshot();
        let layers: HashSet<&str> = images
            .values()
            .flat_map(|s| s.entry.layers.iter().map(|l| hex_of(l)))
            .collect();
        let blobs: HashSet<&str> = images
            .values()
            .flat_map(|s| s.entry.blobs.iter().map(|b| hex_of(b)))
            .collect();
        disk::retain(&self.blobs_dir(), |name| blobs.contains(name))?;
        // The lock is held while files are deleted: a pull looks for its layers after it has taken the lease.
        let uses = self.uses();
        let needed =
            |hex: &str| layers.contains(hex) || uses.leases.contains_key(&format!("sha256:{hex}"));
        disk::retain(&self.dir.join("layers/sha256"), |name| {
            name.strip_suffix(".erofs").is_some_and(needed)
        })?;
        disk::retain(&self.checksums_dir(), needed)
    }

    /// Deletes those of `layers` that are not needed, after a pull that failed permanently. Blocks.
    pub(super) fn discard(&self, layers: &[Digest]) -> ImageResult<()> {
        let _writer = self.writer();
        let images = self.snapshot();
        let uses = self.uses();
        for layer in layers {
            let needed = uses.leases.contains_key(layer.as_str())
                || images
                    .values()
                    .any(|s| s.entry.layers.iter().any(|l| l == layer.as_str()));
            if !needed {
                disk::delete(&self.layer_path(layer))?;
                self.forget_checksum(layer.as_str())?;
            }
        }
        Ok(())
    }

    /// Protects `layers` from deletion until the lease is dropped.
    pub(super) fn lease(self: &Arc<Self>, layers: &[Digest]) -> Lease {
        let layers: Vec<String> = layers.iter().map(Digest::to_string).collect();
        let mut uses = self.uses();
        for layer in &layers {
            *uses.leases.entry(layer.clone()).or_default() += 1;
        }
        drop(uses);
        Lease {
            store: self.clone(),
            layers,
        }
    }

    /// Returns the layer's file, if it exists.
    pub(super) fn layer(&self, diff_id: &Digest) -> ImageResult<Option<LayerFile>> {
        let path = self.layer_path(diff_id);
        match std::fs::metadata(&path) {
            Ok(meta) => Ok(Some(LayerFile {
                diff_id: diff_id.to_string(),
                path,
                bytes: meta.len(),
            })),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(ImageError::io("stat", &path, e)),
        }
    }

    /// Returns the layer file of images without layers. overlayfs needs at least one lower directory.
    pub(super) fn empty_layer(&self) -> ImageResult<LayerFile> {
        let path = self.empty_layer_path();
        let meta = std::fs::metadata(&path).map_err(|e| ImageError::io("stat", &path, e))?;
        Ok(LayerFile {
            diff_id: String::new(),
            path,
            bytes: meta.len(),
        })
    }

    /// Writes the file of [`Self::empty_layer`] if it is missing. Blocks.
    fn write_empty_layer(&self) -> ImageResult<()> {
        let path = self.empty_layer_path();
        if path.is_file() {
            return Ok(());
        }
        let ingest = self.ingest_dir();
        let failed = |e| ImageError::io("write", &path, e);
        let file = tempfile::NamedTempFile::new_in(&ingest).map_err(failed)?;
        let target = boxlite_erofs::Target {
            file: file.as_file(),
            path: file.path(),
            scratch: &ingest,
            cancelled: &|| false,
        };
        // Two blocks of zeros are an empty archive.
        boxlite_erofs::write_image(&mut &[0; 1024][..], "empty layer", target)?;
        let mode = std::fs::Permissions::from_mode(0o444);
        file.as_file().set_permissions(mode).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map_err(|e| failed(e.error))?;
        Ok(())
    }

    fn empty_layer_path(&self) -> PathBuf {
        self.dir.join("layers/empty.erofs")
    }

    /// Returns the config of a stored image; `None` if it does not exist or is damaged. Blocks.
    pub(super) fn config(&self, id: &Digest) -> ImageResult<Option<Vec<u8>>> {
        if !self.snapshot().contains_key(id.as_str()) {
            return Ok(None);
        }
        Ok(disk::read(&self.blob_path(id))?.filter(|bytes| Digest::of(bytes) == *id))
    }

    /// Moves a finished, synced layer file into the store and makes that durable. Blocks.
    ///
    /// Fails with [`ImageError::Cancelled`] if no pull has a lease on the layer: a conversion may outlive its pull, and must
    /// not restore a file that the pull has cleaned up.
    pub(super) fn adopt_layer(&self, finished: &Path, diff_id: &Digest) -> ImageResult<()> {
        let path = self.layer_path(diff_id);
        self.record_checksum(finished, diff_id.as_str());
        {
            let uses = self.uses();
            if !uses.leases.contains_key(diff_id.as_str()) {
                self.forget_checksum(diff_id.as_str())?;
                return Err(ImageError::Cancelled);
            }
            std::fs::rename(finished, &path)
                .map_err(|e| ImageError::io("rename a layer to", &path, e))?;
        }
        failpoint::hit("image.adopted")?;
        disk::sync_dir(&self.dir.join("layers/sha256"))
    }

    /// Returns all images ordered by ID.
    pub(super) fn list(&self) -> Vec<ImageRecord> {
        self.snapshot().values().map(|s| s.record.clone()).collect()
    }

    /// Returns the image with this ID, unique ID prefix, tag or digest reference.
    pub(super) fn find(&self, what: &str) -> Option<ImageRecord> {
        let images = self.snapshot();
        let id = if what.starts_with("sha256:") {
            what.to_owned()
        } else {
            format!("sha256:{what}")
        };
        if let Some(stored) = images.get(&id) {
            return Some(stored.record.clone());
        }
        if let Ok(reference) = Reference::parse(what) {
            let name = reference.to_string();
            let named =
                |s: &&Arc<Stored>| s.entry.tags.contains(&name) || s.entry.digests.contains(&name);
            if let Some(stored) = images.values().find(named) {
                return Some(stored.record.clone());
            }
        }
        if id.len() == "sha256:".len() {
            return None;
        }
        let mut starting = images
            .range(id.clone()..)
            .take_while(|(i, _)| i.starts_with(&id));
        match (starting.next(), starting.next()) {
            (Some((_, stored)), None) => Some(stored.record.clone()),
            _ => None,
        }
    }

    /// Keeps the image `what` until `holder` releases it. Idempotent per holder.
    pub(super) fn hold(&self, what: &str, holder: &str) -> ImageResult<ImageRecord> {
        let not_found = || ImageError::NotFound {
            subject: format!("image {what}"),
            host: None,
        };
        let mut uses = self.uses();
        let record = self.find(what).ok_or_else(not_found)?;
        if uses.removing.contains(&record.id) {
            return Err(not_found());
        }
        uses.holds
            .entry(record.id.clone())
            .or_default()
            .insert(holder.to_owned());
        Ok(record)
    }

    /// Releases a hold, if there is one.
    pub(super) fn release(&self, id: &str, holder: &str) {
        let mut uses = self.uses();
        if let Some(holders) = uses.holds.get_mut(id) {
            holders.remove(holder);
            if holders.is_empty() {
                uses.holds.remove(id);
            }
        }
    }

    /// Deletes partial downloads that `in_use` rejects, oldest first: those older than an hour, and as many as exceed
    /// `max_bytes` in total. Blocks.
    pub(super) fn reclaim_partials(
        &self,
        max_bytes: u64,
        in_use: impl Fn(&str) -> bool,
    ) -> ImageResult<()> {
        disk::reclaim_partials(&self.ingest_dir(), max_bytes, in_use)
    }

    /// Returns the disk usage of the store. Blocks.
    pub(super) fn fs_info(&self) -> ImageResult<ImageFsInfo> {
        disk::usage(&self.dir)
    }

    /// Returns the directory of incomplete files.
    pub(super) fn ingest_dir(&self) -> PathBuf {
        self.dir.join("ingest")
    }

    fn save(&self, images: &Images) -> ImageResult<()> {
        let file = IndexFile {
            version: INDEX_VERSION,
            images: images.values().map(|s| s.entry.clone()).collect(),
        };
        let path = self.index_path();
        let json = serde_json::to_vec_pretty(&file)
            .map_err(|e| ImageError::io("encode", &path, e.into()))?;
        disk::write_atomic(&path, &json)?;
        // Best effort: a removal on a full disk must not fail for its want.
        if let Err(e) = disk::write_atomic(&self.backup_path(), &json) {
            tracing::debug!(error = %e.report(), "failed to write the copy of the index");
        }
        Ok(())
    }

    fn index_path(&self) -> PathBuf {
        self.dir.join("index.json")
    }

    fn backup_path(&self) -> PathBuf {
        self.dir.join("index.backup.json")
    }

    fn blobs_dir(&self) -> PathBuf {
        self.dir.join("blobs/sha256")
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs_dir().join(digest.hex())
    }

    fn layer_path(&self, digest: &Digest) -> PathBuf {
        self.dir
            .join("layers/sha256")
            .join(format!("{}.erofs", digest.hex()))
    }

    fn checksums_dir(&self) -> PathBuf {
        self.dir.join("layers/checksums")
    }

    fn damaged_layer_path(&self) -> PathBuf {
        self.dir.join("layers/damaged.erofs")
    }

    fn snapshot(&self) -> Arc<Images> {
        self.images.read().clone()
    }

    fn replace(&self, images: Images) {
        *self.images.write() = Arc::new(images);
    }

    fn uses(&self) -> MutexGuard<'_, Uses> {
        self.uses.lock()
    }

    fn writer(&self) -> MutexGuard<'_, ()> {
        self.writer.lock()
    }
}

fn hex_of(digest: &str) -> &str {
    digest.strip_prefix("sha256:").unwrap_or(digest)
}
