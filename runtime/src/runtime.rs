//! [`BoxliteRuntime`]: all boxes of a node. Signatures first; bodies follow.

use crate::error::{Result, RuntimeError};
use crate::images::ImageManager;
use crate::litebox::LiteBox;
use crate::metrics::RuntimeMetricsSnapshot;
use crate::types::{BoxOptions, BoxSnapshot, ContainerSnapshot, RuntimeOptions};
use std::sync::Arc;

/// A handle to the runtime. Cheap to clone.
#[derive(Debug, Clone)]
pub struct BoxliteRuntime {
    images: Arc<ImageManager>,
}

fn not_yet<T>() -> Result<T> {
    Err(RuntimeError::Internal {
        what: "not yet built".into(),
    })
}

impl BoxliteRuntime {
    /// Opens directories and database, re-adopts live shims, serves `state/events.ttrpc`.
    ///
    /// # Errors
    /// Of the file system and the database.
    pub async fn open(_options: RuntimeOptions) -> Result<Self> {
        not_yet()
    }
    /// Registers and persists a box; starts nothing. The same id and name while it lives: the one that is there.
    ///
    /// # Errors
    /// `AlreadyExists` where name or id belong to another box.
    pub async fn create_box(&self, _options: BoxOptions) -> Result<LiteBox> {
        not_yet()
    }
    /// A box by id, unique prefix of it, or never a name.
    ///
    /// # Errors
    /// `NotFound`, `AmbiguousId`.
    pub fn get_box(&self, _id: &str) -> Result<LiteBox> {
        not_yet()
    }
    /// A box by name.
    pub fn find_box_by_name(&self, _name: &str) -> Option<LiteBox> {
        None
    }
    /// All boxes; never waits for a VM.
    pub fn boxes(&self) -> Vec<BoxSnapshot> {
        Vec::new()
    }
    /// A container by id or unique prefix, with its box.
    ///
    /// # Errors
    /// `NotFound`, `AmbiguousId`.
    pub fn find_container(&self, _id: &str) -> Result<(LiteBox, ContainerSnapshot)> {
        not_yet()
    }
    /// All containers; never waits for a VM.
    pub fn containers(&self) -> Vec<ContainerSnapshot> {
        Vec::new()
    }
    /// The image store.
    pub fn images(&self) -> &ImageManager {
        &self.images
    }
    /// Totals over all boxes.
    pub fn metrics(&self) -> RuntimeMetricsSnapshot {
        RuntimeMetricsSnapshot::default()
    }
    /// Ends the runtime's tasks and leaves every box running.
    pub async fn shutdown(self) {}
}
