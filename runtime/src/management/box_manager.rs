//! [`BoxManager`]: maps of boxes by id and by name.
//!
//! Guarded by the RwLock `RuntimeInnerImpl::sync_state`, which is not held across an await.

use crate::error::{Result, RuntimeError};
use crate::litebox::LiteBox;
use std::collections::{BTreeMap, HashMap};

/// All boxes of a runtime.
#[derive(Debug, Default)]
pub struct BoxManager {
    by_id: BTreeMap<String, LiteBox>,
    by_name: HashMap<String, String>,
}

impl BoxManager {
    /// Adds a box. The caller has checked under the creation lock that its id and name are free.
    pub fn insert(&mut self, litebox: LiteBox) {
        self.by_name
            .insert(litebox.name().to_owned(), litebox.id().to_owned());
        self.by_id.insert(litebox.id().to_owned(), litebox);
    }

    /// Removes a box.
    pub fn remove(&mut self, id: &str) -> Option<LiteBox> {
        let litebox = self.by_id.remove(id)?;
        self.by_name.remove(litebox.name());
        Some(litebox)
    }

    /// Returns the box with this name.
    pub fn by_name(&self, name: &str) -> Option<&LiteBox> {
        self.by_id.get(self.by_name.get(name)?)
    }

    /// Returns the box with exactly this id.
    pub fn by_id(&self, id: &str) -> Option<&LiteBox> {
        self.by_id.get(id)
    }

    /// Returns the box with this id or unique id prefix.
    ///
    /// # Errors
    /// `NotFound`, `AmbiguousId`.
    pub fn find(&self, prefix: &str) -> Result<&LiteBox> {
        unique("pod sandbox", prefix, &self.by_id)
    }

    /// Iterates over all boxes ordered by id.
    pub fn all(&self) -> impl Iterator<Item = &LiteBox> {
        self.by_id.values()
    }
}

/// Returns the entry with key `prefix`, or the only entry whose key starts with it.
///
/// # Errors
/// `NotFound` (also for an empty prefix), `AmbiguousId`.
pub(crate) fn unique<'a, T>(
    what: &'static str,
    prefix: &str,
    map: &'a BTreeMap<String, T>,
) -> Result<&'a T> {
    if let Some(found) = map.get(prefix) {
        return Ok(found);
    }
    let not_found = || RuntimeError::NotFound {
        subject: what,
        id: prefix.to_owned(),
    };
    if prefix.is_empty() {
        return Err(not_found());
    }
    let mut matching = map
        .range(prefix.to_owned()..)
        .take_while(|(key, _)| key.starts_with(prefix));
    let (_, first) = matching.next().ok_or_else(not_found)?;
    match matching.count() {
        0 => Ok(first),
        more => Err(RuntimeError::AmbiguousId {
            subject: what,
            prefix: prefix.to_owned(),
            count: more + 1,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unique_accepts_only_unambiguous_prefixes() {
        let map: BTreeMap<String, u8> = [
            ("abc".to_owned(), 1),
            ("abd".to_owned(), 2),
            ("ab".to_owned(), 3),
        ]
        .into();
        assert_eq!(unique("box", "abc", &map).unwrap(), &1);
        assert_eq!(unique("box", "ab", &map).unwrap(), &3);
        assert!(matches!(
            unique("box", "a", &map),
            Err(RuntimeError::AmbiguousId { count: 3, .. })
        ));
        assert!(matches!(
            unique("box", "b", &map),
            Err(RuntimeError::NotFound { .. })
        ));
        assert!(matches!(
            unique("box", "", &map),
            Err(RuntimeError::NotFound { .. })
        ));
    }
}
