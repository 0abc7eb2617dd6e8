//! For tests: an in-process shim that speaks containerd's protocol, with a guest that answers Ping, Stats and List, and
//! without a VM.
//!
//! The "program" is a shell script that prints the address of a socket served here; the "process" is a `sleep` that a
//! test can kill. The shim follows the protocol except for injected [`Faults`]. cri-server's tests use it through the
//! feature `fake-shim`.

mod guest;

use crate::shim_controller::ProcessId;
use crate::types::{BoxOptions, ContainerOptions, RuntimeOptions};
use async_trait::async_trait;
use boxlite_proto::boxlite::v1 as wire;
use boxlite_proto::vmm::{Acceleration, Installation, VmmKind};
use boxlite_sys::unix_socket;
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::EnumOrUnknown;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::sandbox_api as sandbox;
use containerd_shim_protos::{sandbox_async, shim_async};
use guest::FakeGuest;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use ttrpc::asynchronous::TtrpcContext;
use ttrpc::asynchronous::transport::Listener;

/// Faults injected by a test.
#[derive(Debug, Default)]
pub struct Faults {
    pub fail_create_sandbox: AtomicBool,
    pub fail_start_sandbox: AtomicBool,
    /// Delay of StartSandbox in ms.
    pub slow_start_ms: AtomicU32,
    pub fail_task_create: AtomicBool,
    pub fail_task_start: AtomicBool,
    /// Containers ignore SIGTERM.
    pub deaf: AtomicBool,
    /// The guest reports exits as OOM kills.
    pub oom: AtomicBool,
    /// The guest of the box with this id does not answer Stats.
    pub hung: Mutex<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Task {
    Created,
    Running,
    Stopped(u32),
}

/// One fake shim with its fake VM.
pub struct FakeShim {
    pub faults: Arc<Faults>,
    tasks: watch::Sender<BTreeMap<String, Task>>,
    vm: watch::Sender<bool>,
    process: Mutex<std::process::Child>,
    bundle: PathBuf,
    starts: AtomicU32,
    pub creates: AtomicU32,
    pub calls: Mutex<Vec<String>>,
}

fn status(code: ttrpc::Code, text: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, text))
}

impl FakeShim {
    fn new(bundle: PathBuf, faults: Arc<Faults>) -> Arc<Self> {
        let process = std::process::Command::new("/bin/sleep")
            .arg("1000")
            // A process that a failed test left would keep the pipe of the test's output open.
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        Arc::new(Self {
            faults,
            tasks: watch::channel(BTreeMap::new()).0,
            vm: watch::channel(false).0,
            process: Mutex::new(process),
            bundle,
            starts: AtomicU32::new(0),
            creates: AtomicU32::new(0),
            calls: Mutex::default(),
        })
    }

    /// Waits forever if the guest is set to hang.
    async fn hang(&self) {
        let hung = self.faults.hung.lock().unwrap().clone();
        if !hung.is_empty() && self.bundle.ends_with(hung) {
            std::future::pending::<()>().await;
        }
    }

    fn note(&self, call: &str) {
        self.calls.lock().unwrap().push(call.to_owned());
    }

    /// Returns the number of StartSandbox calls.
    pub fn starts(&self) -> u32 {
        self.starts.load(Ordering::SeqCst)
    }

    /// Lets a container exit.
    pub fn exit(&self, id: &str, code: u32) {
        self.tasks.send_modify(|tasks| {
            tasks.insert(id.to_owned(), Task::Stopped(code));
        });
    }

    /// Lets the VM die with all containers.
    pub fn kill_vm(&self) {
        self.tasks.send_modify(|tasks| {
            for task in tasks.values_mut() {
                if !matches!(task, Task::Stopped(_)) {
                    *task = Task::Stopped(137);
                }
            }
        });
        self.vm.send_replace(false);
    }

    /// Kills the "process".
    pub fn kill_process(&self) {
        let mut process = self.process.lock().unwrap();
        let _ = process.kill();
        let _ = process.wait();
    }

    pub fn alive(&self) -> bool {
        matches!(self.process.lock().unwrap().try_wait(), Ok(None))
    }

    /// Returns the ids of the shim's tasks.
    pub fn tasks(&self) -> Vec<String> {
        self.tasks.borrow().keys().cloned().collect()
    }

    fn state(&self, id: &str) -> ttrpc::Result<Task> {
        let task = self.tasks.borrow().get(id).copied();
        task.ok_or_else(|| status(ttrpc::Code::NOT_FOUND, "no such task"))
    }
}

/// The ttrpc services; a wrapper, because both the traits and `Arc` are foreign.
#[derive(Clone)]
struct Served(Arc<FakeShim>);

#[async_trait]
impl sandbox_async::Sandbox for Served {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: sandbox::CreateSandboxRequest,
    ) -> ttrpc::Result<sandbox::CreateSandboxResponse> {
        self.0.note("create_sandbox");
        assert_eq!(
            request.options.type_url,
            boxlite_proto::names::SANDBOX_OPTIONS_TYPE
        );
        if self.0.faults.fail_create_sandbox.load(Ordering::SeqCst) {
            return Err(status(ttrpc::Code::INTERNAL, "injected fault"));
        }
        Ok(Default::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        _: sandbox::StartSandboxRequest,
    ) -> ttrpc::Result<sandbox::StartSandboxResponse> {
        self.0.note("start_sandbox");
        self.0.starts.fetch_add(1, Ordering::SeqCst);
        let pause = self.0.faults.slow_start_ms.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(pause.into())).await;
        if self.0.faults.fail_start_sandbox.load(Ordering::SeqCst) {
            return Err(status(
                ttrpc::Code::INTERNAL,
                "Kernel panic - not syncing: injected fault",
            ));
        }
        if *self.0.vm.borrow() {
            // A warm VM, which is claimed.
            return Ok(Default::default());
        }
        let vm = self.0.bundle.join("vm");
        std::fs::create_dir_all(&vm).unwrap();
        let listener = unix_socket::bind(&vm.join("vsock")).unwrap();
        let guest = FakeGuest(self.0.clone());
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(wire::guest_server::GuestServer::new(guest.clone()))
                .add_service(wire::container_server::ContainerServer::new(guest))
                .serve_with_incoming(tokio_stream::wrappers::UnixListenerStream::new(listener)),
        );
        self.0.vm.send_replace(true);
        Ok(Default::default())
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        _: sandbox::StopSandboxRequest,
    ) -> ttrpc::Result<sandbox::StopSandboxResponse> {
        self.0.note("stop_sandbox");
        self.0.kill_vm();
        Ok(Default::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        _: sandbox::WaitSandboxRequest,
    ) -> ttrpc::Result<sandbox::WaitSandboxResponse> {
        let _ = self.0.vm.subscribe().wait_for(|alive| !alive).await;
        Ok(Default::default())
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        _: sandbox::SandboxStatusRequest,
    ) -> ttrpc::Result<sandbox::SandboxStatusResponse> {
        let state = if *self.0.vm.borrow() {
            "SANDBOX_READY"
        } else {
            "SANDBOX_NOTREADY"
        };
        Ok(sandbox::SandboxStatusResponse {
            state: state.into(),
            info: [("boot_ms".to_owned(), "7".to_owned())].into(),
            ..Default::default()
        })
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: sandbox::ShutdownSandboxRequest,
    ) -> ttrpc::Result<sandbox::ShutdownSandboxResponse> {
        self.0.note("shutdown_sandbox");
        self.0.kill_vm();
        self.0.kill_process();
        Ok(Default::default())
    }
}

#[async_trait]
impl shim_async::Task for Served {
    async fn connect(
        &self,
        _: &TtrpcContext,
        _: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        Ok(api::ConnectResponse {
            shim_pid: self.0.process.lock().unwrap().id(),
            ..Default::default()
        })
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        self.0.note("create");
        self.0.creates.fetch_add(1, Ordering::SeqCst);
        assert!(Path::new(&request.bundle).join("config.json").is_file());
        assert!(
            request
                .rootfs
                .iter()
                .all(|mount| Path::new(&mount.source).is_file())
        );
        if self.0.faults.fail_task_create.load(Ordering::SeqCst) {
            return Err(status(ttrpc::Code::INVALID_ARGUMENT, "injected fault"));
        }
        self.0.tasks.send_modify(|tasks| {
            tasks.insert(request.id.clone(), Task::Created);
        });
        Ok(Default::default())
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        if self.0.faults.fail_task_start.load(Ordering::SeqCst) {
            return Err(status(
                ttrpc::Code::INVALID_ARGUMENT,
                "no such program: /nowhere",
            ));
        }
        if self.0.state(&request.id)? != Task::Created {
            let text = "it was started already";
            return Err(status(ttrpc::Code::FAILED_PRECONDITION, text));
        }
        self.0.tasks.send_modify(|tasks| {
            tasks.insert(request.id.clone(), Task::Running);
        });
        Ok(Default::default())
    }

    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        let (state, exit_status) = match self.0.state(&request.id)? {
            Task::Created => (api::Status::CREATED, 0),
            Task::Running => (api::Status::RUNNING, 0),
            Task::Stopped(code) => (api::Status::STOPPED, code),
        };
        Ok(api::StateResponse {
            status: EnumOrUnknown::new(state),
            exit_status,
            pid: 7,
            ..Default::default()
        })
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        self.0.state(&request.id)?;
        let mut tasks = self.0.tasks.subscribe();
        let ended = |tasks: &BTreeMap<String, Task>| {
            !matches!(tasks.get(&request.id), Some(Task::Created | Task::Running))
        };
        let exit_status = match tasks.wait_for(ended).await.unwrap().get(&request.id) {
            Some(Task::Stopped(code)) => *code,
            _ => 137,
        };
        Ok(api::WaitResponse {
            exit_status,
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        self.0.note(&format!("kill {}", request.signal));
        if request.signal == 9 || !self.0.faults.deaf.load(Ordering::SeqCst) {
            self.0.exit(&request.id, 128 + request.signal);
        }
        Ok(Empty::new())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.state(&request.id)?;
        let limits = String::from_utf8_lossy(&request.resources.value).into_owned();
        self.0.note(&format!("update {limits}"));
        Ok(Empty::new())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        self.0.state(&request.id)?;
        self.0.tasks.send_modify(|tasks| {
            tasks.remove(&request.id);
        });
        Ok(Default::default())
    }
}

/// A fake shim and its tokio runtime.
type Running = (Arc<FakeShim>, tokio::runtime::Runtime);

/// A node with fake shims: roots, program, one image, and the shims served so far.
pub struct FakeNode {
    directory: PathBuf,
    /// Deletes the directory; unset for another process's node.
    _temporary: Option<tempfile::TempDir>,
    pub faults: Arc<Faults>,
    shims: Mutex<BTreeMap<String, Running>>,
}

impl FakeNode {
    pub fn new() -> Self {
        let temporary = tempfile::tempdir_in("/tmp").unwrap();
        let mut node = Self::open(temporary.path());
        node._temporary = Some(temporary);
        let at = |name: &str| node.at(name);
        for name in ["guest", "fw"] {
            std::fs::write(at(name), "x").unwrap();
            std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        // `start` prints the address of the socket that `serve` created; both actions append a line to the log. `delete` waits
        // until `attend`, if that runs, has ended the shim.
        let script = "#!/bin/sh\nid=$4\ncase \"$*\" in\n*start) [ -e BASE/fail ] && { echo injected fault >&2; exit 1; }\n\
             echo start $id >> BASE/log; : > BASE/wanted/$id; until [ -S BASE/f/$id ]; do sleep 0.01; done\n\
             printf 'unix://BASE/f/%s' $id ;;\n*) echo delete $id >> BASE/log; [ -e BASE/attended ] || exit 0\n\
             : > BASE/unwanted/$id; while [ -e BASE/unwanted/$id ]; do sleep 0.01; done ;;\nesac\n";
        let script = script.replace("BASE", node.directory.to_str().unwrap());
        std::fs::write(at("shim"), script).unwrap();
        std::fs::set_permissions(at("shim"), std::fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["f", "wanted", "unwanted"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        node.put_image();
        node
    }

    /// Returns the node of another process, which serves its shims.
    pub fn open(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            _temporary: None,
            faults: Arc::default(),
            shims: Mutex::default(),
        }
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Returns the log of the program's actions.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.at("log")).unwrap_or_default()
    }

    pub fn options(&self) -> RuntimeOptions {
        RuntimeOptions {
            root: self.at("r"),
            state: self.at("s"),
            scratch_dir: None,
            shim: self.at("shim"),
            installation: Installation {
                guest: self.at("guest"),
                libkrunfw: self.at("fw"),
                qemu: self.at("none"),
                virtiofsd: self.at("none"),
                vhost_device_vsock: self.at("none"),
                passt: self.at("none"),
                cache: self.at("cache"),
            },
            vmm: VmmKind::Krun,
            acceleration: Acceleration::Tcg,
            start_limit: Duration::from_secs(20),
            registry: Default::default(),
        }
    }

    /// Serves a shim for a box, to be found by the script, in a separate tokio runtime so that it can be killed.
    pub async fn serve(&self, box_id: &str) -> Arc<FakeShim> {
        let bundle = self.at("s").join("s").join(box_id);
        let shim = FakeShim::new(bundle, self.faults.clone());
        let own = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (path, served) = (self.at("f").join(box_id), Served(shim.clone()));
        let serving = own.spawn(async move {
            // Renamed when it listens: the program waits for the path, and its client connects at once.
            let unfinished = path.with_extension("new");
            let listener = unix_socket::bind(&unfinished).unwrap();
            std::fs::rename(unfinished, path).unwrap();
            let mut server = ttrpc::asynchronous::Server::new()
                .add_listener(Listener::new(
                    tokio_stream::wrappers::UnixListenerStream::new(listener),
                ))
                .register_service(sandbox_async::create_sandbox(Arc::new(served.clone())))
                .register_service(shim_async::create_task(Arc::new(served)));
            server.start().await.unwrap();
            tokio::spawn(async move {
                let _keep = server;
                std::future::pending::<()>().await
            });
        });
        serving.await.unwrap();
        if let Some((_, old)) = self
            .shims
            .lock()
            .unwrap()
            .insert(box_id.to_owned(), (shim.clone(), own))
        {
            old.shutdown_background();
        }
        shim
    }

    /// Serves a shim for every box that is started, and ends it with the box, until the future is dropped.
    pub async fn attend(&self) {
        std::fs::write(self.at("attended"), "").unwrap();
        let ids = |name: &str| {
            let entries = std::fs::read_dir(self.at(name)).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap())
        };
        loop {
            for id in ids("unwanted") {
                if self.shims.lock().unwrap().contains_key(&id) {
                    self.kill_shim(&id);
                }
                for name in ["wanted", "f", "unwanted"] {
                    let _ = std::fs::remove_file(self.at(name).join(&id));
                }
            }
            for id in ids("wanted") {
                if !self.shims.lock().unwrap().contains_key(&id) {
                    self.serve(&id).await;
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Returns the number of live shim processes.
    pub fn alive(&self) -> usize {
        let shims = self.shims.lock().unwrap();
        shims.values().filter(|(shim, _)| shim.alive()).count()
    }

    /// Kills a shim as by `kill -9`: its process, VM and connections end.
    pub fn kill_shim(&self, box_id: &str) {
        let (shim, own) = self.shims.lock().unwrap().remove(box_id).unwrap();
        shim.kill_process();
        own.shutdown_background();
    }

    pub fn box_options(&self, id: &str) -> BoxOptions {
        BoxOptions {
            pod: None,
            id: id.into(),
            name: format!("name-{id}"),
            metadata: b"m".to_vec(),
            vcpus: 1,
            memory_mib: 128,
            containers_bytes: 0,
            scratch_bytes: 1 << 20,
            hostname: "h".into(),
            netns: None,
            host_network: false,
            passt: false,
            sysctls: Default::default(),
            cgroup_parent: String::new(),
            vmm: None,
            debug_console: false,
            shared_volume_writers: Default::default(),
            vmm_ids: None,
        }
    }

    pub fn container_options(&self, id: &str) -> ContainerOptions {
        ContainerOptions {
            id: id.into(),
            name: format!("name-{id}"),
            image_id: image_id(),
            spec: Default::default(),
            metadata: b"cm".to_vec(),
            log_path: None,
            stdin: false,
            stdin_once: false,
            tty: false,
            pid_mode: Default::default(),
            pid_target: String::new(),
            read_only_rootfs: false,
        }
    }

    /// Writes an image of one layer into the store.
    pub(crate) fn put_image(&self) {
        let layer = format!("sha256:{}", "1".repeat(64));
        let store = self.at("r").join("images");
        let blobs = store.join("blobs/sha256");
        let layers = store.join("layers/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::create_dir_all(&layers).unwrap();
        let hex = image_id().replace("sha256:", "");
        std::fs::write(blobs.join(hex), image_config()).unwrap();
        std::fs::write(layers.join(format!("{}.erofs", "1".repeat(64))), [0; 4096]).unwrap();
        let index = serde_json::json!({"version": 1, "images": [{
            "id": image_id(), "tags": ["docker.io/library/x:latest"], "digests": [], "blobs": [image_id()], "layers": [layer],
        }]});
        std::fs::write(store.join("index.json"), index.to_string()).unwrap();
    }
}

impl Default for FakeNode {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for FakeShim {
    fn drop(&mut self) {
        self.kill_process();
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        for (_, (shim, own)) in std::mem::take(&mut *self.shims.lock().unwrap()) {
            shim.kill_process();
            own.shutdown_background();
        }
    }
}

fn image_config() -> String {
    serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", "1".repeat(64))]},
        "history": [],
    })
    .to_string()
}

/// A small tmpfs, unmounted on drop. Needs root.
#[cfg(test)]
pub(crate) struct SmallDisk(tempfile::TempDir);

#[cfg(test)]
impl SmallDisk {
    pub(crate) fn new(bytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self::mount(directory.path(), bytes);
        Self(directory)
    }

    /// Mounts a tmpfs on an existing directory.
    pub(crate) fn mount(path: &Path, bytes: u64) {
        let size = format!("size={bytes}");
        nix::mount::mount(
            Some("none"),
            path,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some(size.as_str()),
        )
        .expect("these tests run as root");
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Fills the disk to the last byte.
    pub(crate) fn fill(&self) {
        fill(self.path());
    }

    /// Undoes [`Self::fill`].
    pub(crate) fn make_room(&self) {
        std::fs::remove_file(self.path().join("fill")).unwrap();
    }
}

#[cfg(test)]
impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Appends to a file in `directory` until its disk is full.
#[cfg(test)]
pub(crate) fn fill(directory: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(directory.join("fill"))
        .unwrap();
    for step in [4096, 1] {
        while file.write(&vec![1; step]).is_ok_and(|written| written > 0) {}
    }
}

/// Returns the id of the image.
pub fn image_id() -> String {
    use sha2::Digest;
    format!(
        "sha256:{}",
        hex::encode(sha2::Sha256::digest(image_config()))
    )
}

/// Returns true if `pid` is the fake shim's process.
pub fn is_process(shim: &FakeShim, pid: i32) -> bool {
    let own = i32::try_from(shim.process.lock().unwrap().id()).unwrap();
    own == pid && ProcessId::of(pid).is_some()
}
