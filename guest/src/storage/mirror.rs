//! [`VolumeMirrors`]: copies in memory of volumes that a kubelet updates atomically (ConfigMap, Secret, projected, downward API).
//!
//! inotify reports changes made through the same kernel only, so a watcher of a directory of the share would not notice the
//! host's exchange of the link `..data`. The agent copies such a volume into a tmpfs and repeats the exchange there; the host
//! requests it ([`VolumeMirrors::refresh`]). Containers of a pod share one copy, which exists until the VM ends.
//!
//! ```text
//! /run/boxlite/mirror/stage   new versions and links, before they are renamed into a copy; not visible to containers
//! /run/boxlite/mirror/<n>     a copy
//! ```
//!
//! A container with CAP_SYS_ADMIN can make its mount of a copy writable, so links in a copy are not followed. All functions
//! block.

use super::layers::below_share;
use super::{StorageError, mount_error};
use boxlite_proto::names::{ATOMIC_LINK, MIRROR_MOUNT, VERSION_OPTION, is_volume_version};
use boxlite_sys::sync::Mutex;
use nix::mount::{MsFlags, mount};
use oci_spec::runtime::Spec;
use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, File, FileTimes, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Directory of the copies.
const DIRECTORY: &str = "/run/boxlite/mirror";
/// Mount options of the tmpfs that holds all copies of the pod. The root of a user namespace resolves paths in it.
const OPTIONS: &str = "mode=711,size=64m,nr_inodes=16384";
/// Directory of unfinished versions and links below [`DIRECTORY`].
const STAGE: &str = "stage";
/// Maximum number of copies per VM.
const MAX_COPIES: usize = 64;
/// Maximum size of a volume that gets a copy. The content of a ConfigMap or Secret is at most 1 MiB.
const FIRST: Budget = Budget {
    bytes: 4 << 20,
    files: 512,
};
/// Maximum size of later versions. A copy cannot be replaced by the share while a container uses it.
const UPDATE: Budget = Budget {
    bytes: 32 << 20,
    files: 4096,
};
/// Maximum depth of directories in a version.
const MAX_DEPTH: usize = 16;
/// Time and interval of attempts to find the current version, if it is exchanged while a container is created. Longer than
/// the kernel caches a link of the share.
const FIND_TIMEOUT: Duration = Duration::from_secs(8);
const FIND_INTERVAL: Duration = Duration::from_millis(100);

/// Remaining size of a copy.
#[derive(Debug, Clone, Copy)]
struct Budget {
    bytes: u64,
    files: usize,
}

impl Budget {
    fn take_file(&mut self) -> io::Result<()> {
        let left = self.files.checked_sub(1);
        self.files = left.ok_or_else(|| io::Error::other("too many files"))?;
        Ok(())
    }
}

/// The copies of a pod.
#[derive(Debug)]
pub(crate) struct VolumeMirrors {
    root: PathBuf,
    /// Copies by their directory of the share; None until the tmpfs is mounted. Locked while one is updated.
    copies: Mutex<Option<HashMap<PathBuf, PathBuf>>>,
}

impl Default for VolumeMirrors {
    fn default() -> Self {
        Self {
            root: DIRECTORY.into(),
            copies: Mutex::default(),
        }
    }
}

impl VolumeMirrors {
    /// Replaces the mounts of type [`MIRROR_MOUNT`] in `spec` by binds of copies; by binds of the share if a volume is too
    /// large to be copied.
    pub(crate) fn replace(&self, spec: &mut Spec) {
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for mount in &mut mounts {
            if mount.typ().as_deref() != Some(MIRROR_MOUNT) {
                continue;
            }
            let mut options = mount.options().clone().unwrap_or_default();
            let version = options.iter().find_map(|o| o.strip_prefix(VERSION_OPTION));
            let version = version.unwrap_or_default().to_owned();
            options.retain(|option| !option.starts_with(VERSION_OPTION));
            let source = mount.source().clone().unwrap_or_default();
            match self.open(&source, version) {
                Ok(copy) => {
                    mount.set_source(Some(copy));
                }
                Err(error) => {
                    let mount = mount.destination().display().to_string();
                    tracing::warn!(mount, %error, "failed to copy volume, watchers will get no events");
                }
            }
            mount
                .set_typ(Some("bind".to_owned()))
                .set_options(Some(options));
        }
        spec.set_mounts(Some(mounts));
    }

    /// Updates the copy of the directory `volume` of the share, whose link `..data` points to `version`. Returns false if
    /// there is no copy.
    ///
    /// # Errors
    /// If `volume` leaves the share, or the version cannot be copied; the copy keeps the previous version then.
    pub(crate) fn refresh(&self, volume: &str, version: &str) -> Result<bool, StorageError> {
        let source = below_share(volume)?;
        let copies = self.copies.lock();
        let Some(copy) = copies.as_ref().and_then(|copies| copies.get(&source)) else {
            return Ok(false);
        };
        self.sync(&source, copy, version, UPDATE)
            .map_err(StorageError::path("copy", source.join(version)))?;
        Ok(true)
    }

    /// Returns the copy of `source`, updated to `version` or a later one.
    fn open(&self, source: &Path, mut version: String) -> Result<PathBuf, StorageError> {
        let mut copies = self.copies.lock();
        if copies.is_none() {
            mount_tmpfs(&self.root)?;
        }
        let copies = copies.get_or_insert_default();
        let (copy, budget) = match copies.get(source) {
            Some(copy) => (copy.clone(), UPDATE),
            None if copies.len() >= MAX_COPIES => {
                let error = io::Error::other(format!("more than {MAX_COPIES} volumes"));
                return Err(StorageError::path("copy", source)(error));
            }
            None => (self.root.join(copies.len().to_string()), FIRST),
        };
        let start = Instant::now();
        loop {
            match self.sync(source, &copy, &version, budget) {
                Ok(()) => break,
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound
                        && start.elapsed() < FIND_TIMEOUT =>
                {
                    std::thread::sleep(FIND_INTERVAL);
                    if let Ok(target) = fs::read_link(source.join(ATOMIC_LINK)) {
                        version = target.to_string_lossy().into_owned();
                    }
                }
                Err(error) => {
                    if !copies.contains_key(source) {
                        let _ = fs::remove_dir_all(&copy);
                    }
                    return Err(StorageError::path("copy", source)(error));
                }
            }
        }
        copies.insert(source.to_owned(), copy.clone());
        Ok(copy)
    }

    /// Makes `copy` equal to `source` at `version`, in the kubelet's order: version, `..data`, links to new files, removal.
    fn sync(
        &self,
        source: &Path,
        copy: &Path,
        version: &str,
        mut budget: Budget,
    ) -> io::Result<()> {
        if !is_volume_version(version) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let stage = self.root.join(STAGE);
        match fs::remove_dir_all(&stage) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::create_dir(&stage)?;
        let target = copy.join(version);
        let present = fs::symlink_metadata(&target).ok();
        if !present.as_ref().is_some_and(Metadata::is_dir) {
            if present.is_some() {
                fs::remove_file(&target)?;
            }
            let staged = stage.join("version");
            copy_tree(&source.join(version), &staged, &mut budget, MAX_DEPTH)?;
            match fs::create_dir(copy) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            fs::rename(&staged, &target)?;
        }
        let facts = fs::metadata(source)?;
        let own = fs::metadata(copy)?;
        let attributes = |facts: &Metadata| (facts.mode(), facts.uid(), facts.gid());
        // Otherwise watchers would get an event for each refresh.
        if attributes(&own) != attributes(&facts) {
            chown(copy, Some(facts.uid()), Some(facts.gid()))?;
            fs::set_permissions(copy, fs::Permissions::from_mode(facts.mode() & 0o7777))?;
        }
        link(&stage, Path::new(version), &copy.join(ATOMIC_LINK), &facts)?;
        let mut kept = HashSet::from([OsString::from(version), OsString::from(ATOMIC_LINK)]);
        for entry in fs::read_dir(source)? {
            let entry = entry?;
            let name = entry.file_name();
            // Versions, and the link under its temporary name.
            if name.as_bytes().starts_with(b"..") {
                continue;
            }
            budget.take_file()?;
            let facts = fs::symlink_metadata(entry.path())?;
            link(
                &stage,
                &fs::read_link(entry.path())?,
                &copy.join(&name),
                &facts,
            )?;
            kept.insert(name);
        }
        for entry in fs::read_dir(copy)? {
            let entry = entry?;
            if kept.contains(&entry.file_name()) {
                continue;
            }
            match entry.file_type()?.is_dir() {
                true => fs::remove_dir_all(entry.path())?,
                false => fs::remove_file(entry.path())?,
            }
        }
        Ok(())
    }
}

fn mount_tmpfs(target: &Path) -> Result<(), StorageError> {
    fs::create_dir_all(target).map_err(StorageError::path("create directory", target))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let kind = Some("tmpfs");
    mount(kind, target, kind, flags, Some(OPTIONS))
        .map_err(|errno| mount_error("tmpfs", "mirror", &target.display().to_string(), errno))
}

/// Creates or atomically replaces the link at `path`. An equal link is not touched, so that watchers get no event.
fn link(stage: &Path, target: &Path, path: &Path, owner: &Metadata) -> io::Result<()> {
    if fs::read_link(path).is_ok_and(|present| present == target) {
        return Ok(());
    }
    let staged = stage.join("link");
    symlink(target, &staged)?;
    lchown(&staged, Some(owner.uid()), Some(owner.gid()))?;
    fs::rename(&staged, path)
}

/// Copies a tree of directories, regular files and links with owners, modes and modification times.
fn copy_tree(from: &Path, to: &Path, budget: &mut Budget, depth: usize) -> io::Result<()> {
    budget.take_file()?;
    let facts = fs::symlink_metadata(from)?;
    let kind = facts.file_type();
    if kind.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
        return lchown(to, Some(facts.uid()), Some(facts.gid()));
    }
    if kind.is_dir() {
        let depth = depth.checked_sub(1);
        let depth = depth.ok_or_else(|| io::Error::other("directories are nested too deeply"))?;
        fs::create_dir(to)?;
        for entry in fs::read_dir(from)? {
            let name = entry?.file_name();
            copy_tree(&from.join(&name), &to.join(&name), budget, depth)?;
        }
    } else if kind.is_file() {
        let mut content = Vec::new();
        File::open(from)?
            .take(budget.bytes + 1)
            .read_to_end(&mut content)?;
        let left = budget.bytes.checked_sub(content.len() as u64);
        budget.bytes = left.ok_or_else(|| io::Error::other("too many bytes"))?;
        File::create_new(to)?.write_all(&content)?;
    } else {
        return Err(io::Error::other("neither a file, a directory nor a link"));
    }
    File::open(to)?.set_times(FileTimes::new().set_modified(facts.modified()?))?;
    chown(to, Some(facts.uid()), Some(facts.gid()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(facts.mode() & 0o7777))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Volume {
        source: tempfile::TempDir,
        root: tempfile::TempDir,
        mirrors: VolumeMirrors,
    }

    impl Volume {
        fn new() -> Self {
            let (source, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let mirrors = VolumeMirrors {
                root: root.path().to_owned(),
                copies: Mutex::new(Some(HashMap::new())),
            };
            let volume = Self {
                source,
                root,
                mirrors,
            };
            volume.write("..1", &[("key", "one")]);
            volume
        }

        /// Writes a version as the kubelet does.
        fn write(&self, version: &str, files: &[(&str, &str)]) {
            let at = self.source.path();
            fs::create_dir(at.join(version)).unwrap();
            for (name, content) in files {
                fs::write(at.join(version).join(name), content).unwrap();
                let _ = symlink(Path::new("..data").join(name), at.join(name));
            }
            symlink(version, at.join("..data_tmp")).unwrap();
            fs::rename(at.join("..data_tmp"), at.join("..data")).unwrap();
        }

        fn open(&self, version: &str) -> Result<PathBuf, StorageError> {
            self.mirrors.open(self.source.path(), version.to_owned())
        }

        fn names(&self, copy: &Path) -> Vec<String> {
            let entries = fs::read_dir(copy).unwrap();
            let mut names: Vec<_> = entries
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }
    }

    #[test]
    fn open_follows_versions_and_keeps_one_copy() {
        let volume = Volume::new();
        let copy = volume.open("..1").unwrap();
        let key = copy.join("key");
        assert_eq!(fs::read_to_string(&key).unwrap(), "one");
        let mode = fs::Permissions::from_mode(0o640);
        volume.write("..2", &[("key", "two"), ("new", "x")]);
        fs::set_permissions(volume.source.path().join("..2/key"), mode).unwrap();
        fs::remove_dir_all(volume.source.path().join("..1")).unwrap();
        assert_eq!(volume.open("..2").unwrap(), copy);
        assert_eq!(fs::read_to_string(&key).unwrap(), "two");
        assert_eq!(fs::metadata(&key).unwrap().mode() & 0o777, 0o640);
        assert_eq!(volume.names(&copy), ["..2", "..data", "key", "new"]);
        fs::remove_file(volume.source.path().join("new")).unwrap();
        volume.open("..2").unwrap();
        assert_eq!(volume.names(&copy), ["..2", "..data", "key"]);
    }

    #[test]
    fn open_finds_the_version_that_replaced_a_missing_one() {
        let volume = Volume::new();
        let copy = volume.open("..0").unwrap();
        assert_eq!(fs::read_to_string(copy.join("key")).unwrap(), "one");
    }

    #[test]
    fn open_of_a_large_or_odd_volume_fails_and_leaves_nothing() {
        let volume = Volume::new();
        let big = "x".repeat(usize::try_from(FIRST.bytes).unwrap() + 1);
        volume.write("..2", &[("big", &big)]);
        let error = volume.open("..2").unwrap_err();
        assert!(format!("{}", boxlite_sys::report::Report(&error)).contains("too many bytes"));
        fs::write(volume.source.path().join("plain"), "").unwrap();
        assert!(volume.open("..1").is_err());
        assert_eq!(volume.names(volume.root.path()), ["stage"]);
        for version in ["..", "v", "..a/b", "../x", "", "/etc"] {
            assert!(!is_volume_version(version), "{version}");
        }
    }

    #[test]
    fn sync_replaces_links_that_a_container_planted() {
        let volume = Volume::new();
        let copy = volume.open("..1").unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("kept"), "").unwrap();
        symlink(outside.path(), copy.join("..2")).unwrap();
        symlink(outside.path(), copy.join("..3")).unwrap();
        fs::remove_file(copy.join("key")).unwrap();
        symlink(outside.path(), copy.join("key")).unwrap();
        symlink(outside.path(), copy.join("planted")).unwrap();
        volume.write("..3", &[("key", "three")]);
        volume.open("..3").unwrap();
        assert_eq!(volume.names(&copy), ["..3", "..data", "key"]);
        assert_eq!(volume.names(outside.path()), ["kept"]);
        assert_eq!(fs::read_to_string(copy.join("key")).unwrap(), "three");
    }
}
