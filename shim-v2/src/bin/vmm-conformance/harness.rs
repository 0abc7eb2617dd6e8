//! Setup shared by the cases: an installation, a fresh directory, a ready VM, and its last output on failure.

use boxlite_portal::{Connection, GuestAddress, GuestSession};
use boxlite_proto::boxlite::v1::{GuestInitRequest, GuestInitResponse, Interface};
use boxlite_proto::names::{READY_SOCKET, SCRATCH_SERIAL, SHARE_TAG, VSOCK_SOCKET};
use boxlite_proto::vmm::{Acceleration, Disk, Installation, InstanceSpec, Nic, VmmKind};
use boxlite_shim_v2::net::tap;
use boxlite_shim_v2::vmm::{ReadySocket, Supervisor, VmmChild};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Addresses of both ends of the tap.
pub(crate) const HOST_ADDRESS: &str = "10.199.0.1/24";
pub(crate) const GUEST_ADDRESS: &str = "10.199.0.2/24";
const TAP: &str = "tap0";
const MAC: &str = "02:00:0a:c7:00:02";
/// Enough for the agent and busybox; the suite may run beside other VMs.
const MEMORY_MIB: u32 = 256;
/// User of the VM's processes that serve no files (QEMU only).
pub(crate) const USER: u32 = 1_879_048_199;
/// Size of the sparse scratch disk.
const SCRATCH_BYTES: u64 = 1 << 30;

/// Gives this process its own mount and network namespaces, so that nothing that a case mounts or creates outlives it.
pub(crate) fn isolate() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
        .map_err(|error| format!("needs root: {error}"))?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    tool("ip", &["link", "set", "lo", "up"])?;
    tap::create(TAP)?;
    tool("ip", &["address", "add", HOST_ADDRESS, "dev", TAP])?;
    tool("ip", &["link", "set", TAP, "up"])
}

/// Runs a program of the machine; the error includes its output.
pub(crate) fn tool(name: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(name)
        .args(args)
        .output()
        .map_err(|error| format!("{name}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{name} {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        )
        .into()),
    }
}

/// Returns the directory of the binaries built with this one.
fn binaries() -> Result<PathBuf> {
    let this = std::env::current_exe()?;
    Ok(this.parent().ok_or("no directory")?.to_owned())
}

fn installation(cache: &Path) -> Result<Installation> {
    let home = std::env::var("HOME").unwrap_or_else(|_| "/root".to_owned());
    let tools = std::env::var_os("BOXLITE_CACHE").map_or_else(
        || Path::new(&home).join(".cache/boxlite-cri"),
        PathBuf::from,
    );
    let guest = std::env::var_os("BOXLITE_GUEST").map(PathBuf::from);
    let kernel = std::env::var_os("BOXLITE_LIBKRUNFW").map(PathBuf::from);
    let found = |path: PathBuf| match path.exists() {
        true => Ok(path),
        false => Err(format!("{} is missing", path.display())),
    };
    Ok(Installation {
        guest: found(guest.unwrap_or(binaries()?.join("boxlite-guest")))?,
        libkrunfw: found(kernel.unwrap_or(tools.join("lib/libkrunfw.so.5")))?,
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        virtiofsd: tools.join("tools/bin/virtiofsd"),
        vhost_device_vsock: tools.join("tools/bin/vhost-device-vsock"),
        passt: tools.join("tools/bin/passt"),
        cache: cache.to_owned(),
    })
}

/// Reads BOXLITE_ACCELERATION, by default tcg. For Qemu on a backend with KVM.
fn acceleration() -> Result<Acceleration> {
    match std::env::var("BOXLITE_ACCELERATION").as_deref() {
        Err(_) | Ok("tcg") => Ok(Acceleration::Tcg),
        Ok("kvm") => Ok(Acceleration::Kvm),
        Ok(other) => Err(format!("BOXLITE_ACCELERATION={other} is neither tcg nor kvm").into()),
    }
}

/// A spec and its directory, which is deleted on drop.
pub(crate) struct Bench {
    pub spec: InstanceSpec,
    pub directory: tempfile::TempDir,
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Otherwise the directory cannot be deleted. A case that failed early may have left it unmounted.
        let _gone = umount2(&self.spec.share_dir, MntFlags::MNT_DETACH);
    }
}

impl Bench {
    /// Creates a VM with scratch disk, share and NIC.
    pub(crate) fn new(kind: &VmmKind) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let spec = spec(kind, directory.path())?;
        Ok(Self { spec, directory })
    }

    /// Creates a file with the given content in the bench's directory.
    pub(crate) fn file(&self, name: &str, content: &[u8]) -> Result<PathBuf> {
        let path = self.directory.path().join(name);
        std::fs::write(&path, content)?;
        Ok(path)
    }

    /// Starts the VM without waiting for its agent.
    pub(crate) fn spawn(&self) -> Result<(ReadySocket, VmmChild)> {
        let ready = ReadySocket::bind(&self.spec.work_dir)?;
        let user = self.spec.user;
        chown(self.spec.work_dir.join(READY_SOCKET), user, user)?;
        let supervisor = Supervisor::new(binaries()?.join("containerd-shim-boxlite-v2"));
        Ok((ready, supervisor.spawn(&self.spec)?))
    }

    /// Starts the VM and waits for its agent.
    pub(crate) async fn boot(self) -> Result<Running> {
        let start = Instant::now();
        let (ready, child) = self.spawn()?;
        if let Err(error) = ready.wait(&child).await {
            child.kill();
            return Err(error.into());
        }
        let ready_after = start.elapsed();
        let address = GuestAddress::of(&self.spec.kind, self.spec.work_dir.join(VSOCK_SOCKET));
        let guest = GuestSession::new(Connection::lazy(address));
        Ok(Running {
            bench: self,
            child,
            guest,
            ready_after,
        })
    }
}

/// A VM whose agent is ready, killed on drop.
pub(crate) struct Running {
    pub bench: Bench,
    pub child: VmmChild,
    pub guest: GuestSession,
    pub ready_after: Duration,
}

impl Running {
    /// Calls Guest.Init with everything the bench has.
    pub(crate) async fn init(&self) -> Result<GuestInitResponse> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let request = GuestInitRequest {
            sandbox_id: "conformance".to_owned(),
            hostname: "conformance".to_owned(),
            time_unix_ns: i64::try_from(now.as_nanos())?,
            share_tag: SHARE_TAG.to_owned(),
            scratch_device: SCRATCH_SERIAL.to_owned(),
            interfaces: vec![Interface {
                name: "eth0".to_owned(),
                mac: MAC.to_owned(),
                mtu: 1500,
                addresses: vec![GUEST_ADDRESS.to_owned()],
                ..Default::default()
            }],
            entropy: vec![7; 64].into(),
            ..GuestInitRequest::default()
        };
        self.guest.guest().init(request).await.map_err(|error| {
            format!(
                "{}; console: {}",
                boxlite_sys::report::report(&error),
                self.child.console_tail(20).join(" | ")
            )
            .into()
        })
    }

    pub(crate) fn share(&self) -> &Path {
        &self.bench.spec.share_dir
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill();
        // The next VM needs the tap. The suite allows a death to take two seconds.
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.child.exited().is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn spec(kind: &VmmKind, directory: &Path) -> Result<InstanceSpec> {
    let (work_dir, share_dir) = (directory.join("vm"), directory.join("share"));
    let scratch = directory.join("scratch.img");
    std::fs::create_dir(&work_dir)?;
    std::fs::create_dir(&share_dir)?;
    let user = (*kind == VmmKind::Qemu).then_some(USER);
    let none: Option<&str> = None;
    mount(
        Some("tmpfs"),
        &share_dir,
        Some("tmpfs"),
        MsFlags::MS_NODEV | MsFlags::MS_NOSUID,
        none,
    )?;
    mount(none, &share_dir, none, MsFlags::MS_SHARED, none)?;
    std::fs::File::create(&scratch)?.set_len(SCRATCH_BYTES)?;
    tool(
        "mke2fs",
        &[
            "-q",
            "-t",
            "ext4",
            "-F",
            scratch.to_str().ok_or("not UTF-8")?,
        ],
    )?;
    for path in [&work_dir, &scratch] {
        chown(path, user, user)?;
    }
    Ok(InstanceSpec {
        id: "conformance".to_owned(),
        kind: kind.clone(),
        vcpus: 1,
        memory_mib: MEMORY_MIB,
        acceleration: acceleration()?,
        // Shared by all cases: the second boot must find the files of the first.
        installation: installation(&std::env::temp_dir().join("boxlite-conformance-cache"))?,
        work_dir,
        share_dir,
        disks: vec![Disk {
            path: scratch,
            serial: SCRATCH_SERIAL.to_owned(),
            read_only: false,
        }],
        nics: vec![Nic {
            tap: TAP.to_owned(),
            mac: MAC.to_owned(),
            mtu: 1500,
        }],
        netns: None,
        host_network: false,
        passt: false,
        debug_console: false,
        user,
    })
}

/// Takes the role of a shim: starts a VM, writes its process id once ready, and waits to be killed.
pub(crate) fn hold(kind: &VmmKind, directory: &Path) -> Result<bool> {
    // Namespaces are inherited from the caller; tap and mounts are our own.
    let mut spec = spec(kind, directory)?;
    spec.nics.clear();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let bench = Bench {
            spec,
            directory: tempfile::tempdir()?,
        };
        let running = bench.boot().await?;
        let draft = directory.join("pid.new");
        std::fs::write(&draft, running.child.pid().to_string())?;
        std::fs::rename(&draft, directory.join("pid"))?;
        running.child.wait().await;
        Ok(false)
    })
}
