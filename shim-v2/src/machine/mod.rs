//! [`VmMachine`]: assembles a pod's VM from vmm, share and net.
//!
//! ```text
//! work dir → scratch disk → share → taps in the pod's netns → ready socket → vmm child → guest calls 2696 → Guest.Init
//!                                   a tap without interface                       warm VM waits here ┘
//! ```
//!
//! Each step registers its reversal with [`Undo`] before it runs; the driver runs that list after a failure, a stop or the
//! VM's end. The order of a pod's life is the driver's decision.

mod scratch;
mod share;
mod vmm_user;

use crate::cgroup;
use crate::error::{Result, ShimError};
use crate::mount_export::host_mounter::{HostMounter, HostMounts};
use crate::net::host::{BindScope, HostPorts};
use crate::net::{self, PodNetwork, passt, slirp};
use crate::pod::undo::Undo;
use crate::sandbox::machine::{Booted, Machine, WarmVm};
use crate::sandbox::options::Plan;
use crate::share::PodShare;
use crate::share::file_server::FileServerWatch;
use crate::share::host_namespace::HostNamespace;
use crate::share::mirror::MirrorWatch;
use crate::shim_state::{STATE_FILE, ShimState, write_atomically};
use crate::time;
use crate::trace::GuestCall;
use crate::vmm::ready::last_output;
use crate::vmm::work_dir::WorkDirWatch;
use crate::vmm::{ReadySocket, Supervisor, VmmChild};
use async_trait::async_trait;
use boxlite_config::budget::{PASST_MIB, vmm_mib};
use boxlite_config::cgroup::{CGROUP_MOUNT, pids_limit};
use boxlite_portal::{Connection, GuestAddress, GuestErrorKind, GuestSession};
use boxlite_proto::boxlite::v1::{GuestInitRequest, GuestPrepareRequest};
use boxlite_proto::names;
use boxlite_proto::vmm::{Disk, InstanceSpec, Nic, VmmKind};
use boxlite_sys::process::ProcessId;
use boxlite_sys::sync::Mutex;
use boxlite_telemetry::{Span, TraceContext};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use share::{VmShare, blocking};
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant, SystemTime};
use vmm_user::UserClaim;

/// File name of the scratch disk.
const SCRATCH_FILE: &str = "scratch.img";
/// File name of the pod's network description in the bundle.
const NETWORK_FILE: &str = "network.json";
/// Number of bytes for the guest's random pool.
const ENTROPY_BYTES: usize = 64;
/// Maximum time for a killed VMM to exit when a boot is undone.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);
/// OOM score adjustment of the VM: it can be killed like any pod; only the shim is protected.
const VMM_OOM_SCORE: &str = "0";

/// Gives this process a mount namespace that receives mounts of the host and propagates none back. Single-threaded callers
/// only. Returns handles on both namespaces, for exported mounts.
///
/// # Errors
/// The process lacks CAP_SYS_ADMIN.
pub fn enter_mount_namespace() -> std::io::Result<HostMounts> {
    let host = HostNamespace::current()?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SLAVE,
        None::<&str>,
    )?;
    Ok(HostMounts {
        host,
        own: HostNamespace::current()?,
    })
}

/// The machine of one pod.
pub struct VmMachine {
    record: Mutex<ShimState>,
    cgroup: Mutex<cgroup::Joined>,
    supervisor: Supervisor,
    mounts: Arc<HostMounts>,
    /// Held as long as the shim lives.
    user: Mutex<Option<UserClaim>>,
    /// A VM that waits for its pod.
    warm: Mutex<Option<RunningVm>>,
}

/// A VM whose agent has reported readiness and that is not initialized.
struct RunningVm {
    work_dir: PathBuf,
    share: PodShare,
    child: VmmChild,
    session: GuestSession,
}

/// Time at which a VM gets its pod.
enum Claim {
    /// Before its boot: the NICs are those of the pod's network.
    AtBoot(PodNetwork),
    /// Later, with the NIC of a warm VM.
    Later,
}

impl Claim {
    fn nics(&self) -> Vec<Nic> {
        match self {
            Self::AtBoot(network) => network.nics(),
            Self::Later => vec![net::warm_nic()],
        }
    }
}

impl VmMachine {
    /// Creates a machine that keeps `record` up to date.
    pub fn new(record: ShimState, mounts: HostMounts) -> Self {
        Self {
            mounts: Arc::new(mounts),
            record: Mutex::new(record),
            cgroup: Mutex::default(),
            supervisor: Supervisor::default(),
            user: Mutex::default(),
            warm: Mutex::default(),
        }
    }

    fn record(&self) -> MutexGuard<'_, ShimState> {
        self.record.lock()
    }

    /// Writes the record to the bundle.
    ///
    /// # Errors
    /// The bundle is not writable.
    pub fn store(&self, bundle: &Path) -> std::io::Result<()> {
        self.record().store(bundle)
    }

    /// Leaves and removes the pod's cgroup. The VM must have ended.
    pub fn leave_cgroup(&self, limit: Duration) {
        self.cgroup.lock().leave(limit);
    }

    /// Records the vmm child before anything waits for it, so that it can be killed if the shim dies.
    fn record_child(&self, bundle: &Path, pid: i32) {
        self.record().vmm = ProcessId::of(pid);
        if let Err(error) = self.store(bundle) {
            tracing::warn!(%error, "failed to persist shim state");
        }
        if let Err(error) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), VMM_OOM_SCORE) {
            tracing::debug!(%error, "failed to set oom_score_adj of the VM");
        }
    }

    /// Joins the pod's interfaces with taps. The description is kept in the bundle for diagnosis.
    async fn attach(&self, bundle: &Path, plan: &Plan, undo: &mut Undo) -> Result<PodNetwork> {
        let Some(netns) = plan.netns.clone() else {
            return Ok(PodNetwork::default());
        };
        undo_taps(&netns, undo);
        let network = blocking("join the pod's network", move || net::attach(&netns)).await?;
        let path = bundle.join(NETWORK_FILE);
        let text = serde_json::to_vec_pretty(&network).unwrap_or_default();
        write_atomically(&path, &text).map_err(ShimError::io("write", path.display()))?;
        Ok(network)
    }

    /// Returns the user of the VM's processes that serve no files. libkrun serves the share in its own process, for which it
    /// needs root.
    async fn claim_user(&self, id: &str, plan: &Plan) -> Result<Option<u32>> {
        let needed = plan.options.vmm == VmmKind::Qemu || plan.options.passt;
        let users = match &plan.options.vmm_users {
            Some(users) if needed => users.clone(),
            _ => return Ok(None),
        };
        if !vmm_user::are_mapped(users.ids) {
            tracing::warn!(
                "pod.vmm_ids are not mapped in this user namespace, running the VM as root"
            );
            return Ok(None);
        }
        if let Some(claim) = &*self.user.lock() {
            return Ok(Some(claim.id()));
        }
        let id = id.to_owned();
        let claim = blocking("claim a user", move || UserClaim::new(&users, &id)).await?;
        let user = claim.id();
        *self.user.lock() = Some(claim);
        Ok(Some(user))
    }

    /// Creates the tap of a warm VM.
    async fn prepare_tap(&self, plan: &Plan, undo: &mut Undo) -> Result<()> {
        let Some(netns) = plan.netns.clone() else {
            return Ok(());
        };
        undo_taps(&netns, undo);
        blocking("create a tap", move || net::prepare(&netns)).await
    }

    async fn start_child(&self, spec: InstanceSpec, undo: &mut Undo) -> Result<VmmChild> {
        let supervisor = self.supervisor.clone();
        let child = blocking("start the vmm child", move || supervisor.spawn(&spec)).await?;
        let hold = child.clone();
        undo.push("vmm child", move || async move {
            hold.kill();
            tokio::time::timeout(KILL_TIMEOUT, hold.wait())
                .await
                .map(drop)
                .map_err(|_| "still running after SIGKILL")
        });
        Ok(child)
    }

    /// Boots a VM up to the agent's report. Also returns the pod's network, or that it comes later for a warm VM.
    async fn power_on(
        &self,
        id: &str,
        bundle: &Path,
        plan: &Plan,
        undo: &mut Undo,
        timers: &mut Timers,
    ) -> Result<(RunningVm, Claim)> {
        let work_dir = make_work_dir(bundle, undo)?;
        let scratch = scratch_path(id, bundle, plan);
        self.record().scratch = Some(scratch.clone());
        self.store(bundle)
            .map_err(ShimError::io("write", bundle.join(STATE_FILE).display()))?;
        let taken = scratch.clone();
        undo.push_call("scratch disk", move || remove_file(&taken));
        scratch::create(&scratch, plan.options.scratch_bytes).await?;
        timers.mark("scratch");

        let directory = bundle.join("share");
        let host = self.mounts.host.clone();
        let create = move || PodShare::create(&directory, host);
        let share = blocking("create the share", create).await?;
        let taken = share.clone();
        undo.push_call("share", move || taken.destroy());
        timers.mark("share");

        let claim = match plan.options.warm {
            true => {
                self.prepare_tap(plan, undo).await?;
                Claim::Later
            }
            false => Claim::AtBoot(self.attach(bundle, plan, undo).await?),
        };
        timers.mark("net");

        let ready =
            ReadySocket::bind(&work_dir).map_err(ShimError::boot("listen for the guest"))?;
        let mut spec = instance(id, plan, &work_dir, &share, &scratch, claim.nics());
        spec.user = self.claim_user(id, plan).await?;
        if let Some(user) = spec.user.filter(|_| spec.kind == VmmKind::Qemu) {
            let socket = work_dir.join(names::READY_SOCKET);
            vmm_user::give(user, &[&socket, &scratch, &work_dir])?;
        }
        let child = self.start_child(spec, undo).await?;
        self.record_child(bundle, child.pid());
        timers.mark("spawn");
        ready
            .wait(&child)
            .await
            .map_err(ShimError::boot("wait for the guest"))?;
        timers.mark("ready");

        let socket = work_dir.join(names::VSOCK_SOCKET);
        let session = GuestSession::new(Connection::lazy(GuestAddress::of(
            &plan.options.vmm,
            socket,
        )));
        let vm = RunningVm {
            work_dir,
            share,
            child,
            session,
        };
        Ok((vm, claim))
    }

    /// Takes the warm VM, unless it has died.
    fn take_warm(&self) -> Option<RunningVm> {
        let warm = self.warm.lock().take();
        warm.filter(|vm| vm.child.exited().is_none())
    }
}

#[async_trait]
impl Machine for VmMachine {
    async fn boot_warm(
        &self,
        id: &str,
        bundle: &Path,
        plan: &Plan,
        undo: &mut Undo,
    ) -> Result<WarmVm> {
        let mut timers = Timers::default();
        let (vm, _) = self.power_on(id, bundle, plan, undo, &mut timers).await?;
        let watched = vm.child.clone();
        let request = GuestPrepareRequest {
            share_tag: names::SHARE_TAG.to_owned(),
            scratch_device: names::SCRATCH_SERIAL.to_owned(),
            time_unix_ns: time::unix_ns(),
            entropy: entropy()?.into(),
        };
        let guest = vm.session.guest();
        tokio::select! {
            prepared = guest.prepare(request) => {
                prepared.map_err(ShimError::boot("prepare the guest"))?;
            }
            reason = exit_of(watched.clone()) => return Err(ShimError::VmGone { reason }),
        }
        timers.mark("prepare");
        let warm = WarmVm {
            pid: watched.pid().unsigned_abs(),
            exit: Box::pin(exit_of(watched)),
            info: timers.info,
        };
        *self.warm.lock() = Some(vm);
        Ok(warm)
    }

    async fn boot(&self, id: &str, bundle: &Path, plan: &Plan, undo: &mut Undo) -> Result<Booted> {
        let mut timers = Timers::default();
        let (vm, claim) = match self.take_warm() {
            Some(vm) => (vm, Claim::Later),
            None => self.power_on(id, bundle, plan, undo, &mut timers).await?,
        };
        let RunningVm {
            work_dir,
            share,
            child,
            session,
        } = vm;
        let host_network = plan.options.host_network;
        let (tsi, slirp_nic) = match plan.options.vmm {
            // libkrun uses TSI and needs no NIC.
            VmmKind::Krun => (host_network, false),
            VmmKind::Qemu => (false, host_network),
        };
        let (network, boot_mac) = match claim {
            Claim::AtBoot(_) if slirp_nic => (slirp::network(), ""),
            Claim::AtBoot(network) => (network, ""),
            Claim::Later => {
                let network = self.attach(bundle, plan, undo).await?;
                timers.mark("net");
                (one_interface(network)?, net::BOOT_MAC)
            }
        };
        let boot = InitCall {
            session: &session,
            child: &child,
            boot_mac,
            began: timers.began,
        };
        let versions = boot.init(id, plan, &network).await?;
        let host_ports = match &plan.netns {
            _ if slirp_nic => Some(HostPorts::start(&session, BindScope::Host).await?),
            _ if tsi => Some(HostPorts::start(&session, BindScope::Vmm(child.pid())).await?),
            Some(netns) if plan.local_ports => {
                let scope = BindScope::pod(netns)?;
                Some(HostPorts::start(&session, scope).await?)
            }
            _ => None,
        };
        timers.mark("init");
        let mut info = timers.info;
        info.push(("kernel".to_owned(), versions.0));
        info.push(("agent".to_owned(), versions.1));
        info.push(("vmm".to_owned(), plan.options.vmm.to_string()));

        let (watched, killed) = (child.clone(), child.clone());
        let kill: Arc<dyn Fn() + Send + Sync> = Arc::new(move || killed.kill());
        let mounter = HostMounter::new(self.mounts.clone(), share.directory(), id);
        Ok(Booted {
            mounter: Some(mounter),
            file_server: Some(FileServerWatch::new(child.pid(), &session)),
            mirror: Some(MirrorWatch::new(share.directory(), &session)),
            pid: child.pid().unsigned_abs(),
            session,
            share: Arc::new(VmShare(share)),
            exit: Box::pin(exit_of(watched)),
            work_dir: Some(WorkDirWatch::new(work_dir, kill.clone())),
            kill,
            host_ports,
            info,
        })
    }

    fn prepare(&self, id: &str, bundle: &Path, plan: &Plan) {
        let options = &plan.options;
        let passt_mib = if options.passt { PASST_MIB } else { 0 };
        let need =
            u64::from(options.memory_mib) + vmm_mib(&options.vmm, options.acceleration) + passt_mib;
        let joined = cgroup::join(&options.cgroup_parent, id, need << 20);
        {
            let mut record = self.record();
            record.cgroups.clone_from(&joined.made);
            record.netns.clone_from(&plan.netns);
        }
        if let Some(vm) = self.warm.lock().as_ref() {
            joined.bring(vm.child.pid());
        }
        *self.cgroup.lock() = joined;
        if let Err(error) = self.store(bundle) {
            tracing::warn!(%error, "failed to persist shim state");
        }
    }
}

/// Durations in milliseconds for SandboxStatus: `shim.<stage>_ms`; the runtime recognizes stages by the suffix.
/// Each stage is also a span of the current trace.
struct Timers {
    info: Vec<(String, String)>,
    began: SystemTime,
    stage: Instant,
    stage_began: SystemTime,
}

impl Default for Timers {
    fn default() -> Self {
        let now = SystemTime::now();
        Self {
            info: Vec::new(),
            began: now,
            stage: Instant::now(),
            stage_began: now,
        }
    }
}

impl Timers {
    fn mark(&mut self, stage: &'static str) {
        let took = self.stage.elapsed();
        let now = SystemTime::now();
        Span::record(&TraceContext::current(), stage, self.stage_began, now);
        (self.stage, self.stage_began) = (Instant::now(), now);
        self.info
            .push((format!("shim.{stage}_ms"), took.as_millis().to_string()));
    }
}

fn instance(
    id: &str,
    plan: &Plan,
    work_dir: &Path,
    share: &PodShare,
    scratch: &Path,
    nics: Vec<Nic>,
) -> InstanceSpec {
    let options = &plan.options;
    InstanceSpec {
        id: id.to_owned(),
        kind: options.vmm.clone(),
        vcpus: options.vcpus,
        memory_mib: options.memory_mib,
        acceleration: options.acceleration,
        installation: options.installation.clone(),
        work_dir: work_dir.to_owned(),
        share_dir: share.directory().to_owned(),
        disks: vec![Disk {
            path: scratch.to_owned(),
            serial: names::SCRATCH_SERIAL.to_owned(),
            read_only: false,
        }],
        nics,
        netns: plan.netns.clone(),
        host_network: options.host_network,
        passt: options.passt,
        debug_console: options.debug_console,
        user: None,
    }
}

fn undo_taps(netns: &Path, undo: &mut Undo) {
    let netns = netns.to_owned();
    undo.push("taps", move || {
        blocking("remove the taps", move || net::detach(&netns))
    });
}

/// Returns the network if a warm VM can have it.
fn one_interface(network: PodNetwork) -> Result<PodNetwork> {
    match network.interfaces.len() {
        1 => Ok(network),
        count => Err(ShimError::Boot {
            step: "give a warm VM to the pod",
            source: Arc::new(std::io::Error::other(format!(
                "the pod has {count} interfaces, and the VM has 1 NIC"
            ))),
        }),
    }
}

/// Waits for the end of the VM and describes it.
async fn exit_of(child: VmmChild) -> String {
    let exit = child.wait().await;
    format!("{exit}; {}", last_output(&child))
}

/// The call that initializes a booted guest.
struct InitCall<'a> {
    session: &'a GuestSession,
    child: &'a VmmChild,
    /// Empty unless the VM was warm.
    boot_mac: &'a str,
    /// Begin of the boot.
    began: SystemTime,
}

impl InitCall<'_> {
    /// Calls Guest.Init, aborted by the VM's death. Returns the versions of kernel and agent.
    async fn init(&self, id: &str, plan: &Plan, network: &PodNetwork) -> Result<(String, String)> {
        let child = self.child;
        let mut interfaces = network.wire_interfaces();
        for interface in &mut interfaces {
            self.boot_mac.clone_into(&mut interface.boot_mac);
        }
        if plan.options.passt {
            interfaces.push(passt::interface());
        }
        let call = GuestCall::begin("Guest/Init");
        let request = GuestInitRequest {
            sandbox_id: id.to_owned(),
            hostname: plan.options.hostname.clone(),
            time_unix_ns: time::unix_ns(),
            share_tag: names::SHARE_TAG.to_owned(),
            scratch_device: names::SCRATCH_SERIAL.to_owned(),
            interfaces,
            routes: network.wire_routes(),
            sysctls: plan.options.sysctls.clone().into_iter().collect(),
            entropy: entropy()?.into(),
            pids_limit: pids_limit(Path::new(CGROUP_MOUNT), &plan.options.cgroup_parent)
                .unwrap_or(0),
            memory_limit: plan.options.containers_bytes,
            trace: call.traced(),
            ..Default::default()
        };
        let guest = self.session.guest();
        let response = tokio::select! {
            response = guest.init(request) => response,
            exit = child.wait() => {
                let reason = format!("{exit} during Guest.Init; {}", last_output(child));
                return Err(ShimError::VmGone { reason });
            }
        };
        match response {
            Ok(response) => {
                call.answered_after_boot(&response.steps, self.began);
                // A second time on the warm connection: the first value was late by the connection setup to a guest that had
                // just booted, and exit times are taken from this clock.
                if let Err(error) = guest.set_time(time::unix_ns()).await {
                    tracing::warn!(id, error = %error, "failed to set the guest's clock again");
                }
                Ok((response.kernel_release, response.agent_version))
            }
            Err(error) => {
                // The agent names the invalid value; the console adds nothing.
                if error.guest_kind() == Some(GuestErrorKind::InvalidArgument) {
                    return Err(ShimError::boot("initialize the guest")(error));
                }
                Err(ShimError::Boot {
                    step: "initialize the guest",
                    source: Arc::new(InitError {
                        source: error,
                        said: last_output(child),
                    }),
                })
            }
        }
    }
}

/// Returns random bytes of the host for the guest's pool.
fn entropy() -> Result<Vec<u8>> {
    let mut entropy = vec![0; ENTROPY_BYTES];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut entropy))
        .map_err(ShimError::io("read", "/dev/urandom"))?;
    Ok(entropy)
}

/// A guest that reported readiness and then refused its initialization.
#[derive(Debug, thiserror::Error)]
#[error("{said}")]
struct InitError {
    said: String,
    #[source]
    source: boxlite_portal::PortalError,
}

/// Returns the path of the scratch disk: in the configured directory, or below the bundle's `work`, which containerd keeps on
/// disk while the bundle is in memory.
fn scratch_path(id: &str, bundle: &Path, plan: &Plan) -> PathBuf {
    if let Some(directory) = &plan.options.scratch_dir {
        return directory.join(names::scratch_file(id));
    }
    let work = std::fs::canonicalize(bundle.join("work"));
    work.unwrap_or_else(|_| bundle.to_owned())
        .join(SCRATCH_FILE)
}

/// Creates an empty private directory for sockets and console.
fn make_work_dir(bundle: &Path, undo: &mut Undo) -> Result<PathBuf> {
    let dir = bundle.join("vm");
    match std::fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(ShimError::io("clear", dir.display())(error));
        }
        _ => {}
    }
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&dir)
        .map_err(ShimError::io("create", dir.display()))?;
    // The console log is kept for diagnosis; the sockets are useless without the VM.
    let taken = dir.clone();
    undo.push_call("sockets", move || {
        for name in [names::VSOCK_SOCKET, names::READY_SOCKET] {
            remove_file(&taken.join(name))?;
        }
        Ok::<(), std::io::Error>(())
    });
    Ok(dir)
}

fn remove_file(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
