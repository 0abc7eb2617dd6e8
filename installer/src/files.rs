//! The files on the node: programs below the prefix, and the drop-in. [`Manifest`] lists them, so that an upgrade removes
//! obsolete files and an uninstallation all of them.
//!
//! Replaces by rename: processes of running pods keep the files that they have opened.

use crate::error::{FileContext, Result};
use crate::runtime::below;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Name of the manifest below the prefix.
const MANIFEST: &str = "manifest.json";
/// Suffix of a file that is being written.
const NEW: &str = ".boxlite-new";

/// Installed files, by path relative to the prefix, with their SHA-256.
#[derive(Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct Manifest {
    files: BTreeMap<PathBuf, String>,
}

impl Manifest {
    /// Reads the manifest of a prefix; empty if nothing is installed.
    pub(crate) fn read(prefix: &Path) -> Result<Self> {
        let path = prefix.join(MANIFEST);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(io::Error::other)
                .file("parse", path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).file("read", path),
        }
    }

    fn write(&self, prefix: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::other);
        let path = prefix.join(MANIFEST);
        replace(&path, &text.file("format", &path)?, 0o644)
    }
}

/// Installs the payload and a configuration below `prefix`. Returns the number of changed files.
pub(crate) fn install(payload: &Path, prefix: &Path, config: &str) -> Result<usize> {
    let former = Manifest::read(prefix)?;
    let mut wanted = Vec::new();
    list(payload, Path::new(""), &mut wanted)?;
    let mut manifest = Manifest::default();
    let mut contents = vec![(
        PathBuf::from("etc/shim.toml"),
        config.as_bytes().to_vec(),
        0o644,
    )];
    for file in wanted {
        let source = payload.join(&file);
        let content = fs::read(&source).file("read", &source)?;
        let mode = fs::metadata(&source)
            .file("read", &source)?
            .permissions()
            .mode();
        let mode = if mode & 0o111 == 0 { 0o644 } else { 0o755 };
        contents.push((file, content, mode));
    }
    // The new manifest covers both versions until the obsolete files are removed.
    for (file, content, _) in &contents {
        manifest
            .files
            .insert(file.clone(), hex::encode(Sha256::digest(content)));
    }
    let obsolete: Vec<_> = former
        .files
        .keys()
        .filter(|file| !manifest.files.contains_key(*file))
        .cloned()
        .collect();
    let mut both = Manifest {
        files: former.files.clone(),
    };
    both.files.extend(manifest.files.clone());
    fs::create_dir_all(prefix).file("create", prefix)?;
    both.write(prefix)?;
    let mut changed = 0;
    for (file, content, mode) in contents {
        let path = prefix.join(&file);
        let same = former.files.get(&file) == manifest.files.get(&file);
        if !(same && path.exists()) {
            replace(&path, &content, mode)?;
            changed += 1;
        }
    }
    for file in obsolete {
        remove_file(&prefix.join(file))?;
        changed += 1;
    }
    manifest.write(prefix)?;
    Ok(changed)
}

/// Removes the prefix with everything in it: programs, manifest, configuration and the shim's cache.
pub(crate) fn remove(prefix: &Path) -> Result<()> {
    match fs::remove_dir_all(prefix) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).file("remove", prefix),
        _ => Ok(()),
    }
}

/// Deletes the shims' registries, which are empty files whose bytes they lock, and their directory. Nothing is deleted if the
/// directory has anything else: boxlite-cri uses it, too.
pub(crate) fn remove_registries(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).file("read", dir),
    };
    let mut registries = Vec::new();
    for entry in entries {
        let entry = entry.file("read", dir)?;
        let metadata = entry.metadata().file("read", entry.path())?;
        if !metadata.is_file() || metadata.len() > 0 {
            return Ok(());
        }
        registries.push(entry.path());
    }
    for path in registries {
        remove_file(&path)?;
    }
    fs::remove_dir(dir).file("remove", dir)
}

/// Writes a drop-in and the directories above it. Returns the former text if it was different, and the created directories.
pub(crate) fn write_drop_in(path: &Path, text: &str) -> Result<DropIn> {
    let former = match fs::read_to_string(path) {
        Ok(former) => Some(former),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).file("read", path),
    };
    let changed = former.as_deref() != Some(text);
    if changed {
        replace(path, text.as_bytes(), 0o644)?;
    }
    Ok(DropIn {
        path: path.to_owned(),
        former,
        changed,
    })
}

/// A written drop-in.
pub(crate) struct DropIn {
    path: PathBuf,
    former: Option<String>,
    /// Whether the text is new.
    pub changed: bool,
}

impl DropIn {
    /// Restores the former state.
    pub(crate) fn undo(self) -> Result<()> {
        match self.former {
            Some(former) => replace(&self.path, former.as_bytes(), 0o644),
            None => remove_drop_in(&self.path).map(drop),
        }
    }
}

/// Removes a drop-in, and its directory if that is empty and named like one for drop-ins. Returns whether it existed.
pub(crate) fn remove_drop_in(path: &Path) -> Result<bool> {
    let existed = remove_file(path)?;
    if existed && let Some(dir) = path.parent() {
        // Fails if other drop-ins are in it.
        let _ = fs::remove_dir(dir);
    }
    Ok(existed)
}

/// Returns whether a process of the node runs the shim below this prefix, by the node's /proc.
pub(crate) fn running_shims(root: &Path, prefix: &Path) -> Result<Vec<u32>> {
    let shim = prefix.join("bin/containerd-shim-boxlite-v2");
    let proc = below(root, "/proc");
    let mut pids = Vec::new();
    for entry in fs::read_dir(&proc).file("read", &proc)?.flatten() {
        let pid = entry.file_name().to_string_lossy().parse();
        // Processes that end are skipped. A replaced executable has a suffix.
        if let (Ok(pid), Ok(exe)) = (pid, fs::read_link(entry.path().join("exe"))) {
            let text = exe.to_string_lossy();
            if Path::new(text.trim_end_matches(" (deleted)")).starts_with(&shim) {
                pids.push(pid);
            }
        }
    }
    Ok(pids)
}

fn list(root: &Path, dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let path = root.join(dir);
    for entry in fs::read_dir(&path).file("read", &path)? {
        let entry = entry.file("read", &path)?;
        let relative = dir.join(entry.file_name());
        if entry.file_type().file("read", entry.path())?.is_dir() {
            list(root, &relative, found)?;
        } else {
            found.push(relative);
        }
    }
    Ok(())
}

fn replace(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).file("create", parent)?;
    }
    let mut new = path.as_os_str().to_owned();
    new.push(NEW);
    let new = PathBuf::from(new);
    fs::write(&new, content).file("write", &new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(mode)).file("write", &new)?;
    let file = fs::File::open(&new).file("open", &new)?;
    file.sync_all().file("sync", &new)?;
    fs::rename(&new, path).file("replace", path)
}

fn remove_file(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).file("remove", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(dir: &Path, files: &[(&str, &str)]) -> PathBuf {
        let root = dir.join("payload");
        let _ = fs::remove_dir_all(&root);
        for (file, content) in files {
            let path = root.join(file);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(&path, content).expect("a file");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("a mode");
        }
        root
    }

    #[test]
    fn registries_are_removed_unless_a_daemon_uses_the_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = dir.path().join("run/boxlite");
        remove_registries(&state).expect("nothing to remove");
        fs::create_dir_all(state.join("s")).expect("a directory");
        fs::write(state.join("vmm-users"), "").expect("a file");
        remove_registries(&state).expect("nothing removed");
        assert!(state.join("vmm-users").exists() && state.join("s").exists());
        fs::remove_dir(state.join("s")).expect("removed");
        remove_registries(&state).expect("removed");
        assert!(!state.exists());
    }

    #[test]
    fn install_of_a_new_version_removes_obsolete_files() {
        let dir = tempfile::tempdir().expect("a directory");
        let prefix = dir.path().join("opt/boxlite");
        let old = payload(dir.path(), &[("bin/shim", "1"), ("lib/old", "x")]);
        assert_eq!(install(&old, &prefix, "a = 1\n").expect("installed"), 3);
        assert_eq!(install(&old, &prefix, "a = 1\n").expect("unchanged"), 0);
        let mode = fs::metadata(prefix.join("bin/shim"))
            .expect("a file")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o755);
        let new = payload(dir.path(), &[("bin/shim", "2")]);
        assert_eq!(install(&new, &prefix, "a = 1\n").expect("upgraded"), 2);
        assert_eq!(
            fs::read_to_string(prefix.join("bin/shim")).expect("a file"),
            "2"
        );
        assert!(!prefix.join("lib/old").exists());
        remove(&prefix).expect("removed");
        remove(&prefix).expect("removed again");
        assert!(!prefix.exists());
    }

    #[test]
    fn install_keeps_open_files_of_running_pods() {
        let dir = tempfile::tempdir().expect("a directory");
        let prefix = dir.path().join("opt/boxlite");
        install(&payload(dir.path(), &[("bin/shim", "1")]), &prefix, "").expect("installed");
        let mut open = fs::File::open(prefix.join("bin/shim")).expect("a file");
        install(&payload(dir.path(), &[("bin/shim", "2")]), &prefix, "").expect("upgraded");
        let mut text = String::new();
        io::Read::read_to_string(&mut open, &mut text).expect("text");
        assert_eq!(text, "1");
    }

    #[test]
    fn install_restores_a_missing_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let prefix = dir.path().join("opt/boxlite");
        let payload = payload(dir.path(), &[("bin/shim", "1")]);
        install(&payload, &prefix, "").expect("installed");
        fs::remove_file(prefix.join("bin/shim")).expect("removed");
        assert_eq!(install(&payload, &prefix, "").expect("repaired"), 1);
    }

    #[test]
    fn drop_in_undo_restores_the_former_text() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("conf.d/boxlite.toml");
        write_drop_in(&path, "a")
            .expect("written")
            .undo()
            .expect("undone");
        assert!(!path.exists() && !dir.path().join("conf.d").exists());
        assert!(write_drop_in(&path, "a").expect("written").changed);
        assert!(!write_drop_in(&path, "a").expect("written").changed);
        write_drop_in(&path, "b")
            .expect("written")
            .undo()
            .expect("undone");
        assert_eq!(fs::read_to_string(&path).expect("a file"), "a");
        fs::write(dir.path().join("conf.d/other.toml"), "").expect("a file");
        assert!(remove_drop_in(&path).expect("removed"));
        assert!(!remove_drop_in(&path).expect("removed again"));
        assert!(dir.path().join("conf.d/other.toml").exists());
    }

    #[test]
    fn running_shims_are_found_by_executable() {
        let dir = tempfile::tempdir().expect("a directory");
        for (pid, exe) in [
            ("10", "/opt/boxlite/bin/containerd-shim-boxlite-v2"),
            (
                "11",
                "/opt/boxlite/bin/containerd-shim-boxlite-v2 (deleted)",
            ),
            ("12", "/usr/bin/containerd-shim-boxlite-v2"),
            ("self", "/opt/boxlite/bin/containerd-shim-boxlite-v2"),
        ] {
            let process = dir.path().join("proc").join(pid);
            fs::create_dir_all(&process).expect("a directory");
            std::os::unix::fs::symlink(exe, process.join("exe")).expect("a link");
        }
        let mut pids = running_shims(dir.path(), "/opt/boxlite".as_ref()).expect("pids");
        pids.sort_unstable();
        assert_eq!(pids, [10, 11]);
    }
}
