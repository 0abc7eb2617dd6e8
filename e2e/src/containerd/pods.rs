//! Pods through containerd's CRI plugin, as a kubelet uses it: with a pause container (1.6, 2.x) and with 2.x's
//! `sandboxer = "shim"`.

use super::daemon::{Containerd, Version};
use super::{Case, Context, before};
use crate::case;
use crate::client::answer;
use crate::failure::Result;
use crate::namespaces::run;
use crate::node::Node;
use crate::pod::{Container, Pod, container_spec, pod_spec};
use crate::stream::{Session, Streams, Transport};
use crate::{ensure, poll, same};
use k8s_cri::v1::*;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::time::Duration;

/// Returns the cases.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(two_containers_share_a_vm, 120),
        case!(limits_and_annotations_apply, 120),
        case!(host_network_is_reachable, 90),
        case!(limits_change_while_running, 90),
        case!(second_writer_is_logged_or_refused, 150),
        case!(input_ends_with_the_client, 60),
        case!(terminal_is_resized, 60),
        case!(shim_serves_as_sandboxer, 150)
            .unless(before(Version::V2), "the Sandbox API came with 2.0"),
        case!(erofs_layers_are_used, 150)
            .unless(before(Version::V2), "1.x has no EROFS snapshotter"),
    ]
}

/// Returns its CRI socket as a node.
pub(crate) fn node(daemon: &Containerd) -> Result<Arc<Node>> {
    Ok(Arc::new(Node::foreign(&daemon.dir)?))
}

async fn two_containers_share_a_vm(ctx: Context) -> Result {
    let node = node(&ctx.shared)?;
    run_lifecycle(&ctx, Pod::run(&node, "pods").await?).await
}

async fn shim_serves_as_sandboxer(ctx: Context) -> Result {
    let daemon = ctx
        .dedicated_daemon("sb", |options| options.sandboxer = "shim")
        .await?;
    let node = node(&daemon)?;
    run_lifecycle(&ctx, Pod::run(&node, "sandboxer").await?).await
}

async fn erofs_layers_are_used(ctx: Context) -> Result {
    let daemon = ctx
        .dedicated_daemon("er", |options| options.snapshotter = "erofs")
        .await?;
    let node = node(&daemon)?;
    run_lifecycle(&ctx, Pod::run(&node, "erofs").await?).await?;
    // The snapshotter keeps the layers of an image mounted while the image exists.
    let image = ImageSpec {
        image: super::IMAGE.to_owned(),
        ..Default::default()
    };
    let request = RemoveImageRequest { image: Some(image) };
    answer("RemoveImage", node.cri.image().remove_image(request).await).map(drop)
}

/// Runs the life of a pod from its first container to its removal.
async fn run_lifecycle(ctx: &Context, pod: Pod) -> Result {
    let web = pod
        .start(
            "web",
            super::IMAGE,
            &["sh", "-c", "echo from-web; httpd -f -p 80"],
        )
        .await?;
    let peer = pod.start("peer", super::IMAGE, &["sleep", "600"]).await?;
    // One VM: the same boot id, hostname and network; separate processes.
    let boot = ["cat", "/proc/sys/kernel/random/boot_id"];
    same!(web.out(&boot).await?, peer.out(&boot).await?, "boot id");
    let hostname = peer.out(&["hostname"]).await?;
    same!(hostname.trim(), pod.config.hostname, "hostname");
    peer.out(&[
        "sh",
        "-c",
        "echo hello > /tmp/index.html; wget -q -O - http://127.0.0.1:80/ || true",
    ])
    .await?;
    let address = address(&pod).await?;
    let seen = peer.out(&["ip", "-4", "addr", "show", "eth0"]).await?;
    ensure!(
        seen.contains(&address),
        "CNI gave {address}; the guest has {seen}"
    );
    let resolv = peer.out(&["cat", "/etc/resolv.conf"]).await?;
    ensure!(!resolv.trim().is_empty(), "no resolv.conf");
    // containerd writes this file and omits trailing zeros of the time, which the strict reader rejects.
    poll::until("the line is in the log", ctx.patience(20), || async {
        let text = std::fs::read_to_string(web.log())?;
        ensure!(text.ends_with(" stdout F from-web\n"), "{text:?}");
        Ok(())
    })
    .await?;
    local_port(ctx, &peer).await?;
    // The root file system comes through the share, and setuid programs work in it.
    let mounts = peer.out(&["grep", " / ", "/proc/mounts"]).await?;
    ensure!(!mounts.contains("nosuid"), "{mounts}");
    let failed = peer
        .exec(&["sh", "-c", "echo out; echo err >&2; exit 5"])
        .await?;
    same!(failed.exit_code, 5, "exit code of an exec");
    same!(
        (failed.stdout.as_slice(), failed.stderr.as_slice()),
        (&b"out\n"[..], &b"err\n"[..]),
        "its output"
    );
    let stats = peer.stats().await?;
    let used = stats.memory.and_then(|memory| memory.working_set_bytes);
    ensure!(used.is_some_and(|used| used.value > 0), "no memory counted");

    let short = pod
        .start("short", super::IMAGE, &["sh", "-c", "exit 9"])
        .await?;
    same!(
        short.exited(ctx.patience(20)).await?.exit_code,
        9,
        "exit code"
    );
    short.remove().await?;
    web.stop(0).await?;
    same!(
        web.status().await?.state(),
        ContainerState::ContainerExited,
        "state after the stop"
    );
    pod.stop().await?;
    pod.remove().await
}

/// Connects to the loopback of the pod's network namespace on the node, as containerd's port-forward does.
async fn local_port(ctx: &Context, peer: &Container) -> Result {
    let script = "echo forwarded > /tmp/index.html; httpd -p 127.0.0.1:8080 -h /tmp";
    peer.out(&["sh", "-c", script]).await?;
    let mut namespaces = std::fs::read_dir("/run/netns")?;
    let Some(netns) = namespaces.next() else {
        crate::bail!("the pod has no network namespace on the node")
    };
    let flag = format!("--net={}", netns?.path().display());
    let wget = [&flag, "busybox", "wget", "-q", "-O", "-"];
    let args = [&wget[..], &["http://127.0.0.1:8080/index.html"]].concat();
    poll::until("port-forward finds the pod", ctx.patience(10), || async {
        same!(run("nsenter", &args)?, "forwarded\n", "the page");
        Ok(())
    })
    .await
}

async fn address(pod: &Pod) -> Result<String> {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: false,
    };
    let status = pod
        .node
        .cri
        .runtime()
        .pod_sandbox_status(request)
        .await?
        .into_inner()
        .status
        .unwrap_or_default();
    same!(
        status.state(),
        PodSandboxState::SandboxReady,
        "state of the sandbox"
    );
    Ok(status.network.unwrap_or_default().ip)
}

async fn limits_and_annotations_apply(ctx: Context) -> Result {
    let daemon = ctx
        .dedicated_daemon("lim", |options| {
            options.shim = "allowed_annotations = [\"io.boxlite.vcpus\"]".into()
        })
        .await?;
    let node = node(&daemon)?;
    let mut config = pod_spec(&node, "limits");
    config
        .annotations
        .insert("io.boxlite.vcpus".into(), "2".into());
    let pod = Pod::run_with(&node, config).await?;
    let one = pod.start("one", super::IMAGE, &["sleep", "600"]).await?;
    let cpus = one.out(&["nproc"]).await?;
    same!(cpus.trim(), "2", "CPUs");
    pod.stop().await?;
    pod.remove().await?;
    for (name, word) in [
        ("io.boxlite.memory-mib", "allowed_annotations"),
        ("io.boxlite.speed", "unknown annotation"),
    ] {
        let mut config = pod_spec(&node, "refused");
        config.annotations.insert(name.into(), "512".into());
        let Err(failure) = Pod::run_with(&node, config).await else {
            crate::bail!("{name} was applied or ignored")
        };
        ensure!(
            failure.0.contains(name) && failure.0.contains(word),
            "{}",
            failure.0
        );
    }
    Ok(())
}

async fn host_network_is_reachable(ctx: Context) -> Result {
    const PORT: u16 = 12013;
    let node = node(&ctx.shared)?;
    let mut config = pod_spec(&node, "host");
    if let Some(linux) = &mut config.linux {
        linux.security_context = Some(LinuxSandboxSecurityContext {
            namespace_options: Some(NamespaceOption {
                network: NamespaceMode::Node.into(),
                ..Default::default()
            }),
            ..Default::default()
        });
    }
    let pod = Pod::run_with(&node, config).await?;
    let script = format!("echo from-host-pod > /tmp/index.html; exec httpd -f -p {PORT} -h /tmp");
    pod.start("web", super::IMAGE, &["sh", "-c", &script])
        .await?;
    let url = format!("http://127.0.0.1:{PORT}/index.html");
    poll::until("the node reaches the pod", ctx.patience(20), || async {
        let seen = run("busybox", &["wget", "-q", "-O", "-", &url])?;
        same!(seen, "from-host-pod\n", "the page");
        Ok(())
    })
    .await?;
    pod.end().await
}

/// Tests UpdateContainerResources, which calls Update of the task.
async fn limits_change_while_running(ctx: Context) -> Result {
    let (pod, container) = sleeper(&ctx.shared, "update").await?;
    let request = UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(LinuxContainerResources {
            memory_limit_in_bytes: 48 << 20,
            cpu_quota: 30_000,
            cpu_period: 100_000,
            ..Default::default()
        }),
        ..Default::default()
    };
    answer(
        "UpdateContainerResources",
        pod.node
            .cri
            .runtime()
            .update_container_resources(request)
            .await,
    )?;
    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
    let seen = container.out(&["sh", "-c", script]).await?;
    same!(
        seen,
        format!("{}\n30000 100000\n", 48 << 20),
        "the container's limits"
    );
    pod.end().await
}

/// Tests CloseIO, as `kubectl exec -i` causes it.
/// Tests `pod.shared_volume_writers` with both values.
async fn second_writer_is_logged_or_refused(ctx: Context) -> Result {
    let volume = ctx.scratch.join("ctd-shared");
    std::fs::create_dir_all(&volume)?;
    let config = || {
        let mut config = container_spec("c", super::IMAGE, &["sleep", "600"]);
        config.mounts = vec![Mount {
            host_path: volume.display().to_string(),
            container_path: "/v".into(),
            ..Default::default()
        }];
        config
    };
    let name = volume.display().to_string();
    let shared = node(&ctx.shared)?;
    let first = Pod::run(&shared, "writer-a").await?;
    first.start_with(config()).await?;
    let second = Pod::run(&shared, "writer-b").await?;
    second.start_with(config()).await?;
    poll::until("containerd logs the warning", ctx.patience(10), || async {
        let log = std::fs::read_to_string(ctx.shared.log())?;
        let warned = |line: &str| line.contains("file locks do not reach") && line.contains(&name);
        ensure!(log.lines().any(warned), "no warning that names {name}");
        Ok(())
    })
    .await?;
    second.end().await?;
    let daemon = ctx
        .dedicated_daemon("wr", |options| {
            options.shim = "pod.shared_volume_writers = \"refuse\"".into()
        })
        .await?;
    // The first pod is one of another containerd on this node.
    let refusing = node(&daemon)?;
    let third = Pod::run(&refusing, "writer-c").await?;
    let Err(refusal) = third.start_with(config()).await else {
        crate::bail!("a second pod writes to {name}")
    };
    ensure!(
        refusal.0.contains(&name) && refusal.0.contains(&first.id),
        "{}",
        refusal.0
    );
    first.end().await?;
    let mut config = config();
    if let Some(metadata) = &mut config.metadata {
        metadata.name = "again".into();
    }
    third.start_with(config).await?;
    third.end().await
}

/// Tests CloseIO, as `kubectl exec -i` causes it.
async fn input_ends_with_the_client(ctx: Context) -> Result {
    let (pod, container) = sleeper(&ctx.shared, "input").await?;
    let typing = Streams {
        stdin: true,
        stderr: true,
        tty: false,
    };
    let url = container.exec_url(&["sha256sum"], typing).await?;
    let mut session = Session::open(&url, Transport::Spdy, typing).await?;
    session.send("stdin", b"typed").await?;
    session.close("stdin").await?;
    let sum = hex::encode(Sha256::digest(b"typed"));
    same!(
        session.rest("stdout").await?,
        format!("{sum}  -\n").into_bytes(),
        "output of the command at the end of its input"
    );
    same!(session.exit_code().await?, 0, "exit code");
    pod.end().await
}

/// Tests ResizePty, as `kubectl exec -t` causes it.
async fn terminal_is_resized(ctx: Context) -> Result {
    let (pod, container) = sleeper(&ctx.shared, "terminal").await?;
    let terminal = Streams {
        stdin: true,
        stderr: false,
        tty: true,
    };
    let script = "while read -r line; do stty size; done; exit 4";
    let url = container.exec_url(&["sh", "-c", script], terminal).await?;
    let mut session = Session::open(&url, Transport::Spdy, terminal).await?;
    for (width, height) in [(80, 24), (132, 50)] {
        session.resize_and_see(width, height).await?;
    }
    session.send("stdin", b"\x04").await?;
    same!(session.exit_code().await?, 4, "exit code on a terminal");
    pod.end().await
}

/// Runs a pod with one container that sleeps.
pub(crate) async fn sleeper(daemon: &Containerd, name: &str) -> Result<(Pod, Container)> {
    let node = node(daemon)?;
    let pod = Pod::run(&node, name).await?;
    let container = pod
        .start_with(container_spec("c", super::IMAGE, &["sleep", "600"]))
        .await?;
    Ok((pod, container))
}

/// Time within which containerd notices a broken connection to a shim.
pub(crate) const NOTICE_TIMEOUT: Duration = Duration::from_secs(20);
