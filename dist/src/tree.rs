//! [`read`]: the entries of an installed tree, in a fixed order and without anything that depends on the machine that staged
//! it: owners, times and permissions beyond "executable" are dropped.

use crate::error::{DistError, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// File, directory or link of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Path relative to the root, without a leading slash.
    pub path: String,
    pub kind: Kind,
}

/// Type and content of an [`Entry`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File { source: PathBuf, executable: bool },
    Link { target: PathBuf },
}

/// Reads a tree. Entries are sorted by path, so a directory precedes its content.
pub(crate) fn read(root: &Path) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    visit(root, "", &mut entries)?;
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(entries)
}

fn visit(directory: &Path, prefix: &str, entries: &mut Vec<Entry>) -> Result<()> {
    let failed = |source| DistError::Read {
        path: directory.to_owned(),
        source,
    };
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let source = entry.path();
        let name = entry.file_name().into_string().ok();
        let name = name.ok_or_else(|| DistError::File {
            path: source.display().to_string(),
            reason: "the name is not UTF-8",
        })?;
        let path = match prefix {
            "" => name,
            _ => format!("{prefix}/{name}"),
        };
        let metadata = entry.metadata().map_err(failed)?;
        let kind = if metadata.is_dir() {
            visit(&source, &path, entries)?;
            Kind::Directory
        } else if metadata.is_symlink() {
            Kind::Link {
                target: fs::read_link(&source).map_err(failed)?,
            }
        } else if metadata.is_file() {
            Kind::File {
                source,
                executable: metadata.permissions().mode() & 0o111 != 0,
            }
        } else {
            return Err(DistError::File {
                path,
                reason: "neither file, directory nor link",
            });
        };
        entries.push(Entry { path, kind });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_sorts_entries_and_keeps_only_the_executable_bit() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path();
        fs::create_dir(root.join("b")).expect("a directory");
        fs::write(root.join("b/program"), "x").expect("a file");
        fs::set_permissions(root.join("b/program"), fs::Permissions::from_mode(0o700))
            .expect("mode");
        fs::write(root.join("a"), "y").expect("a file");
        fs::set_permissions(root.join("a"), fs::Permissions::from_mode(0o600)).expect("mode");
        std::os::unix::fs::symlink("../a", root.join("b/link")).expect("a link");
        let entries = read(root).expect("entries");
        let paths: Vec<_> = entries.iter().map(|e| e.path.as_str()).collect();
        assert_eq!(paths, ["a", "b", "b/link", "b/program"]);
        let executable = |kind: &Kind| {
            matches!(
                kind,
                Kind::File {
                    executable: true,
                    ..
                }
            )
        };
        assert!(!executable(&entries[0].kind));
        assert!(executable(&entries[3].kind));
        assert_eq!(
            entries[2].kind,
            Kind::Link {
                target: "../a".into()
            }
        );
    }

    #[test]
    fn read_of_a_socket_names_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("socket");
        let _socket = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
        let error = read(dir.path()).expect_err("not packed").to_string();
        assert!(error.contains("socket"), "{error}");
    }
}
