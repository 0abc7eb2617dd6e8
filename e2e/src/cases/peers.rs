//! Requests on which runtimes differ, as containerd answers them or as docs/conformance.md justifies; one case per request.
//!
//! Cases of this kind that belong to a subject (volumes, image volumes, user namespaces, CNI, NRI) are in that subject's file.
//! The tables of differences name the cases that hold them; `tidy/differences.rs` reads those tables.

use super::bad_input::expect_error;
use super::volumes::{mount, volume_dir};
use crate::client::{answer, within};
use crate::failure::Result;
use crate::pod::{Container, LONG_TIMEOUT, Pod, container_spec, pod_spec};
use crate::runner::{Case, Context};
use crate::{case, ensure, poll, same};
use k8s_cri::v1::*;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(host_network_pod_has_the_node_hostname, 60),
        case!(missing_host_path_is_created, 30),
        case!(privileged_container_needs_privileged_pod, 60),
        case!(memory_limit_below_usage_is_refused, 60),
        case!(stop_continues_without_its_client, 60),
        case!(stats_of_exited_container_are_refused, 30),
        case!(update_of_exited_container_is_refused, 30),
        case!(start_of_running_container_is_refused, 30),
        case!(log_directories_are_created, 30),
        case!(working_dir_must_be_a_directory, 30),
        case!(device_directory_is_expanded, 30),
        case!(unknown_capability_is_refused_by_name, 30),
        case!(exec_returns_while_a_child_holds_stdout, 30),
        case!(guest_kernel_is_as_documented, 30),
    ]
}

/// Memory that a container uses, and a limit below it, in MiB.
const USED_MIB: u64 = 24;
const LOW_LIMIT_MIB: u64 = 16;
/// Timeout of a StopContainer call in seconds, and the deadline of its client.
const STOP_SECONDS: i64 = 3;
const CLIENT_TIMEOUT: Duration = Duration::from_secs(1);

/// Runs a pod in the node's network with this hostname.
async fn host_network_pod(ctx: &Context, hostname: &str) -> Result<Pod> {
    let mut config = pod_spec(&ctx.node, "peers");
    config.hostname = hostname.into();
    config.linux.get_or_insert_default().security_context = Some(LinuxSandboxSecurityContext {
        namespace_options: Some(NamespaceOption {
            network: NamespaceMode::Node.into(),
            ..Default::default()
        }),
        ..Default::default()
    });
    Pod::run_with(&ctx.node, config).await
}

/// A kubelet sends no hostname for a pod in the node's network, whose agents identify the node by it.
async fn host_network_pod_has_the_node_hostname(ctx: Context) -> Result {
    let node = nix::unistd::gethostname()?.to_string_lossy().into_owned();
    for (requested, expected) in [("", node.as_str()), ("chosen", "chosen")] {
        let pod = host_network_pod(&ctx, requested).await?;
        let script = "hostname; echo $HOSTNAME; cat /etc/hostname";
        let seen = pod.sh(&ctx.images.base, script).await?;
        same!(
            seen,
            format!("{expected}\n").repeat(3),
            "hostname with {requested:?} in the request"
        );
        pod.end().await?;
    }
    Ok(())
}

async fn missing_host_path_is_created(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let path = volume_dir(&ctx, "made")?.join("by/the/runtime");
    let mut config = container_spec("c", &ctx.images.base, &["touch", "/made/file"]);
    config.mounts = vec![mount(&path, "/made")];
    let c = pod.start_with(config).await?;
    same!(c.exited(ctx.patience(20)).await?.exit_code, 0, "exit code");
    ensure!(path.join("file").is_file(), "no file in {}", path.display());
    pod.end().await
}

async fn privileged_container_needs_privileged_pod(ctx: Context) -> Result {
    let mut config = pod_spec(&ctx.node, "peers");
    config.linux.get_or_insert_default().security_context = None;
    let pod = Pod::run_with(&ctx.node, config).await?;
    let mut config = container_spec("c", &ctx.images.base, &["true"]);
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    expect_error(
        &pod.create_with(config).await.map(drop),
        &[
            "InvalidArgument",
            "security_context.privileged must be true",
        ],
    )?;
    pod.end().await
}

async fn update(c: &Container, memory_mib: u64) -> Result {
    let request = UpdateContainerResourcesRequest {
        container_id: c.id.clone(),
        linux: Some(LinuxContainerResources {
            memory_limit_in_bytes: i64::try_from(memory_mib << 20)?,
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut client = c.pod.node.cri.runtime();
    let request = within(LONG_TIMEOUT, request);
    let updated = client.update_container_resources(request).await;
    answer("UpdateContainerResources", updated).map(drop)
}

async fn memory_limit_below_usage_is_refused(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    // dd holds its buffer while the pipe is full.
    let script = format!("dd if=/dev/zero bs={USED_MIB}M count=1 | sleep 1000");
    let c = pod
        .start("c", &ctx.images.base, &["sh", "-c", &script])
        .await?;
    poll::until("the memory is in use", ctx.patience(20), || async {
        let memory = c.stats().await?.memory.unwrap_or_default();
        let usage = memory.usage_bytes.unwrap_or_default().value;
        ensure!(usage >= USED_MIB << 20, "{usage} bytes");
        Ok(())
    })
    .await?;
    expect_error(
        &update(&c, LOW_LIMIT_MIB).await,
        &[
            "FailedPrecondition",
            "memory_limit_in_bytes",
            &(LOW_LIMIT_MIB << 20).to_string(),
            &c.id,
            "uses",
        ],
    )?;
    same!(
        c.status().await?.state(),
        ContainerState::ContainerRunning,
        "after the refusal"
    );
    update(&c, 2 * USED_MIB).await?;
    pod.end().await
}

async fn stop_continues_without_its_client(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let deaf = "trap '' TERM; echo ready; while :; do sleep 1; done";
    let c = pod
        .start("c", &ctx.images.base, &["sh", "-c", deaf])
        .await?;
    c.printed("ready", ctx.patience(20)).await?;
    let begun = Instant::now();
    let request = StopContainerRequest {
        container_id: c.id.clone(),
        timeout: STOP_SECONDS,
    };
    let mut client = ctx.node.cri.runtime();
    let stop = client.stop_container(within(CLIENT_TIMEOUT, request)).await;
    let took = begun.elapsed();
    ensure!(
        stop.is_err() && took < Duration::from_secs(STOP_SECONDS.unsigned_abs()),
        "the client did not give up: {stop:?} after {took:?}"
    );
    same!(
        c.status().await?.state(),
        ContainerState::ContainerRunning,
        "while the timeout runs"
    );
    let status = c.exited(ctx.patience(20)).await?;
    ensure!(
        begun.elapsed() >= Duration::from_secs(STOP_SECONDS.unsigned_abs()),
        "killed {:?} after the request",
        begun.elapsed()
    );
    same!(status.exit_code, 137, "exit code after SIGKILL");
    pod.end().await
}

/// Runs `true` in the shared pod to its end.
async fn exited(ctx: &Context) -> Result<Container> {
    let pod = ctx.shared_pod().await;
    let c = pod.start("c", &ctx.images.base, &["true"]).await?;
    c.exited(ctx.patience(20)).await?;
    Ok(c)
}

async fn stats_of_exited_container_are_refused(ctx: Context) -> Result {
    let c = exited(&ctx).await?;
    expect_error(&c.stats().await, &["FailedPrecondition", &c.id, "exited"])?;
    c.pod.end().await
}

async fn update_of_exited_container_is_refused(ctx: Context) -> Result {
    let c = exited(&ctx).await?;
    expect_error(
        &update(&c, USED_MIB).await,
        &["FailedPrecondition", &c.id, "exited"],
    )?;
    c.pod.end().await
}

async fn start_of_running_container_is_refused(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    expect_error(
        &c.start().await,
        &["AlreadyExists", &c.id, "already running"],
    )?;
    same!(
        c.status().await?.state(),
        ContainerState::ContainerRunning,
        "after the second start"
    );
    pod.end().await
}

async fn log_directories_are_created(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let mut config = container_spec("c", &ctx.images.base, &["echo", "logged"]);
    config.log_path = "deep/er/0.log".into();
    // Not `create_with`, which creates the directory itself.
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: Some(config.clone()),
        sandbox_config: Some(pod.config.clone()),
    };
    let mut client = ctx.node.cri.runtime();
    let created = client.create_container(within(LONG_TIMEOUT, request)).await;
    let c = Container {
        pod: pod.clone(),
        id: answer("CreateContainer", created)?.container_id,
        config,
    };
    c.start().await?;
    c.exited(ctx.patience(20)).await?;
    same!(c.output()?, "logged\n", "log below directories of its own");
    pod.end().await
}

async fn working_dir_must_be_a_directory(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let dir = volume_dir(&ctx, "workdir")?;
    std::fs::write(dir.join("file"), "")?;
    // A file of the image, and one of a volume.
    for path in ["/etc/passwd", "/volume/file"] {
        let mut config = container_spec("c", &ctx.images.base, &["true"]);
        config.mounts = vec![mount(&dir, "/volume")];
        config.working_dir = path.into();
        expect_error(
            &pod.create_with(config).await.map(drop),
            &["InvalidArgument", "working_dir", path, "not a directory"],
        )?;
    }
    pod.end().await
}

/// Returns a request for a device under the host's path.
fn device(path: &str) -> Device {
    Device {
        host_path: path.into(),
        container_path: path.into(),
        permissions: "rw".into(),
    }
}

/// Directory of the host's /dev, removed at the end.
struct DeviceDirectory(PathBuf);

impl DeviceDirectory {
    /// Creates a directory with a node that no VM has at this path.
    fn new() -> Result<Self> {
        let path = PathBuf::from(format!("/dev/shm/boxlite-e2e-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        let made = Self(path);
        let mode = Mode::from_bits_truncate(0o600);
        mknod(&made.0.join("zero"), SFlag::S_IFCHR, mode, makedev(1, 5))?;
        Ok(made)
    }
}

impl Drop for DeviceDirectory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn device_directory_is_expanded(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let mut config = container_spec("c", &ctx.images.base, &["sleep", "1000"]);
    config.devices = vec![device("/dev/net")];
    let c = pod.start_with(config).await?;
    same!(
        c.out(&["stat", "-c", "%t:%T", "/dev/net/tun"]).await?,
        "a:c8\n",
        "device of the directory"
    );
    let foreign = DeviceDirectory::new()?;
    let path = foreign.0.display().to_string();
    let mut config = container_spec("foreign", &ctx.images.base, &["true"]);
    config.devices = vec![device(&path)];
    expect_error(
        &pod.create_with(config).await.map(drop),
        &["config.devices", &format!("{path}/zero")],
    )?;
    pod.end().await
}

async fn unknown_capability_is_refused_by_name(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let mut config = container_spec("c", &ctx.images.base, &["true"]);
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().capabilities = Some(Capability {
        add_capabilities: vec!["NET_SURF".into()],
        ..Default::default()
    });
    expect_error(
        &pod.create_with(config).await.map(drop),
        &["InvalidArgument", "capabilities", "NET_SURF"],
    )?;
    pod.end().await
}

async fn exec_returns_while_a_child_holds_stdout(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    let begun = Instant::now();
    let out = c.out(&["sh", "-c", "sleep 500 & echo started"]).await?;
    same!(out, "started\n", "output");
    ensure!(
        begun.elapsed() < ctx.patience(10),
        "returned after {:?}",
        begun.elapsed()
    );
    pod.end().await
}

/// Files of /proc that exist if the kernel has iptables, IPVS, VLANs and pressure.
const NODE_FILES: [&str; 4] = [
    "/proc/net/ip_tables_names",
    "/proc/net/ip_vs",
    "/proc/net/vlan",
    "/proc/pressure",
];

/// Rows of docs/volumes.md: what libkrunfw's kernel is built without and the one of `make kernel` has.
async fn guest_kernel_is_as_documented(ctx: Context) -> Result {
    let files = NODE_FILES.join(" ");
    let script = format!(
        "for f in {files}; do [ ! -e $f ] || echo $f; done; grep -owE 'nfs|nfs4|cifs|ceph' /proc/filesystems; true"
    );
    let expected = match ctx.install.has_built_kernel() {
        true => format!("{}\nnfs\nnfs4\n", NODE_FILES.join("\n")),
        false => String::new(),
    };
    let pod = ctx.shared_pod().await;
    same!(
        pod.sh(&ctx.images.base, &script).await?,
        expected,
        "parts of the guest's kernel"
    );
    pod.end().await
}
