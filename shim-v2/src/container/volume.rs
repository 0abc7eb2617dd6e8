//! One mount of a container's spec, on its way from the host's words to the guest's: [`rewrite`].
//!
//! ```text
//! bind of a file or directory   bound at m/<inode> of the share, the guest binds it from there
//! image                         its layers bound at l/, as those of a root; the guest stacks them
//! tmpfs of the host at /dev/shm a tmpfs of the guest with the same size: shared memory cannot be shared through a VM's wall
//! everything else               the guest's own affair
//! ```
//!
//! It looks at sources and mounts nothing: [`super::create`] does, with what this returns.

use super::mapped;
use super::rootfs::layer_path;
use crate::error::{Result, ShimError};
use crate::share::{Access, BindMode, mountinfo};
use boxlite_proto::names::{GUEST_SHARE, IMAGE_MOUNT, LAYER_OPTION, MEMORY_MOUNT};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use oci_spec::runtime::Mount;
use sha2::{Digest, Sha256};
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Where containers find shared memory: the pod's own, unless a volume is mounted there.
const SHM: &str = "/dev/shm";

/// A host path that must appear in the share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// On the host, symbolic links resolved.
    pub source: PathBuf,
    /// Below the share.
    pub path: String,
    /// Who may write, and whether later mounts follow; the host's side of what the spec's mount says.
    pub mode: BindMode,
    /// Mounts that the container makes below it are shown on the host.
    pub shown: bool,
}

/// Makes the mount the guest's; answers what it needs of the host.
///
/// # Errors
/// HostPath, naming the path and the mount that wants it.
pub fn rewrite(mount: &mut Mount) -> Result<Vec<Bind>> {
    if mount.typ().as_deref() == Some(IMAGE_MOUNT) {
        return layers(mount);
    }
    let Some(wish) = Wish::of(mount) else {
        return Ok(Vec::new());
    };
    if mount.destination() == Path::new(SHM) {
        return shared_memory(mount, &wish);
    }
    let (source, metadata) = wish.look()?;
    Ok(vec![bind(mount, &wish, source, &metadata)?])
}

/// What the options of a bind mount ask for.
struct Wish {
    source: PathBuf,
    destination: PathBuf,
    access: Access,
    follow_host: bool,
    shown: bool,
}

impl Wish {
    /// None for what is no bind mount.
    fn of(mount: &Mount) -> Option<Self> {
        let options = mount.options().as_deref().unwrap_or_default();
        let is = |name: &str| options.iter().any(|option| option == name);
        if mount.typ().as_deref() != Some("bind") && !is("bind") && !is("rbind") {
            return None;
        }
        let access = match () {
            () if is("rro") => Access::ReadOnlyTree,
            () if is("ro") => Access::ReadOnly,
            () => Access::Full,
        };
        let shown = is("rshared") || is("shared");
        Some(Self {
            source: mount.source().clone().unwrap_or_default(),
            destination: mount.destination().clone(),
            access,
            follow_host: is("rslave") || is("slave") || shown,
            shown,
        })
    }

    fn refuse(&self, reason: impl Into<String>) -> ShimError {
        ShimError::HostPath {
            path: self.source.clone(),
            wanted_for: format!("mount {}", self.destination.display()),
            reason: reason.into(),
        }
    }

    /// The source with its links resolved, and what it is: a file or a directory.
    fn look(&self) -> Result<(PathBuf, Metadata)> {
        if !self.source.is_absolute() {
            return Err(self.refuse("not absolute"));
        }
        let failed = |error: std::io::Error| self.refuse(error.to_string());
        let source = std::fs::canonicalize(&self.source).map_err(failed)?;
        let metadata = std::fs::metadata(&source).map_err(failed)?;
        let kind = metadata.file_type();
        if kind.is_dir() || kind.is_file() {
            return Ok((source, metadata));
        }
        let what = match () {
            () if kind.is_socket() => "a socket",
            () if kind.is_fifo() => "a FIFO",
            () if kind.is_char_device() || kind.is_block_device() => "a device",
            () => "neither a file nor a directory",
        };
        Err(self.refuse(format!(
            "it is {what}, and only files and directories reach into a VM"
        )))
    }
}

fn bind(mount: &mut Mount, wish: &Wish, source: PathBuf, metadata: &Metadata) -> Result<Bind> {
    let below = mountinfo::has_mounts_below(&source).map_err(|e| wish.refuse(e.to_string()))?;
    // To the guest the volume is one file system: read-only there, the mounts below would be so too. Then the host alone
    // keeps the guest from writing, which is the wall that counts anyway.
    let host_only = wish.access == Access::ReadOnly && (below || wish.follow_host);
    let options = mount.options().clone().unwrap_or_default();
    let options = options.into_iter().map(|option| match option.as_str() {
        "rro" => "ro".to_owned(),
        "ro" if host_only => "rw".to_owned(),
        _ => option,
    });
    let options = options.collect();
    let mode = BindMode {
        access: wish.access,
        follow_host: wish.follow_host,
        map: mapped::mapping(mount)?,
    };
    let path = format!("m/{}", key(&source, metadata, mode));
    mount
        .set_source(Some(Path::new(GUEST_SHARE).join(&path)))
        .set_options(Some(options))
        .set_uid_mappings(None)
        .set_gid_mappings(None);
    Ok(Bind {
        source,
        path,
        mode,
        shown: wish.shown,
    })
}

/// One place for one inode and mode, however many containers mount it. Two places would be two inodes to the guest, and its
/// caches would show one container's changes to the other a second late.
fn key(source: &Path, metadata: &Metadata, mode: BindMode) -> String {
    let mut hash = Sha256::new();
    // The inode too: a volume that was made anew under its old path is another one.
    let access = match mode.access {
        Access::Full => 0,
        Access::ReadOnly => 1,
        Access::ReadOnlyTree => 2,
    };
    let facts = [
        metadata.dev(),
        metadata.ino(),
        access,
        u64::from(mode.follow_host),
        mode.map.map_or(0, |map| u64::from(map.first)),
        mode.map.map_or(0, |map| u64::from(map.length)),
    ];
    for number in facts {
        hash.update(number.to_le_bytes());
    }
    hash.update(source.as_os_str().as_encoded_bytes());
    hex::encode(hash.finalize())
}

/// /dev/shm: the pod's own, unless it is a volume. One in memory (an emptyDir with medium Memory) becomes memory of the VM,
/// since that is where it is shared; any other is as it would be elsewhere.
fn shared_memory(mount: &mut Mount, wish: &Wish) -> Result<Vec<Bind>> {
    if wish.source == Path::new(SHM) || !wish.source.exists() {
        return Ok(Vec::new());
    }
    let (source, metadata) = wish.look()?;
    let facts = statfs(&source).map_err(|errno| wish.refuse(errno.to_string()))?;
    if facts.filesystem_type() != TMPFS_MAGIC {
        return Ok(vec![bind(mount, wish, source, &metadata)?]);
    }
    let size = facts.blocks() * facts.block_size().cast_unsigned();
    let name = key(&source, &metadata, BindMode::fixed(Access::Full));
    mount
        .set_typ(Some(MEMORY_MOUNT.to_owned()))
        .set_source(Some(name.into()))
        .set_options(Some(vec![format!("size={size}")]));
    Ok(Vec::new())
}

/// The layers of an image volume: each has its place in the share, and the option names that.
fn layers(mount: &mut Mount) -> Result<Vec<Bind>> {
    let mut binds = Vec::new();
    let mut options = mount.options().clone().unwrap_or_default();
    for option in &mut options {
        let Some(file) = option.strip_prefix(LAYER_OPTION) else {
            continue;
        };
        let source = std::fs::canonicalize(file).map_err(|error| ShimError::HostPath {
            path: file.into(),
            wanted_for: format!("image volume {}", mount.destination().display()),
            reason: error.to_string(),
        })?;
        let path = layer_path(&source);
        *option = format!("{LAYER_OPTION}{path}");
        binds.push(Bind {
            source,
            path,
            mode: BindMode::fixed(Access::ReadOnly),
            shown: false,
        });
    }
    mount.set_options(Some(options));
    Ok(binds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn mount(value: serde_json::Value) -> Mount {
        serde_json::from_value(value).expect("a mount")
    }

    fn options(mount: &Mount) -> Vec<&str> {
        let options = mount.options().as_deref().unwrap_or_default();
        options.iter().map(String::as_str).collect()
    }

    #[test]
    fn each_access_and_propagation_has_a_place_of_its_own() {
        let dir = tempfile::tempdir().expect("tempdir");
        let one = |words: &[&str]| {
            let mut mount = mount(json!({"destination": "/v", "type": "bind",
                "source": dir.path(), "options": words}));
            let binds = rewrite(&mut mount).expect("rewritten");
            (mount, binds[0].clone())
        };
        let (_, full) = one(&["rbind", "rw"]);
        let (plain_mount, plain) = one(&["rbind", "ro"]);
        let (tree_mount, tree) = one(&["rbind", "rprivate", "rro"]);
        let (slave_mount, slave) = one(&["rbind", "rslave", "ro"]);
        assert_eq!(full.mode, BindMode::fixed(Access::Full));
        assert_eq!(plain.mode, BindMode::fixed(Access::ReadOnly));
        assert_eq!(tree.mode, BindMode::fixed(Access::ReadOnlyTree));
        assert!(slave.mode.follow_host && slave.mode.access == Access::ReadOnly);
        let mut places = [&full.path, &plain.path, &tree.path, &slave.path];
        places.sort();
        assert!(places.windows(2).all(|two| two[0] != two[1]), "{places:?}");
        assert_eq!(options(&plain_mount), ["rbind", "ro"]);
        assert_eq!(options(&tree_mount), ["rbind", "rprivate", "ro"]);
        let (both_mount, both) = one(&["rbind", "rshared", "ro"]);
        assert_eq!(
            (both.mode, both.shown, slave.shown),
            (slave.mode, true, false)
        );
        // The agent takes it from there.
        assert_eq!(options(&both_mount), ["rbind", "rshared", "rw"]);
        // Later mounts below it may be written, so the guest's own mount must be writable.
        assert_eq!(options(&slave_mount), ["rbind", "rslave", "rw"]);
    }

    #[test]
    fn image_layers_get_their_places() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("a.erofs");
        std::fs::write(&file, "x").expect("layer");
        let layer = format!("layer={}", file.display());
        let mut image = mount(json!({"destination": "/v", "type": "boxlite.image",
            "source": "sha256:1", "options": ["ro", "subpath=etc", layer]}));
        let binds = rewrite(&mut image).expect("rewritten");
        assert_eq!(binds.len(), 1);
        assert!(binds[0].path.starts_with("l/"), "{binds:?}");
        let place = format!("layer={}", binds[0].path);
        assert_eq!(options(&image), ["ro", "subpath=etc", place.as_str()]);
        let mut gone = mount(json!({"destination": "/v", "type": "boxlite.image",
            "source": "sha256:1", "options": ["layer=/no/such/file"]}));
        let error = rewrite(&mut gone).expect_err("refused").to_string();
        assert!(error.contains("/no/such/file"), "{error}");
    }

    #[test]
    fn memory_at_dev_shm_is_the_guests_with_the_hosts_size() {
        let size = |path: &str| {
            let facts = statfs(path).expect("statfs");
            facts.blocks() * facts.block_size().cast_unsigned()
        };
        let shm = |source: &str| {
            let mut mount = mount(json!({"destination": "/dev/shm", "type": "bind",
                "source": source, "options": ["rbind", "rw"]}));
            let binds = rewrite(&mut mount).expect("rewritten");
            (mount, binds)
        };
        let (own, binds) = shm("/dev/shm");
        assert_eq!((own.typ().as_deref(), binds.len()), (Some("bind"), 0));
        let dir = tempfile::tempdir_in("/dev/shm").expect("a tmpfs");
        let (memory, binds) = shm(dir.path().to_str().expect("text"));
        assert_eq!(
            (memory.typ().as_deref(), binds.len()),
            (Some(MEMORY_MOUNT), 0)
        );
        assert_eq!(options(&memory), [format!("size={}", size("/dev/shm"))]);
    }
}
