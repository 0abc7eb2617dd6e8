//! Bad input of every kind: the error names the thing, what had been done is undone, the daemon is well.

use crate::client::answer;
use crate::node::{Node, NodeOptions};
use crate::outcome::Result;
use crate::pod::{Pod, container_spec, pod_spec};
use crate::runner::{Case, Shared, case};
use crate::{ensure, same, wait};
use k8s_cri::v1::*;
use serde_json::json;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

pub fn cases() -> Vec<Case> {
    vec![
        case("bad::missing_host_path", 60, missing_host_path),
        case("bad::unknown_runtime_handler", 30, unknown_handler),
        case("bad::requests_without_their_parts", 60, incomplete_requests),
        case("bad::no_cni_configuration", 60, no_network),
        case("bad::cni_plugin_that_fails", 60, failing_plugin),
        case("bad::cni_plugin_that_hangs", 90, hanging_plugin),
        case("bad::guest_that_never_gets_ready", 120, silent_guest),
        case("bad::program_that_is_not_there", 60, missing_program),
        case("bad::config_file_with_an_unknown_key", 30, unknown_key),
    ]
}

/// The failure's text must hold all of these (any of those between `|`).
pub fn says<T: std::fmt::Debug>(outcome: &Result<T>, words: &[&str]) -> Result {
    let Err(failure) = outcome else {
        crate::bail!("no error but {outcome:?}")
    };
    let text = failure.0.to_lowercase();
    for word in words {
        let any = word.split('|').any(|w| text.contains(&w.to_lowercase()));
        ensure!(any, "the error does not say {word:?}: {}", failure.0);
    }
    Ok(())
}

async fn missing_host_path(world: Shared) -> Result {
    let pod = Pod::run(&world.node, "nopath").await?;
    let mut config = container_spec("c", &world.images.base, &["true"]);
    config.mounts = vec![Mount {
        host_path: "/no/such/path/on/the/host".into(),
        container_path: "/x".into(),
        ..Default::default()
    }];
    let outcome = async { pod.start_with(config.clone()).await.map(drop) }.await;
    says(&outcome, &["/no/such/path/on/the/host"])?;
    let list = ListContainersRequest::default();
    let left = world
        .node
        .cri
        .runtime()
        .list_containers(list)
        .await?
        .into_inner()
        .containers;
    ensure!(
        left.iter()
            .all(|c| c.state() != ContainerState::ContainerRunning),
        "a container runs: {left:?}"
    );
    config.mounts.clear();
    if left.is_empty() {
        pod.start_with(config)
            .await?
            .exited(world.patience(20))
            .await?;
    }
    pod.end().await
}

async fn unknown_handler(world: Shared) -> Result {
    let request = RunPodSandboxRequest {
        config: Some(pod_spec(&world.node, "handler")),
        runtime_handler: "gvisor".into(),
    };
    let outcome = answer(
        "RunPodSandbox",
        world.node.cri.runtime().run_pod_sandbox(request).await,
    )
    .map(drop);
    says(&outcome, &["gvisor", "handler"])?;
    let left = world.pods(PodSandboxFilter::default()).await?;
    same!(left.len(), 0, "pods");
    Ok(())
}

async fn incomplete_requests(world: Shared) -> Result {
    let mut client = world.node.cri.runtime();
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
        config: Some(container_spec("c", &world.images.base, &["true"])),
        sandbox_config: Some(pod_spec(&world.node, "x")),
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
    let pull = world
        .node
        .cri
        .image()
        .pull_image(PullImageRequest::default())
        .await
        .map(drop);
    same!(code(pull), invalid, "no image");
    Ok(())
}

async fn no_network(world: Shared) -> Result {
    let node = world.own_node("nocni", |o| o.network = false).await?;
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
    says(&Pod::run(&node, "nonet").await.map(drop), &["cni|network"])?;
    // A configuration that comes later is taken without a restart.
    std::fs::copy(
        world.node.dir.join("cni/10-e2e.conflist"),
        node.dir.join("cni/10-e2e.conflist"),
    )?;
    wait::until("NetworkReady", world.patience(10), || async {
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

/// A node with a shell script as its only CNI plugin.
async fn node_with_plugin(
    world: &Shared,
    name: &str,
    script: &str,
    timeout: u32,
) -> Result<std::sync::Arc<Node>> {
    let dir = world.scratch.join(format!("{name}-bin"));
    std::fs::create_dir_all(&dir)?;
    let plugin = dir.join("e2e-plugin");
    std::fs::write(&plugin, script)?;
    std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755))?;
    world
        .own_node(name, |o| {
            o.cni_bin = Some(dir);
            o.cni_timeout = timeout;
            o.cni_plugins = Some(json!([{"type": "e2e-plugin"}]));
        })
        .await
}

/// Nothing of a failed RunPodSandbox is left: no netns, no process of a pod, and the list names no ready pod.
async fn undone(node: &std::sync::Arc<Node>) -> Result {
    let list = node
        .cri
        .runtime()
        .list_pod_sandbox(ListPodSandboxRequest::default())
        .await?
        .into_inner()
        .items;
    ensure!(
        list.iter()
            .all(|p| p.state() != PodSandboxState::SandboxReady),
        "a failed pod is ready: {list:?}"
    );
    for pod in list {
        let id = pod.id;
        node.cri
            .runtime()
            .stop_pod_sandbox(StopPodSandboxRequest {
                pod_sandbox_id: id.clone(),
            })
            .await?;
        node.cri
            .runtime()
            .remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: id })
            .await?;
    }
    same!(
        std::fs::read_dir("/run/netns")?.count(),
        0,
        "network namespaces"
    );
    wait::until("no shim of this node", Duration::from_secs(10), || async {
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

async fn failing_plugin(world: Shared) -> Result {
    let script = "#!/bin/sh\ncat >/dev/null\n[ \"$CNI_COMMAND\" = ADD ] || exit 0\n\
        echo '{\"cniVersion\":\"1.0.0\",\"code\":101,\"msg\":\"no addresses left in the pool\"}'\nexit 1\n";
    let node = node_with_plugin(&world, "failcni", script, 20).await?;
    says(
        &Pod::run(&node, "fails").await.map(drop),
        &["e2e-plugin", "no addresses left in the pool"],
    )?;
    undone(&node).await
}

async fn hanging_plugin(world: Shared) -> Result {
    let script = "#!/bin/sh\n[ \"$CNI_COMMAND\" = ADD ] || exit 0\nsleep 6543\n";
    let node = node_with_plugin(&world, "hangcni", script, 2).await?;
    let start = Instant::now();
    says(
        &Pod::run(&node, "hangs").await.map(drop),
        &["e2e-plugin", "time|2 s|within"],
    )?;
    ensure!(
        start.elapsed() < world.patience(20),
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
    undone(&node).await
}

async fn silent_guest(world: Shared) -> Result {
    // An agent that says something and goes: PID 1 ends, the kernel panics, and its last lines are in the error.
    let agent = world.scratch.join("dying-agent");
    std::fs::copy("/bin/true", &agent)?;
    let node = world
        .own_node("silent", |o| {
            o.guest = Some(agent);
            o.run_pod_seconds = 60;
        })
        .await?;
    let start = Instant::now();
    says(
        &Pod::run(&node, "silent").await.map(drop),
        &["panic|init|console|guest|ready"],
    )?;
    ensure!(
        start.elapsed() < world.patience(70),
        "noticed after {:?}",
        start.elapsed()
    );
    undone(&node).await
}

async fn missing_program(world: Shared) -> Result {
    let pod = Pod::run(&world.node, "noprogram").await?;
    let c = pod
        .create("c", &world.images.base, &["/no/such/program"])
        .await;
    let outcome = match c {
        Ok(c) => c.start().await,
        Err(failure) => Err(failure),
    };
    says(&outcome, &["/no/such/program"])?;
    let c = pod.start("fine", &world.images.base, &["true"]).await?;
    same!(
        c.exited(world.patience(20)).await?.exit_code,
        0,
        "the next container"
    );
    pod.end().await
}

async fn unknown_key(world: Shared) -> Result {
    let node = Node::prepare(
        &world.scratch,
        &world.install,
        &NodeOptions::new("key", world.home.vmm()),
    )?;
    let file = node.dir.join("config.toml");
    let text = std::fs::read_to_string(&file)?;
    std::fs::write(
        &file,
        format!("colour = \"blue\"\n{text}\n[pods]\nvcpu = 1\n"),
    )?;
    let start = node.serve().await;
    says(&start, &["colour", "pods"])?;
    Ok(())
}
