//! Reads a TOML file table by table, key by key, and collects every mistake: wrong types, wrong values, unknown keys.
//!
//! serde's `deny_unknown_fields` stops at the first mistake; operators want the complete list. The keys are named by the callers.

use std::fmt;
use std::path::{Path, PathBuf};
use toml::Value;

/// Largest configuration file accepted, in bytes. Real files are below 8 KiB.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Most single-character edits between an unknown key and the known key suggested for it.
const MAX_SUGGESTION_EDITS: usize = 2;

/// One invalid entry of a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Dotted key, such as `cni.timeout_seconds`.
    pub key: String,
    /// Value in TOML syntax; empty for a table.
    pub value: String,
    /// Reason for the rejection.
    pub reason: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.value.is_empty() {
            write!(f, "{}: {}", self.key, self.reason)
        } else {
            write!(f, "{} = {}: {}", self.key, self.value, self.reason)
        }
    }
}

/// Failure to read a configuration file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("failed to read the configuration file {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("invalid TOML in {}", path.display())]
    Syntax {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    /// All invalid entries.
    #[error("invalid configuration {}: {} mistake(s)\n{}", path.display(), mistakes.len(),
        mistakes.iter().map(|m| format!("  {m}")).collect::<Vec<_>>().join("\n"))]
    Mistakes {
        path: PathBuf,
        mistakes: Vec<Mistake>,
    },
}

/// Reads the file at `path` with `read`. A missing file is an error.
pub fn load<T>(
    path: &Path,
    read: impl FnOnce(Section, &mut Vec<Mistake>) -> T,
) -> Result<T, ConfigError> {
    let failed = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > MAX_FILE_BYTES {
        return Err(failed(std::io::Error::other(format!(
            "{size} bytes exceed the maximum of {MAX_FILE_BYTES}"
        ))));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    parse(&text, path, read)
}

/// Parses TOML and reads its top-level table with `read`; `path` appears in messages only.
pub fn parse<T>(
    text: &str,
    path: &Path,
    read: impl FnOnce(Section, &mut Vec<Mistake>) -> T,
) -> Result<T, ConfigError> {
    let table: toml::Table = toml::from_str(text).map_err(|source| ConfigError::Syntax {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    let mut mistakes = Vec::new();
    let config = read(Section::top(table), &mut mistakes);
    if mistakes.is_empty() {
        Ok(config)
    } else {
        Err(ConfigError::Mistakes {
            path: path.to_owned(),
            mistakes,
        })
    }
}

/// A table whose keys are consumed one by one.
pub struct Section {
    prefix: String,
    table: toml::Table,
    mistakes: Vec<Mistake>,
    known: Vec<String>,
}

impl Section {
    fn new(prefix: String, table: toml::Table) -> Self {
        Self {
            prefix,
            table,
            mistakes: Vec::new(),
            known: Vec::new(),
        }
    }

    fn top(table: toml::Table) -> Self {
        Self::new(String::new(), table)
    }

    /// Removes and returns the sub-table `name`; empty if the file has none.
    pub fn section(&mut self, name: &str) -> Self {
        self.known.push(name.to_owned());
        let table = match self.table.remove(name) {
            None => toml::Table::new(),
            Some(Value::Table(table)) => table,
            Some(other) => {
                self.mistakes.push(Mistake {
                    key: name.to_owned(),
                    value: display(&other),
                    reason: "must be a table".into(),
                });
                toml::Table::new()
            }
        };
        Self::new(format!("{name}."), table)
    }

    /// Returns the value of `key` as read by `read`, or `default` if it is absent or invalid.
    pub fn take<T>(
        &mut self,
        key: &str,
        default: T,
        read: impl FnOnce(&Value) -> Result<T, String>,
    ) -> T {
        self.known.push(key.to_owned());
        let Some(value) = self.table.remove(key) else {
            return default;
        };
        read(&value).unwrap_or_else(|reason| {
            self.mistakes.push(Mistake {
                key: format!("{}{key}", self.prefix),
                value: display(&value),
                reason,
            });
            default
        })
    }

    /// Appends this table's mistakes; every remaining key is unknown.
    pub fn finish(self, mistakes: &mut Vec<Mistake>) {
        mistakes.extend(self.mistakes);
        let known = self.known;
        mistakes.extend(self.table.into_iter().map(|(key, value)| Mistake {
            reason: match suggestion(&key, &known) {
                Some(known) => format!("unknown key, did you mean {known}?"),
                None => "unknown key".into(),
            },
            key: format!("{}{key}", self.prefix),
            value: display(&value),
        }));
    }
}

fn display(value: &Value) -> String {
    match value {
        Value::Table(_) => String::new(),
        other => other.to_string(),
    }
}

/// Returns the known key closest to `key`, if it is close enough to be a typing error.
fn suggestion<'a>(key: &str, known: &'a [String]) -> Option<&'a str> {
    known
        .iter()
        .map(|name| (edits(key, name), name))
        .filter(|(edits, name)| *edits <= MAX_SUGGESTION_EDITS && *edits * 2 < name.len())
        .min()
        .map(|(_, name)| name.as_str())
}

/// Levenshtein distance in bytes.
fn edits(left: &str, right: &str) -> usize {
    let right = right.as_bytes();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, byte) in left.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, other) in right.iter().enumerate() {
            let replaced = diagonal + usize::from(byte != *other);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::value;

    fn mistakes(text: &str) -> Vec<String> {
        let read = |mut top: Section, mistakes: &mut Vec<Mistake>| {
            let mut pod = top.section("pod");
            pod.take("vcpus", 1u8, |v| value::number(v, 1, 64));
            pod.take("memory_mib", 1u32, |v| value::number(v, 1, 64));
            pod.finish(mistakes);
            top.finish(mistakes);
        };
        match parse(text, Path::new("/x.toml"), read) {
            Ok(()) => Vec::new(),
            Err(ConfigError::Mistakes { mistakes, .. }) => {
                mistakes.iter().map(ToString::to_string).collect()
            }
            Err(other) => vec![other.to_string()],
        }
    }

    #[test]
    fn parse_reports_all_mistakes_at_once() {
        assert_eq!(
            mistakes("zzzzzz = 1\n[pod]\nvcpus = 0\nmemory_mib = 'x'"),
            [
                "pod.vcpus = 0: must be an integer from 1 to 64",
                "pod.memory_mib = \"x\": must be an integer from 1 to 64",
                "zzzzzz = 1: unknown key",
            ]
        );
        assert_eq!(mistakes("pod = 3"), ["pod = 3: must be a table"]);
        assert_eq!(mistakes("[pod"), ["invalid TOML in /x.toml"]);
    }

    #[test]
    fn misspelled_key_gets_a_suggestion() {
        assert_eq!(
            mistakes("[pod]\nvcpu = 1\nmemory = 2"),
            [
                "pod.vcpu = 1: unknown key, did you mean vcpus?",
                "pod.memory = 2: unknown key"
            ]
        );
    }

    #[test]
    fn load_missing_or_large_file_names_it() {
        let read = |_: Section, _: &mut Vec<Mistake>| ();
        let error = load(Path::new("/nonexistent/x.toml"), read).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/x.toml"));
        let dir = tempfile::tempdir().unwrap();
        let large = dir.path().join("large.toml");
        std::fs::File::create(&large)
            .and_then(|file| file.set_len(MAX_FILE_BYTES + 1))
            .unwrap();
        assert!(matches!(load(&large, read), Err(ConfigError::Read { .. })));
    }
}
