//! Rewrites one mount of a container's spec for the guest: [`rewrite`].
//!
//! ```text
//! bind of a file or directory   bound at m/<digest> of the share; the guest binds it from there
//! ConfigMap, Secret, projected  likewise, but the guest mounts a copy, see [`crate::share::mirror`]
//! image                         layers bound at l/, like those of a root; the guest stacks them
//! emptyDir in memory            a guest tmpfs of the same size, see [`super::memory`]
//! host tmpfs at /dev/shm        likewise: host and guest cannot share memory
//! everything else               left to the guest
//! ```
//!
//! Inspects sources but mounts nothing; [`super::create`] performs the returned binds.

use super::mapped;
use super::memory;
use super::rootfs::layer_path;
use crate::error::{Result, ShimError};
use crate::share::{Access, BindMode, mirror, mountinfo};
use boxlite_proto::names::{
    GUEST_SHARE, IDMAP_OPTION, IMAGE_MOUNT, LAYER_OPTION, MEMORY_MOUNT, MIRROR_MOUNT, MOUNT_FLAGS,
    VERSION_OPTION,
};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use oci_spec::runtime::Mount;
use sha2::{Digest, Sha256};
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Shared memory of containers: the pod's, unless a volume is mounted there.
const SHM: &str = "/dev/shm";

/// A host path to bind into the share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Host path with symbolic links resolved.
    pub source: PathBuf,
    /// Path below the share.
    pub path: String,
    /// Access and propagation of the host's bind mount.
    pub mode: BindMode,
    /// Mounts that the container makes below it are exported to the host.
    pub exported: bool,
    /// The guest mounts a copy and is informed of updates; see [`crate::share::mirror`].
    pub mirrored: bool,
}

/// Rewrites `mount` for the guest and returns the binds that it needs.
///
/// # Errors
/// HostPath with the source and the destination.
pub(crate) fn rewrite(mount: &mut Mount) -> Result<Vec<Bind>> {
    if mount.typ().as_deref() == Some(IMAGE_MOUNT) {
        return rewrite_image(mount);
    }
    let Some(request) = BindRequest::of(mount) else {
        return Ok(Vec::new());
    };
    if mount.destination() == Path::new(SHM) {
        return rewrite_shm(mount, &request);
    }
    let (source, metadata) = request.resolve()?;
    if rewrite_memory(mount, &request, &source)? {
        return Ok(Vec::new());
    }
    Ok(vec![bind(mount, &request, source, &metadata)?])
}

/// Turns a mount of a kubelet's volume in memory into a guest tmpfs. Returns false for other volumes.
fn rewrite_memory(mount: &mut Mount, request: &BindRequest, source: &Path) -> Result<bool> {
    let volume = memory::volume(source).map_err(|error| request.invalid(error.to_string()))?;
    let Some(memory::MemoryVolume { name, options }) = volume else {
        return Ok(false);
    };
    set_memory(mount, request, name, options)?;
    Ok(true)
}

fn set_memory(
    mount: &mut Mount,
    request: &BindRequest,
    name: String,
    mut options: Vec<String>,
) -> Result<()> {
    let flags = mount.options().clone().unwrap_or_default().into_iter();
    options.extend(flags.filter(|option| MOUNT_FLAGS.contains(&option.as_str())));
    if request.access != Access::Full {
        options.push("ro".to_owned());
    }
    if mapped::mapping(mount)?.is_some() {
        options.push(IDMAP_OPTION.to_owned());
    }
    mount
        .set_typ(Some(MEMORY_MOUNT.to_owned()))
        .set_source(Some(name.into()))
        .set_options(Some(options))
        .set_uid_mappings(None)
        .set_gid_mappings(None);
    Ok(())
}

/// A bind mount as its options describe it.
struct BindRequest {
    source: PathBuf,
    destination: PathBuf,
    access: Access,
    follow_host: bool,
    exported: bool,
}

impl BindRequest {
    /// Parses the mount's options; None if it is not a bind mount.
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
        let exported = is("rshared") || is("shared");
        Some(Self {
            source: mount.source().clone().unwrap_or_default(),
            destination: mount.destination().clone(),
            access,
            follow_host: is("rslave") || is("slave") || exported,
            exported,
        })
    }

    fn invalid(&self, reason: impl Into<String>) -> ShimError {
        ShimError::HostPath {
            path: self.source.clone(),
            required_by: format!("mount {}", self.destination.display()),
            reason: reason.into(),
        }
    }

    /// Returns the source with symbolic links resolved, and its metadata. It must be a file or a directory.
    fn resolve(&self) -> Result<(PathBuf, Metadata)> {
        if !self.source.is_absolute() {
            return Err(self.invalid("not an absolute path"));
        }
        let failed = |error: std::io::Error| self.invalid(error.to_string());
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
        Err(self.invalid(format!(
            "{what} cannot be mounted into a VM, only files and directories can"
        )))
    }
}

fn bind(
    mount: &mut Mount,
    request: &BindRequest,
    source: PathBuf,
    metadata: &Metadata,
) -> Result<Bind> {
    let below = mountinfo::has_mounts_below(&source).map_err(|e| request.invalid(e.to_string()))?;
    // To the guest the volume is one file system: if it were read-only there, mounts below would be read-only too. In that
    // case only the host's mount enforces read-only, which is the boundary that counts.
    let host_only = request.access == Access::ReadOnly && (below || request.follow_host);
    let options = mount.options().clone().unwrap_or_default();
    let options = options.into_iter().map(|option| match option.as_str() {
        "rro" => "ro".to_owned(),
        "ro" if host_only => "rw".to_owned(),
        _ => option,
    });
    let mut options: Vec<String> = options.collect();
    let mut flags = mountinfo::flags(&source).map_err(|e| request.invalid(e.to_string()))?;
    if !flags.is_empty() {
        // The share has these. In a user namespace the kernel rejects a remount that would drop them.
        flags.extend(["nosuid", "nodev"].map(str::to_owned));
    }
    for flag in flags {
        let host_only = flag == "ro" && (below || request.follow_host);
        if !host_only && !options.contains(&flag) {
            options.retain(|option| flag != "ro" || option != "rw");
            options.push(flag);
        }
    }
    let mode = BindMode {
        access: request.access,
        follow_host: request.follow_host,
        map: mapped::mapping(mount)?,
    };
    let path = format!("m/{}", key(&source, metadata, mode));
    let atomic =
        metadata.is_dir() && request.access != Access::Full && !request.follow_host && !below;
    let version = atomic.then(|| mirror::version(&source)).flatten();
    if let Some(version) = &version {
        options.push(format!("{VERSION_OPTION}{version}"));
        mount.set_typ(Some(MIRROR_MOUNT.to_owned()));
    }
    mount
        .set_source(Some(Path::new(GUEST_SHARE).join(&path)))
        .set_options(Some(options))
        .set_uid_mappings(None)
        .set_gid_mappings(None);
    Ok(Bind {
        source,
        path,
        mode,
        exported: request.exported,
        mirrored: version.is_some(),
    })
}

/// Returns the share name of an inode and mode, the same for all containers that mount it. Two names would be two inodes to
/// the guest, and its caches would delay changes between containers by a second.
fn key(source: &Path, metadata: &Metadata, mode: BindMode) -> String {
    let mut hash = Sha256::new();
    // Includes the inode: a volume that was recreated at the same path is another volume.
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

/// Rewrites a mount at /dev/shm: the pod's shared memory unless it is a volume. A volume in memory (an emptyDir with medium
/// Memory) becomes a tmpfs in the VM; any other volume is an ordinary bind mount.
fn rewrite_shm(mount: &mut Mount, request: &BindRequest) -> Result<Vec<Bind>> {
    if request.source == Path::new(SHM) || !request.source.exists() {
        return Ok(Vec::new());
    }
    let (source, metadata) = request.resolve()?;
    if rewrite_memory(mount, request, &source)? {
        return Ok(Vec::new());
    }
    let failed = |error: std::io::Error| request.invalid(error.to_string());
    let facts = statfs(&source).map_err(|errno| failed(errno.into()))?;
    if facts.filesystem_type() != TMPFS_MAGIC {
        return Ok(vec![bind(mount, request, source, &metadata)?]);
    }
    let name = key(&source, &metadata, BindMode::fixed(Access::Full));
    let options = memory::size_option(&source).map_err(failed)?;
    set_memory(mount, request, name, options.into_iter().collect())?;
    Ok(Vec::new())
}

/// Replaces the layer files in the options of an image volume with their share paths.
fn rewrite_image(mount: &mut Mount) -> Result<Vec<Bind>> {
    let mut binds = Vec::new();
    let mut options = mount.options().clone().unwrap_or_default();
    for option in &mut options {
        let Some(file) = option.strip_prefix(LAYER_OPTION) else {
            continue;
        };
        let source = std::fs::canonicalize(file).map_err(|error| ShimError::HostPath {
            path: file.into(),
            required_by: format!("image volume {}", mount.destination().display()),
            reason: error.to_string(),
        })?;
        let path = layer_path(&source);
        *option = format!("{LAYER_OPTION}{path}");
        binds.push(Bind {
            source,
            path,
            mode: BindMode::fixed(Access::ReadOnly),
            exported: false,
            mirrored: false,
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
        // Without flags of the file system that holds the test's directory.
        let host = |option: &&str| !matches!(*option, "noexec" | "nosuid" | "nodev");
        options.iter().map(String::as_str).filter(host).collect()
    }

    #[test]
    fn rewrite_gives_each_access_and_propagation_its_path() {
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
        let mut paths = [&full.path, &plain.path, &tree.path, &slave.path];
        paths.sort();
        assert!(paths.windows(2).all(|two| two[0] != two[1]), "{paths:?}");
        assert_eq!(options(&plain_mount), ["rbind", "ro"]);
        assert_eq!(options(&tree_mount), ["rbind", "rprivate", "ro"]);
        let (both_mount, both) = one(&["rbind", "rshared", "ro"]);
        assert_eq!(
            (both.mode, both.exported, slave.exported),
            (slave.mode, true, false)
        );
        // The agent reads the propagation from these options.
        assert_eq!(options(&both_mount), ["rbind", "rshared", "rw"]);
        // Later mounts below it may be writable, so the guest's mount must be writable.
        assert_eq!(options(&slave_mount), ["rbind", "rslave", "rw"]);
    }

    #[test]
    fn rewrite_mirrors_read_only_volumes_of_the_kubelet() {
        let dir = tempfile::tempdir().expect("tempdir");
        std::fs::create_dir(dir.path().join("..1")).expect("created");
        std::os::unix::fs::symlink("..1", dir.path().join("..data")).expect("linked");
        let one = |words: &[&str]| {
            let mut mount = mount(json!({"destination": "/v", "type": "bind",
                "source": dir.path(), "options": words}));
            let binds = rewrite(&mut mount).expect("rewritten");
            (mount, binds[0].mirrored)
        };
        let (copied, mirrored) = one(&["rbind", "rprivate", "ro"]);
        assert!(mirrored && copied.typ().as_deref() == Some(MIRROR_MOUNT));
        assert_eq!(options(&copied), ["rbind", "rprivate", "ro", "version=..1"]);
        for words in [["rbind", "rprivate", "rw"], ["rbind", "rslave", "ro"]] {
            let (plain, mirrored) = one(&words);
            assert!(
                !mirrored && plain.typ().as_deref() == Some("bind"),
                "{words:?}"
            );
        }
    }

    #[test]
    fn rewrite_image_replaces_layers_with_share_paths() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("a.erofs");
        std::fs::write(&file, "x").expect("layer");
        let layer = format!("layer={}", file.display());
        let mut image = mount(json!({"destination": "/v", "type": "boxlite.image",
            "source": "sha256:1", "options": ["ro", "subpath=etc", layer]}));
        let binds = rewrite(&mut image).expect("rewritten");
        assert_eq!(binds.len(), 1);
        assert!(binds[0].path.starts_with("l/"), "{binds:?}");
        let option = format!("layer={}", binds[0].path);
        assert_eq!(options(&image), ["ro", "subpath=etc", option.as_str()]);
        let mut gone = mount(json!({"destination": "/v", "type": "boxlite.image",
            "source": "sha256:1", "options": ["layer=/no/such/file"]}));
        let error = rewrite(&mut gone).expect_err("refused").to_string();
        assert!(error.contains("/no/such/file"), "{error}");
    }

    #[test]
    fn rewrite_shm_uses_guest_tmpfs_of_host_size() {
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
        let mut read_only = mount(json!({"destination": "/dev/shm", "type": "bind",
            "source": dir.path(), "options": ["rbind", "ro"]}));
        rewrite(&mut read_only).expect("rewritten");
        assert_eq!(options(&read_only).last(), Some(&"ro"));
    }
}
