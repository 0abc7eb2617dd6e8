//! Lookup by unique prefix of an ID, as the CRI and its clients use it.

use crate::error::{Result, RuntimeError};
use std::collections::BTreeMap;

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
