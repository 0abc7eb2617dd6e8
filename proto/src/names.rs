//! Ports, tags, guest paths and file names shared by several processes.
//!
//! Only the last components of host paths are defined here; FilesystemLayout builds the paths.

/// vsock port on which the agent serves gRPC. The host connects.
pub const GUEST_PORT: u32 = 2695;
/// vsock port of the host to which the agent connects once it is ready. The payload is ignored; one connection is
/// accepted.
pub const READY_PORT: u32 = 2696;
/// Tag of the one virtiofs share.
pub const SHARE_TAG: &str = "share";
/// Returns the file name of a sandbox's scratch disk in `scratch_dir`.
pub fn scratch_file(sandbox: &str) -> String {
    format!("{sandbox}{SCRATCH_SUFFIX}")
}

/// Suffix of the files in `scratch_dir`.
pub const SCRATCH_SUFFIX: &str = ".img";
/// Serial of the scratch disk's virtio-blk device (`/sys/block/*/serial`).
pub const SCRATCH_SERIAL: &str = "scratch";

/// Mount point of the share in the guest.
pub const GUEST_SHARE: &str = "/run/boxlite/share";
/// Mount point of the scratch disk in the guest.
pub const GUEST_SCRATCH: &str = "/run/boxlite/scratch";

/// Unix socket to the guest, in the VM's working directory. Krun: a connection reaches [`GUEST_PORT`] directly. Qemu:
/// hybrid vsock, the client first writes `CONNECT 2695\n` and reads `OK <port>\n`.
pub const VSOCK_SOCKET: &str = "vsock";
/// Unix socket on which the shim accepts the ready call on both VMMs, in the VM's working directory.
pub const READY_SOCKET: &str = "vsock_2696";
/// Maximum bytes of a line in one record of a container's log; a longer one is split. As in containerd and CRI-O.
pub const MAX_LOG_LINE_BYTES: usize = 16 << 10;

/// State of a shim that outlives its process, in the bundle. The shim removes it last, if it ends in order.
pub const SHIM_STATE: &str = "shim.json";

/// Output of the guest's console, in the VM's working directory.
pub const CONSOLE_LOG: &str = "console.log";

/// The shim's own log, in its bundle.
pub const SHIM_LOG: &str = "shim.log";

/// The part of the shim's log before the last time it was full.
pub const OLD_SHIM_LOG: &str = "shim.log.1";

/// File in the state directory by which the shims of a node notice directories that several pods write to.
pub const VOLUME_WRITERS: &str = "volume-writers";

/// File in the state directory in which the shims of a node lock the user ids of their VMs.
pub const VMM_USERS: &str = "vmm-users";

/// Type URL of the `options` Any that boxlite-cri passes to CreateSandbox: JSON of [`crate::vmm::SandboxOptions`].
pub const SANDBOX_OPTIONS_TYPE: &str = "boxlite.v1.SandboxOptions";
/// Annotation of a container's OCI spec: its PID namespace, `container`, `pod`, `node` (the VM's) or `target:<container
/// id>`. Without it the spec's namespaces decide.
pub const PID_MODE_ANNOTATION: &str = "io.boxlite.pid-mode";
/// Annotation of a container's OCI spec, for the agent: `true` gives the container every device of the VM.
pub const PRIVILEGED_ANNOTATION: &str = "boxlite.privileged";
/// Annotation of a container's OCI spec, for the agent: `merge` adds the user's groups from the image's /etc/group.
pub const GROUPS_ANNOTATION: &str = "boxlite.groups";
/// Annotation of a container's OCI spec, for the agent: devices of the VM for the container, a JSON list of
/// `{"source": path in the VM, "path": in the container, "permissions": "rwm"}`.
pub const DEVICES_ANNOTATION: &str = "boxlite.devices";
/// Annotation of a container's OCI spec: keeps stdin open for Portal clients. `once` closes it after the first writer's
/// EOF.
pub const STDIN_ANNOTATION: &str = "io.boxlite.stdin";
/// Type of a mount in a container's OCI spec that contains an image, read-only. Its source is the image ID until the
/// runtime has added the layers to the options, lowest first: `layer=<host path>` there, `layer=<path below the share>`
/// in the guest. `subpath=<path>` selects a part of the image.
pub const IMAGE_MOUNT: &str = "boxlite.image";
/// Option of [`IMAGE_MOUNT`]: a layer.
pub const LAYER_OPTION: &str = "layer=";
/// Option of [`IMAGE_MOUNT`]: the part of the image to mount.
pub const SUB_PATH_OPTION: &str = "subpath=";
/// Step that fails in the guest if a path of an image volume does not exist; the host recognizes it in the error.
pub const IMAGE_SUB_PATH_STEP: &str = "find image subpath";
/// Mount options of the CRI that volumes support (`Mount.mount_options`).
pub const MOUNT_FLAGS: [&str; 3] = ["nosuid", "nodev", "noexec"];
/// Type of a mount in a container's OCI spec for a `VOLUME` of its image: a writable bind of the path in the container's
/// root filesystem, which is the source, with the image's content. The root filesystem itself may be read-only.
pub const IMAGE_VOLUME_MOUNT: &str = "boxlite.image-volume";
/// Type of a mount in the spec for the guest: a read-only directory of the share that a kubelet updates atomically; the
/// guest mounts a copy in its memory. Options: [`VERSION_OPTION`] and those of a bind mount.
pub const MIRROR_MOUNT: &str = "boxlite.mirror";
/// Option of [`MIRROR_MOUNT`]: target of the volume's [`ATOMIC_LINK`].
pub const VERSION_OPTION: &str = "version=";
/// Link in a ConfigMap, Secret or projected volume that a kubelet exchanges for each update.
pub const ATOMIC_LINK: &str = "..data";

/// Returns whether `target` of an [`ATOMIC_LINK`] names a version of the volume: one component that starts with `..`.
pub fn is_volume_version(target: &str) -> bool {
    let length = 3..=255;
    length.contains(&target.len()) && target.starts_with("..") && !target.contains(['/', '\0'])
}

/// Type of a mount in the spec for the guest: a tmpfs of the pod, shared by all mounts with the same source. Options:
/// [`SIZE_OPTION`], [`DIRECTORY_OPTION`], [`IDMAP_OPTION`], and those of a bind mount.
pub const MEMORY_MOUNT: &str = "boxlite.memory";
/// Option of [`MEMORY_MOUNT`]: size limit in bytes.
pub const SIZE_OPTION: &str = "size=";
/// Option of [`MEMORY_MOUNT`]: `<mode, octal>:<uid>:<gid>:<path>`, a directory of the tmpfs that is created if missing. The
/// first is the root, with an empty path; the last is mounted.
pub const DIRECTORY_OPTION: &str = "dir=";
/// Option of [`MEMORY_MOUNT`]: owners are mapped by the container's user namespace.
pub const IDMAP_OPTION: &str = "idmap";
/// URI scheme of a stdout that is a CRI log file: `cri:///var/log/pods/…/0.log`. Both streams are written to it.
pub const CRI_LOG_SCHEME: &str = "cri";

/// Key of the binary gRPC metadata that carries an encoded [`crate::boxlite::v1::ErrorDetail`].
pub const ERROR_METADATA: &str = "boxlite-error-bin";

/// Maximum gRPC message size of the guest protocol on both sides, in bytes.
pub const MAX_GUEST_MESSAGE_BYTES: usize = 4 << 20;
/// Maximum number of addresses of the host in a message to the guest.
pub const MAX_HOST_ADDRESSES: usize = 256;
/// Maximum `data` of an output or input chunk, in bytes.
pub const MAX_CHUNK_BYTES: usize = 32 << 10;
/// HTTP/2 stream and connection window towards the guest, in bytes. libkrun's vsock bridge loses bytes on a short write,
/// so at most this many may be unread in flight.
pub const GUEST_WINDOW_BYTES: u32 = 64 << 10;
