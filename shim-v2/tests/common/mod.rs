//! A shim driven like boxlite-cri drives it: the binary's actions, ttrpc on its socket, a busybox root file system.
//!
//! Needs root, QEMU and its helpers, libkrunfw and the agent: BOXLITE_GUEST names the agent, BOXLITE_CACHE the directory
//! of `make tools`. Tests fail if one is missing.

use boxlite_proto::names;
use boxlite_proto::shim::shim::ReopenLogRequest;
use boxlite_proto::shim::shim_ttrpc::ShimLogClient;
use boxlite_proto::vmm::{Acceleration, Installation, SandboxOptions, VmmKind};
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, KillRequest, Mount, StartRequest, StateRequest,
    StateResponse, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    StartSandboxRequest, StopSandboxRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::context::with_duration;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

/// Timeout of calls that may boot an emulated VM on a busy machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) struct Shim {
    pub dir: tempfile::TempDir,
    pub id: String,
    pub bundle: PathBuf,
    pub task: TaskClient,
    pub sandbox: SandboxClient,
    pub log: ShimLogClient,
    pub layer: PathBuf,
}

fn env_path(name: &str, default: Option<PathBuf>) -> PathBuf {
    std::env::var_os(name)
        .map(PathBuf::from)
        .or(default)
        .unwrap_or_else(|| panic!("{name} is not set: run through make"))
}

pub(crate) fn installation() -> Installation {
    let home = PathBuf::from(std::env::var_os("HOME").expect("HOME"));
    let cache = env_path("BOXLITE_CACHE", Some(home.join(".cache/boxlite-cri")));
    Installation {
        guest: env_path("BOXLITE_GUEST", None),
        libkrunfw: cache.join("lib/libkrunfw.so.5"),
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        virtiofsd: cache.join("tools/bin/virtiofsd"),
        vhost_device_vsock: cache.join("tools/bin/vhost-device-vsock"),
        passt: cache.join("tools/bin/passt"),
        cache: cache.join("derived"),
    }
}

pub(crate) fn options() -> SandboxOptions {
    SandboxOptions {
        pod: None,
        vmm: VmmKind::Qemu,
        vcpus: 1,
        memory_mib: 256,
        containers_bytes: 0,
        scratch_bytes: 1 << 30,
        scratch_dir: None,
        acceleration: Acceleration::Tcg,
        hostname: "pod".to_owned(),
        sysctls: Default::default(),
        installation: installation(),
        cgroup_parent: String::new(),
        debug_console: false,
        host_network: false,
        passt: false,
        volume_writers: None,
        vmm_users: None,
        warm: false,
    }
}

/// Creates an EROFS layer with busybox and its shared libraries.
fn make_layer(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    for name in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
        std::fs::create_dir_all(root.join(name)).expect("mkdir");
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox is installed");
    for name in ["sh", "cat", "seq", "echo", "sleep", "true", "printf"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).expect("link");
    }
    let linked = Command::new("ldd")
        .arg("/bin/busybox")
        .output()
        .expect("ldd");
    for path in String::from_utf8_lossy(&linked.stdout)
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let to = root.join(path.trim_start_matches('/'));
        std::fs::create_dir_all(to.parent().expect("a parent")).expect("mkdir");
        std::fs::copy(path, to).expect("library");
    }
    let file = dir.join("layer.erofs");
    let made = Command::new("mkfs.erofs")
        .arg(&file)
        .arg(&root)
        .output()
        .expect("mkfs.erofs");
    assert!(made.status.success(), "{made:?}");
    file
}

fn action(dir: &Path, bundle: &Path, id: &str, action: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_containerd-shim-boxlite-v2"))
        .args(["-namespace", "test", "-id", id])
        .arg("-address")
        .arg(dir.join("containerd.sock"))
        .args(["-publish-binary", "/bin/false", action])
        .env("TTRPC_ADDRESS", dir.join("events.ttrpc"))
        .env("MAX_SHIM_VERSION", "3")
        .current_dir(bundle)
        .output()
        .expect("the shim runs")
}

impl Shim {
    /// Starts a shim without booting a VM.
    pub(crate) async fn start(name: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("bx")
            .tempdir()
            .expect("tempdir");
        // Unique per run, so that processes of other runs do not count.
        let id = format!("{:0<64}", format!("{name}{:08x}", std::process::id()));
        let bundle = dir.path().join("s").join(&id);
        std::fs::create_dir_all(&bundle).expect("mkdir");
        let layer = make_layer(dir.path());
        let answer = action(dir.path(), &bundle, &id, "start");
        assert!(answer.status.success(), "{answer:?}");
        let answer: serde_json::Value = serde_json::from_slice(&answer.stdout).expect("JSON");
        assert_eq!(
            (&answer["version"], &answer["protocol"]),
            (&3.into(), &"ttrpc".into())
        );
        let client = Client::connect(answer["address"].as_str().expect("an address"))
            .await
            .expect("connects");
        Self {
            task: TaskClient::new(client.clone()),
            sandbox: SandboxClient::new(client.clone()),
            log: ShimLogClient::new(client),
            dir,
            id,
            bundle,
            layer,
        }
    }

    pub(crate) async fn create_sandbox(&self, options: &SandboxOptions) -> ttrpc::Result<()> {
        let request = CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: self.bundle.display().to_string(),
            options: MessageField::some(Any {
                type_url: names::SANDBOX_OPTIONS_TYPE.to_owned(),
                value: serde_json::to_vec(options).expect("JSON"),
                ..Default::default()
            }),
            ..Default::default()
        };
        self.sandbox
            .create_sandbox(with_duration(CALL_TIMEOUT), &request)
            .await
            .map(drop)
    }

    pub(crate) async fn start_sandbox(&self) -> ttrpc::Result<u32> {
        let request = StartSandboxRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        Ok(self
            .sandbox
            .start_sandbox(with_duration(BOOT_TIMEOUT), &request)
            .await?
            .pid)
    }

    /// Creates and starts the sandbox.
    pub(crate) async fn boot(&self) -> u32 {
        self.create_sandbox(&options()).await.expect("created");
        match self.start_sandbox().await {
            Ok(pid) => pid,
            Err(error) => panic!("{error}\n{}", self.shim_log()),
        }
    }

    pub(crate) fn shim_log(&self) -> String {
        std::fs::read_to_string(self.bundle.join("shim.log")).unwrap_or_default()
    }

    pub(crate) async fn status(&self) -> SandboxStatusResponse {
        let request = SandboxStatusRequest {
            sandbox_id: self.id.clone(),
            verbose: true,
            ..Default::default()
        };
        self.sandbox
            .sandbox_status(with_duration(CALL_TIMEOUT), &request)
            .await
            .expect("status")
    }

    pub(crate) fn log_path(&self, id: &str) -> PathBuf {
        self.dir.path().join(format!("{id}.log"))
    }

    /// Creates a container that runs `sh -c script`.
    pub(crate) async fn create(
        &self,
        id: &str,
        script: &str,
        mounts: serde_json::Value,
    ) -> ttrpc::Result<u32> {
        let bundle = self.bundle.join("c").join(id);
        std::fs::create_dir_all(&bundle).expect("mkdir");
        let mut all = serde_json::json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ]);
        if let (Some(all), Some(more)) = (all.as_array_mut(), mounts.as_array()) {
            all.extend(more.iter().cloned());
        }
        let spec = serde_json::json!({
            "ociVersion": "1.1.0",
            "process": {
                "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["/bin/sh", "-c", script],
                "env": ["PATH=/bin"],
            },
            "root": {"path": "rootfs"},
            "mounts": all,
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}]},
        });
        std::fs::write(bundle.join("config.json"), spec.to_string()).expect("config.json");
        let request = CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle.display().to_string(),
            rootfs: vec![Mount {
                type_: "erofs".to_owned(),
                source: self.layer.display().to_string(),
                options: vec!["ro".to_owned()],
                ..Default::default()
            }],
            stdout: format!("cri://{}", self.log_path(id).display()),
            ..Default::default()
        };
        Ok(self
            .task
            .create(with_duration(BOOT_TIMEOUT), &request)
            .await?
            .pid)
    }

    pub(crate) async fn run(&self, id: &str, script: &str) {
        if let Err(error) = self.create(id, script, serde_json::json!([])).await {
            panic!("{error}\n{}", self.shim_log());
        }
        self.start_container(id).await;
    }

    pub(crate) async fn start_container(&self, id: &str) {
        let request = StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        if let Err(error) = self.task.start(with_duration(CALL_TIMEOUT), &request).await {
            panic!("{error}\n{}", self.shim_log());
        }
    }

    pub(crate) async fn wait(&self, id: &str) -> WaitResponse {
        let request = WaitRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.task
            .wait(with_duration(Duration::from_secs(600)), &request)
            .await
            .expect("waits")
    }

    pub(crate) async fn state(&self, id: &str) -> ttrpc::Result<StateResponse> {
        let request = StateRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.task.state(with_duration(CALL_TIMEOUT), &request).await
    }

    pub(crate) async fn kill(&self, id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = KillRequest {
            id: id.to_owned(),
            signal,
            ..Default::default()
        };
        self.task
            .kill(with_duration(CALL_TIMEOUT), &request)
            .await
            .map(drop)
    }

    pub(crate) async fn delete(&self, id: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        Ok(self
            .task
            .delete(with_duration(CALL_TIMEOUT), &request)
            .await?
            .exit_status)
    }

    pub(crate) async fn reopen_log(&self, id: &str) {
        let request = ReopenLogRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.log
            .reopen_log(with_duration(CALL_TIMEOUT), &request)
            .await
            .expect("reopened");
    }

    pub(crate) async fn stop(&self) {
        let request = StopSandboxRequest {
            sandbox_id: self.id.clone(),
            timeout_secs: 1,
            ..Default::default()
        };
        self.sandbox
            .stop_sandbox(with_duration(CALL_TIMEOUT), &request)
            .await
            .expect("stopped");
    }

    /// Stops and ends the shim and runs `delete`; fails if any process or mount remains.
    pub(crate) async fn end(self) {
        self.stop().await;
        let request = ShutdownSandboxRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        self.sandbox
            .shutdown_sandbox(with_duration(CALL_TIMEOUT), &request)
            .await
            .expect("ended");
        self.delete_action();
        assert_gone(&self.id).await;
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
        assert!(!mounts.contains(&self.id), "{mounts}");
    }

    pub(crate) fn delete_action(&self) {
        let answer = action(self.dir.path(), &self.bundle, &self.id, "delete");
        assert!(answer.status.success(), "{answer:?}");
    }
}

/// Kills the shim, and so its VM, after a failed test.
impl Drop for Shim {
    fn drop(&mut self) {
        for (pid, _) in processes_with(&self.id) {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
    }
}

/// Waits up to 5 s until no process has the sandbox's id in its command line.
pub(crate) async fn assert_gone(id: &str) {
    let mut remaining = Vec::new();
    for _ in 0..100 {
        remaining = processes_with(id);
        if remaining.is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("still running: {remaining:?}");
}

/// Returns the processes whose command lines contain `word`.
pub(crate) fn processes_with(word: &str) -> Vec<(i32, String)> {
    let own = std::process::id().to_string();
    std::fs::read_dir("/proc")
        .expect("/proc")
        .flatten()
        .filter(|entry| *entry.file_name().to_string_lossy() != *own)
        .filter_map(|entry| {
            let pid = entry.file_name().to_string_lossy().parse().ok()?;
            let line = std::fs::read_to_string(entry.path().join("cmdline")).ok()?;
            line.contains(word).then(|| (pid, line.replace('\0', " ")))
        })
        .collect()
}

/// Extracts the bytes of one stream of a CRI log.
pub(crate) fn log_bytes(log: &[u8], stream: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in log.split_inclusive(|byte| *byte == b'\n') {
        let text = line
            .strip_suffix(b"\n")
            .expect("every record ends with a newline");
        let mut fields = text.splitn(4, |byte| *byte == b' ');
        let (_, name, tag) = (
            fields.next(),
            fields.next().expect("stream"),
            fields.next().expect("tag"),
        );
        if name == stream.as_bytes() {
            bytes.extend_from_slice(fields.next().unwrap_or_default());
            if tag == b"F" {
                bytes.push(b'\n');
            }
        }
    }
    bytes
}

/// Returns the mount points of cgroup hierarchies.
fn cgroup_mounts() -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    boxlite_sys::mountinfo::mounts(&table)
        .filter(|mount| mount.kind.starts_with("cgroup"))
        .map(|mount| mount.point)
        .collect()
}

/// Returns the directories of that name at the top of any hierarchy.
pub(crate) fn cgroups_named(name: &str) -> Vec<PathBuf> {
    let all = cgroup_mounts().into_iter().map(|mount| mount.join(name));
    all.filter(|path| path.exists()).collect()
}

/// Reports whether a cgroup can be created in any hierarchy here.
pub(crate) fn cgroups_are_writable() -> bool {
    cgroup_mounts().into_iter().any(|mount| {
        let probe = mount.join("boxlite-test-probe");
        let made = std::fs::create_dir(&probe).is_ok();
        let _ = std::fs::remove_dir(&probe);
        made
    })
}
