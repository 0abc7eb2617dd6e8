//! [`BoxManager`]: maps of boxes by id and by name.
//!
//! Guarded by the RwLock `RuntimeInnerImpl::sync_state`, which is not held across an await.

use crate::error::Result;
use crate::id_prefix::unique;
use crate::litebox::LiteBox;
use std::collections::{BTreeMap, HashMap};

/// All boxes of a runtime.
#[derive(Debug, Default)]
pub(crate) struct BoxManager {
    by_id: BTreeMap<String, LiteBox>,
    by_name: HashMap<String, String>,
}

impl BoxManager {
    /// Adds a box. The caller has checked under the creation lock that its id and name are free.
    pub(crate) fn insert(&mut self, litebox: LiteBox) {
        self.by_name
            .insert(litebox.name().to_owned(), litebox.id().to_owned());
        self.by_id.insert(litebox.id().to_owned(), litebox);
    }

    /// Removes a box.
    pub(crate) fn remove(&mut self, id: &str) -> Option<LiteBox> {
        let litebox = self.by_id.remove(id)?;
        self.by_name.remove(litebox.name());
        Some(litebox)
    }

    /// Returns the box with this name.
    pub(crate) fn by_name(&self, name: &str) -> Option<&LiteBox> {
        self.by_id.get(self.by_name.get(name)?)
    }

    /// Returns the box with exactly this id.
    pub(crate) fn by_id(&self, id: &str) -> Option<&LiteBox> {
        self.by_id.get(id)
    }

    /// Returns the box with this id or unique id prefix.
    ///
    /// # Errors
    /// `NotFound`, `AmbiguousId`.
    pub(crate) fn find(&self, prefix: &str) -> Result<&LiteBox> {
        unique("pod sandbox", prefix, &self.by_id)
    }

    /// Iterates over all boxes ordered by id.
    pub(crate) fn all(&self) -> impl Iterator<Item = &LiteBox> {
        self.by_id.values()
    }
}
