//! Invalid input: the error names the object, partial work is undone, and the daemon remains healthy.

use crate::case;
use crate::client::{answer, status_failure};
use crate::failure::Result;
use crate::node::{Node, NodeOptions};
use crate::pod::{Pod, container_spec, pod_spec};
use crate::runner::{Case, Context};
use crate::{ensure, poll, same};
use k8s_cri::v1::*;
use serde_json::json;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(impossible_host_path_is_refused, 60),
        case!(unknown_runtime_handler_is_refused, 30),
        case!(incomplete_requests_are_refused, 60),
        case!(missing_cni_configuration_is_reported, 60),
        case!(failing_cni_plugin_leaves_nothing_behind, 60),
        case!(hanging_cni_plugin_is_killed, 90),
        case!(silent_guest_times_out_with_its_console, 120),
        case!(missing_program_is_reported_by_name, 60),
        case!(limit_too_low_for_the_init_process_is_named, 60),
        case!(unknown_config_key_is_refused, 30),
    ]
}

/// Fails unless the error contains all of these words (any of those separated by `|`).
pub(crate) fn expect_error<T: std::fmt::Debug>(outcome: &Result<T>, words: &[&str]) -> Result {
    let Err(failure) = outcome else {
        crate::bail!("expected an error, got {outcome:?}")
    };
    let text = failure.0.to_lowercase();
    for word in words {
        let any = word.split('|').any(|w| text.contains(&w.to_lowercase()));
        ensure!(any, "the error does not say {word:?}: {}", failure.0);
    }
    Ok(())
}

async fn impossible_host_path_is_refused(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "nopath").await?;
    let mut config = container_spec("c", &ctx.images.base, &["true"]);
    config.mounts = vec![Mount {
        host_path: "/proc/no/such/path/on/the/host".into(),
        container_path: "/x".into(),
        ..Default::default()
    }];
    let outcome = async { pod.start_with(config.clone()).await.map(drop) }.await;
    expect_error(&outcome, &["/proc/no/such/path/on/the/host"])?;
    let left = ctx.node.containers().await?;
    ensure!(
        left.iter()
            .all(|c| c.state() != ContainerState::ContainerRunning),
        "a container runs: {left:?}"
    );
    config.mounts.clear();
    if left.is_empty() {
        pod.start_with(config)
            .await?
            .exited(ctx.patience(20))
            .await?;
    }
    pod.end().await
}

async fn unknown_runtime_handler_is_refused(ctx: Context) -> Result {
    let request = RunPodSandboxRequest {
        config: Some(pod_spec(&ctx.node, "handler")),
        runtime_handler: "gvisor".into(),
    };
    let outcome = answer(
        "RunPodSandbox",
        ctx.node.cri.runtime().run_pod_sandbox(request).await,
    )
    .map(drop);
    expect_error(&outcome, &["gvisor", "handler"])?;
    let left = ctx.pods(PodSandboxFilter::default()).await?;
    same!(left.len(), 0, "pods");
    Ok(())
}

async fn incomplete_requests_are_refused(ctx: Context) -> Result {
    let mut client = ctx.node.cri.runtime();
    let code = |s: std::result::Result<(), tonic::Status>| s.err().map(|s| s.code());
    let invalid = Some(tonic::Code::InvalidArgument);
    same!(
        code(
            client
                .run_pod_sandbox(RunPodSandboxRequest::default())
                .await
                .map(drop)
        ),
        invalid,
        "no sandbox config"
    );
    let nameless = RunPodSandboxRequest {
        config: Some(PodSandboxConfig::default()),
        ..Default::default()
    };
    same!(
        code(client.run_pod_sandbox(nameless).await.map(drop)),
        invalid,
        "no metadata"
    );
    let nowhere = CreateContainerRequest {
        pod_sandbox_id: "0".repeat(64),
        config: Some(container_spec("c", &ctx.images.base, &["true"])),
        sandbox_config: Some(pod_spec(&ctx.node, "x")),
    };
    same!(
        code(client.create_container(nowhere).await.map(drop)),
        Some(tonic::Code::NotFound),
        "no such sandbox"
    );
    same!(
        code(
            client
                .start_container(StartContainerRequest {
                    container_id: "nope".into()
                })
                .await
                .map(drop)
        ),
        Some(tonic::Code::NotFound),
        "no such container"
    );
    same!(
        code(
            client
                .container_status(ContainerStatusRequest {
                    container_id: "nope".into(),
                    verbose: false
                })
                .await
                .map(drop)
        ),
        Some(tonic::Code::NotFound),
        "status of no container"
    );
    let pull = ctx
        .node
        .cri
        .image()
        .pull_image(PullImageRequest::default())
        .await
        .map(drop);
    same!(code(pull), invalid, "no image");
    Ok(())
}

async fn missing_cni_configuration_is_reported(ctx: Context) -> Result {
    let node = ctx.dedicated_node("nocni", |o| o.network = false).await?;
    let status = answer(
        "Status",
        node.cri.runtime().status(StatusRequest::default()).await,
    )?
    .status
    .unwrap_or_default();
    let Some(network) = status
        .conditions
        .iter()
        .find(|c| c.r#type == "NetworkReady")
    else {
        crate::bail!("no NetworkReady condition")
    };
    ensure!(!network.status, "NetworkReady without a CNI configuration");
    ensure!(
        network
            .message
            .contains(&node.dir.join("cni").display().to_string()),
        "the reason names no directory: {network:?}"
    );
    expect_error(&Pod::run(&node, "nonet").await.map(drop), &["cni|network"])?;
    // A configuration added later is used without a restart.
    std::fs::copy(
        ctx.node.dir.join("cni/10-e2e.conflist"),
        node.dir.join("cni/10-e2e.conflist"),
    )?;
    poll::until("NetworkReady", ctx.patience(10), || async {
        let status = node
            .cri
            .runtime()
            .status(StatusRequest::default())
            .await?
            .into_inner()
            .status
            .unwrap_or_default();
        ensure!(
            status.conditions.iter().all(|c| c.status),
            "{:?}",
            status.conditions
        );
        Ok(())
    })
    .await
}

/// Starts a node with a shell script as its only CNI plugin.
async fn node_with_plugin(
    ctx: &Context,
    name: &str,
    script: &str,
    timeout: u32,
) -> Result<std::sync::Arc<Node>> {
    let dir = ctx.scratch.join(format!("{name}-bin"));
    std::fs::create_dir_all(&dir)?;
    let plugin = dir.join("e2e-plugin");
    std::fs::write(&plugin, script)?;
    std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755))?;
    ctx.dedicated_node(name, |o| {
        o.cni_bin = Some(dir);
        o.cni_timeout = timeout;
        o.cni_plugins = Some(json!([{"type": "e2e-plugin"}]));
    })
    .await
}

/// Fails unless a failed RunPodSandbox left no netns, no process and no ready pod.
async fn expect_no_remains(node: &std::sync::Arc<Node>) -> Result {
    let list = node.pods().await?;
    ensure!(
        list.iter()
            .all(|p| p.state() != PodSandboxState::SandboxReady),
        "a failed pod is ready: {list:?}"
    );
    for pod in list {
        node.cri.remove_pod(pod.id).await?;
    }
    same!(
        std::fs::read_dir("/run/netns")?.count(),
        0,
        "network namespaces"
    );
    poll::until("no shim of this node", Duration::from_secs(10), || async {
        for entry in std::fs::read_dir("/proc")? {
            let Ok(args) = std::fs::read(entry?.path().join("cmdline")) else {
                continue;
            };
            let args = String::from_utf8_lossy(&args).replace('\0', " ");
            ensure!(
                !(args.contains("containerd-shim")
                    && args.contains(&node.dir.display().to_string())),
                "{args}"
            );
        }
        Ok(())
    })
    .await
}

async fn failing_cni_plugin_leaves_nothing_behind(ctx: Context) -> Result {
    let script = "#!/bin/sh\ncat >/dev/null\n[ \"$CNI_COMMAND\" = ADD ] || exit 0\n\
        echo '{\"cniVersion\":\"1.0.0\",\"code\":101,\"msg\":\"no addresses left in the pool\"}'\nexit 1\n";
    let node = node_with_plugin(&ctx, "failcni", script, 20).await?;
    expect_error(
        &Pod::run(&node, "fails").await.map(drop),
        &["e2e-plugin", "no addresses left in the pool"],
    )?;
    expect_no_remains(&node).await
}

async fn hanging_cni_plugin_is_killed(ctx: Context) -> Result {
    let script = "#!/bin/sh\n[ \"$CNI_COMMAND\" = ADD ] || exit 0\nsleep 6543\n";
    let node = node_with_plugin(&ctx, "hangcni", script, 2).await?;
    let start = Instant::now();
    expect_error(
        &Pod::run(&node, "hangs").await.map(drop),
        &["e2e-plugin", "time|2 s|within"],
    )?;
    ensure!(
        start.elapsed() < ctx.patience(20),
        "a plugin with 2 s took {:?}",
        start.elapsed()
    );
    let left = std::process::Command::new("pgrep")
        .args(["-f", "sleep 6543"])
        .output()?;
    same!(
        String::from_utf8_lossy(&left.stdout),
        "",
        "processes of the hung plugin"
    );
    expect_no_remains(&node).await
}

async fn silent_guest_times_out_with_its_console(ctx: Context) -> Result {
    // An agent that prints a line and exits: PID 1 ends, the kernel panics, and the error contains the last lines.
    let agent = ctx.scratch.join("dying-agent");
    std::fs::copy("/bin/true", &agent)?;
    let node = ctx
        .dedicated_node("silent", |o| {
            o.guest = Some(agent);
            o.run_pod_seconds = 60;
        })
        .await?;
    let start = Instant::now();
    expect_error(
        &Pod::run(&node, "silent").await.map(drop),
        &["panic|init|console|guest|ready"],
    )?;
    ensure!(
        start.elapsed() < ctx.patience(70),
        "noticed after {:?}",
        start.elapsed()
    );
    expect_no_remains(&node).await
}

async fn missing_program_is_reported_by_name(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "noprogram").await?;
    let c = pod
        .create("c", &ctx.images.base, &["/no/such/program"])
        .await;
    let outcome = match c {
        Ok(c) => c.start().await,
        Err(failure) => Err(failure),
    };
    let invalid = ["InvalidArgument", "/no/such/program"];
    expect_error(&outcome, &invalid)?;
    let c = pod
        .start("fine", &ctx.images.base, &["sleep", "1000"])
        .await?;
    let exec = c.exec_raw(&["/no/such/program"], 0).await;
    expect_error(&exec.map_err(|s| status_failure(&s)), &invalid)?;
    pod.end().await
}

/// Creates a container whose init process the kernel kills before it can wait for Start.
async fn limit_too_low_for_the_init_process_is_named(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let mut config = container_spec("starved", &ctx.images.base, &["true"]);
    config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: 64 << 10,
        ..Default::default()
    });
    let outcome = pod.create_with(config).await.map(drop);
    expect_error(&outcome, &["resourceexhausted", "memory limit", "too low"])?;
    same!(
        pod.sh(&ctx.images.base, "echo alive").await?,
        "alive\n",
        "a container behind it"
    );
    Ok(())
}

async fn unknown_config_key_is_refused(ctx: Context) -> Result {
    let node = Node::prepare(
        &ctx.scratch,
        &ctx.install,
        &NodeOptions::new("key", ctx.backend.vmm()),
    )?;
    let file = node.dir.join("config.toml");
    let text = std::fs::read_to_string(&file)?;
    std::fs::write(
        &file,
        format!("color = \"blue\"\n{text}\n[pods]\nvcpu = 1\n"),
    )?;
    let start = node.serve().await;
    expect_error(&start, &["color", "pods"])?;
    Ok(())
}
