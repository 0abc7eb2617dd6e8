//! Client behavior: messages of 16 MiB, fifty clients at once, and deadlines that expire during any call.

use crate::case;
use crate::client::{Cri, answer, within};
use crate::failure::Result;
use crate::pod::{Pod, container_spec, pod_spec};
use crate::runner::{Case, Context};
use crate::{ensure, poll, same};
use k8s_cri::v1::*;
use std::time::Duration;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(messages_of_16_mib_are_accepted, 60),
        case!(fifty_clients_are_served, 90),
        case!(expired_deadlines_leave_consistent_state, 120),
        case!(environment_values_may_be_any_bytes, 60),
    ]
}

/// Lists containers with a filter of this size.
async fn list_with(ctx: &Context, bytes: usize) -> std::result::Result<usize, tonic::Status> {
    let filter = PodSandboxFilter {
        label_selector: [("big".to_owned(), "x".repeat(bytes))].into(),
        ..Default::default()
    };
    let request = ListPodSandboxRequest {
        filter: Some(filter),
    };
    let mut client = ctx.node.cri.runtime();
    let answer = client.list_pod_sandbox(request).await?;
    Ok(answer.into_inner().items.len())
}

async fn messages_of_16_mib_are_accepted(ctx: Context) -> Result {
    let taken = list_with(&ctx, (16 << 20) - 1024).await;
    ensure!(
        taken.as_ref().is_ok_and(|n| *n == 0),
        "just below: {taken:?}"
    );
    let refused = list_with(&ctx, 17 << 20).await;
    ensure!(
        refused
            .as_ref()
            .is_err_and(|s| s.code() == tonic::Code::OutOfRange),
        "beyond: {refused:?}"
    );
    ensure!(
        list_with(&ctx, 1).await.is_ok(),
        "the daemon is not healthy"
    );
    Ok(())
}

async fn fifty_clients_are_served(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "fifty").await?;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    let clients = (0..50).map(|number| {
        let (socket, c) = (ctx.node.socket(), c.clone());
        tokio::spawn(async move {
            let cri = Cri::lazy(&socket)?;
            for _ in 0..4 {
                let mut client = cri.runtime();
                let list = ListContainersRequest::default();
                let list = answer("ListContainers", client.list_containers(list).await)?;
                ensure!(list.containers.iter().any(|l| l.id == c.id), "not listed");
                let status = ContainerStatusRequest {
                    container_id: c.id.clone(),
                    verbose: true,
                };
                answer("ContainerStatus", client.container_status(status).await)?;
                answer("Version", client.version(VersionRequest::default()).await)?;
            }
            let echo = ExecSyncRequest {
                container_id: c.id.clone(),
                cmd: vec!["echo".into(), number.to_string()],
                timeout: 0,
            };
            let request = within(Duration::from_secs(120), echo);
            let echoed = answer("ExecSync", cri.runtime().exec_sync(request).await)?;
            let wanted = format!("{number}\n");
            same!(echoed.stdout, wanted.as_bytes(), "echo");
            Ok(())
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client
            .await
            .map_err(|e| crate::failure::Failure(e.to_string()))??;
    }
    pod.end().await
}

async fn expired_deadlines_leave_consistent_state(ctx: Context) -> Result {
    let config = pod_spec(&ctx.node, "hasty");
    std::fs::create_dir_all(&config.log_directory)?;
    let run = RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: String::new(),
    };
    let mut client = ctx.node.cri.runtime();
    for milliseconds in [1, 30, 200] {
        let hasty = within(Duration::from_millis(milliseconds), run.clone());
        let hasty = client.run_pod_sandbox(hasty).await;
        ensure!(hasty.is_err(), "a pod in {milliseconds} ms");
    }
    let pod = Pod::run_with(&ctx.node, config.clone()).await?;
    let same_name = |p: &PodSandbox| p.metadata == config.metadata;
    let list = ListPodSandboxRequest::default();
    let list = answer("ListPodSandbox", client.list_pod_sandbox(list).await)?;
    same!(
        list.items.iter().filter(|p| same_name(p)).count(),
        1,
        "pods"
    );
    let create = CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: Some(container_spec("c", &ctx.images.base, &["sleep", "1000"])),
        sandbox_config: Some(config),
    };
    let short = Duration::from_millis(2);
    let _ = client.create_container(within(short, create.clone())).await;
    let c = pod.create_with(create.config.unwrap_or_default()).await?;
    let start = StartContainerRequest {
        container_id: c.id.clone(),
    };
    let _ = client.start_container(within(short, start)).await;
    c.start().await?;
    let exec = ExecSyncRequest {
        container_id: c.id.clone(),
        cmd: vec!["sleep".into(), "777".into()],
        timeout: 0,
    };
    let cut = client
        .exec_sync(within(Duration::from_millis(400), exec))
        .await;
    ensure!(cut.is_err(), "sleep 777 in 400 ms");
    poll::until("the command is killed", ctx.patience(10), || async {
        let ps = c.out(&["ps"]).await?;
        ensure!(!ps.contains("777"), "{ps}");
        Ok(())
    })
    .await?;
    let stop = StopContainerRequest {
        container_id: c.id.clone(),
        timeout: 0,
    };
    let _ = client.stop_container(within(short, stop)).await;
    c.stop(0).await?;
    let remove = RemoveContainerRequest {
        container_id: c.id.clone(),
    };
    let _ = client.remove_container(within(short, remove)).await;
    c.remove().await?;
    let stop = StopPodSandboxRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let _ = client.stop_pod_sandbox(within(short, stop)).await;
    pod.stop().await?;
    let remove = RemovePodSandboxRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let _ = client.remove_pod_sandbox(within(short, remove)).await;
    pod.remove().await
}

async fn environment_values_may_be_any_bytes(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "bytes").await?;
    let config = container_spec(
        "c",
        &ctx.images.base,
        &["sh", "-c", "echo \"[$GOOD]\"; sleep 1000"],
    );
    let request = RawCreate {
        pod_sandbox_id: pod.id.clone(),
        config: Some(RawConfig {
            metadata: config.metadata.clone(),
            image: config.image.clone(),
            command: config.command.clone(),
            envs: vec![
                RawVariable {
                    key: "BYTES".into(),
                    value: vec![0xff, 0xfe, b'x'],
                },
                RawVariable {
                    key: "GOOD".into(),
                    value: "é".into(),
                },
            ],
            log_path: config.log_path.clone(),
        }),
    };
    let made: CreateContainerResponse = ctx
        .node
        .cri
        .raw("CreateContainer", request)
        .await
        .map_err(|s| crate::client::status_failure(&s))?;
    let c = crate::pod::Container {
        pod: pod.clone(),
        id: made.container_id,
        config,
    };
    c.start().await?;
    c.printed("[é]", ctx.patience(20)).await?;
    let bytes = c.out(&["sh", "-c", "echo ${#BYTES}"]).await?;
    ensure!(bytes.trim() != "0", "the variable is empty");
    pod.end().await
}

/// CreateContainerRequest as of Kubernetes 1.34, in which an environment value is bytes; k8s-cri has a string.
#[derive(Clone, PartialEq, prost::Message)]
struct RawCreate {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    config: Option<RawConfig>,
}

/// Subset of the fields.
#[derive(Clone, PartialEq, prost::Message)]
struct RawConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
    #[prost(message, repeated, tag = "6")]
    envs: Vec<RawVariable>,
    #[prost(string, tag = "11")]
    log_path: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RawVariable {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}
