//! [`BoxManager`]: the maps of boxes, by id and by name.
//!
//! Only maps: it stands under the one RwLock of `RuntimeInnerImpl::sync_state`, is looked into and let go of, never
//! held across an await. What a box does, its driver knows.

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
    /// Adds a box; its id and name are free (the caller looked under the same creation lock).
    pub fn insert(&mut self, litebox: LiteBox) {
        self.by_name
            .insert(litebox.name().to_owned(), litebox.id().to_owned());
        self.by_id.insert(litebox.id().to_owned(), litebox);
    }

    /// Takes a box out.
    pub fn remove(&mut self, id: &str) -> Option<LiteBox> {
        let litebox = self.by_id.remove(id)?;
        self.by_name.remove(litebox.name());
        Some(litebox)
    }

    /// By name.
    pub fn by_name(&self, name: &str) -> Option<&LiteBox> {
        self.by_id.get(self.by_name.get(name)?)
    }

    /// By full id.
    pub fn by_id(&self, id: &str) -> Option<&LiteBox> {
        self.by_id.get(id)
    }

    /// By full id or a prefix that only one id has.
    ///
    /// # Errors
    /// `NotFound`, `AmbiguousId`.
    pub fn find(&self, prefix: &str) -> Result<&LiteBox> {
        unique("box", prefix, &self.by_id)
    }

    /// All, by id.
    pub fn all(&self) -> impl Iterator<Item = &LiteBox> {
        self.by_id.values()
    }
}

/// The entry whose key is `prefix`, or the only one whose key begins with it.
///
/// # Errors
/// `NotFound` (an empty prefix finds nothing), `AmbiguousId`.
pub(crate) fn unique<'a, T>(
    what: &'static str,
    prefix: &str,
    map: &'a BTreeMap<String, T>,
) -> Result<&'a T> {
    if let Some(found) = map.get(prefix) {
        return Ok(found);
    }
    let not_found = || RuntimeError::NotFound {
        what,
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
            what,
            prefix: prefix.to_owned(),
            count: more + 1,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_unique_or_refused() {
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
