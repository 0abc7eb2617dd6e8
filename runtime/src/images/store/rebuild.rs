//! Reads the index of the store. A damaged or missing one is set aside and replaced by its copy, and by the images whose
//! manifest, config and layers are in the store. The latter have no tags, because only the index has them: the next pull of the
//! reference adds them again and downloads nothing.
//!
//! An index of another version is refused, so that an older daemon does not destroy a newer store.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::Ordering;

use super::{INDEX_VERSION, IndexEntry, IndexFile, Store, disk};
use crate::images::error::{ImageError, ImageResult};
use crate::images::manifest::{self, Document, Platform};
use crate::images::reference::Digest;

impl Store {
    /// Returns the entries of the index, or as many as can be recovered. Blocks.
    pub(super) fn entries(&self) -> ImageResult<Vec<IndexEntry>> {
        let path = self.index_path();
        let reason = match disk::read(&path)? {
            Some(bytes) => match serde_json::from_slice::<IndexFile>(&bytes) {
                Ok(file) => return supported(&path, file),
                Err(error) => match version_of(&bytes) {
                    Some(version) if version != INDEX_VERSION => {
                        return Err(unsupported(&path, version));
                    }
                    _ => error.to_string(),
                },
            },
            None if self.is_new()? => return Ok(Vec::new()),
            None => "not found".to_owned(),
        };
        self.quarantined.fetch_add(1, Ordering::Relaxed);
        let aside = path.with_extension("json.damaged");
        // It may not exist; a second damaged index replaces the first.
        let kept = std::fs::rename(&path, &aside).is_ok();
        let backup = disk::read(&self.backup_path())?
            .and_then(|bytes| serde_json::from_slice::<IndexFile>(&bytes).ok())
            .and_then(|file| supported(&path, file).ok())
            .unwrap_or_default();
        let named = backup.len();
        let mut entries: BTreeMap<String, IndexEntry> = self.found()?;
        entries.extend(backup.into_iter().map(|entry| (entry.id.clone(), entry)));
        tracing::error!(
            path = %path.display(), reason, kept, named, images = entries.len(),
            "the image index is damaged: rebuilt from its copy and the store's content"
        );
        Ok(entries.into_values().collect())
    }

    /// Returns true if the store has no content, so that no index is missing.
    fn is_new(&self) -> ImageResult<bool> {
        Ok(self.blobs()?.is_empty() && !self.backup_path().exists())
    }

    fn blobs(&self) -> ImageResult<Vec<Digest>> {
        let dir = self.blobs_dir();
        let entries = std::fs::read_dir(&dir).map_err(|e| ImageError::io("read", &dir, e))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names
            .filter_map(|name| Digest::parse(&format!("sha256:{name}")).ok())
            .collect())
    }

    /// Returns the images whose manifests are in the store, by ID and without names. `load` checks their files.
    fn found(&self) -> ImageResult<BTreeMap<String, IndexEntry>> {
        let mut found = BTreeMap::new();
        for digest in self.blobs()? {
            let Some(bytes) = disk::read(&self.blob_path(&digest))? else {
                continue;
            };
            if Digest::of(&bytes) != digest {
                continue;
            }
            // Configs and indexes are blobs, too, but not manifests.
            let Ok(Document::Manifest(document)) =
                manifest::parse("a blob", None, &bytes, Platform::host())
            else {
                continue;
            };
            let Some(config) = disk::read(&self.blob_path(&document.config.digest))? else {
                continue;
            };
            let layers = document.layers.len();
            let parsed = manifest::parse_config("a config", &config, layers, Platform::host());
            let Ok((_, diff_ids)) = parsed else { continue };
            let id = document.config.digest.to_string();
            let blobs = [digest.to_string(), id.clone()];
            let entry = IndexEntry {
                id: id.clone(),
                tags: BTreeSet::new(),
                digests: BTreeSet::new(),
                blobs: blobs.into_iter().collect(),
                layers: diff_ids.iter().map(Digest::to_string).collect(),
            };
            found.insert(id, entry);
        }
        Ok(found)
    }
}

fn supported(path: &Path, file: IndexFile) -> ImageResult<Vec<IndexEntry>> {
    match file.version {
        INDEX_VERSION => Ok(file.images),
        version => Err(unsupported(path, version)),
    }
}

fn unsupported(path: &Path, version: u32) -> ImageError {
    ImageError::Config {
        path: path.to_owned(),
        reason: format!("version {version} is not supported, expected {INDEX_VERSION}"),
    }
}

/// Version of an index whose entries this version does not know.
fn version_of(bytes: &[u8]) -> Option<u32> {
    let value: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    value["version"].as_u64()?.try_into().ok()
}
