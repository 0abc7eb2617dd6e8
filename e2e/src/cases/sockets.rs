//! Unix sockets in volumes: containers of a pod reach each other through one; a socket of the node is refused when the
//! container is created.

use super::bad_input::expect_error;
use super::volumes::{mount, volume_dir};
use crate::failure::Result;
use crate::pod::{Container, Pod, container_spec};
use crate::runner::{Case, Context};
use crate::{case, ensure, poll, same};
use std::os::unix::net::UnixListener;
use std::path::Path;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(socket_in_a_volume_connects_containers, 60),
        case!(socket_of_the_node_is_refused_by_name, 60),
    ]
}

/// Starts a shell that sleeps after `script`, with the directory at /sock.
async fn start(
    ctx: &Context,
    pod: &Pod,
    name: &str,
    dir: &Path,
    script: &str,
) -> Result<Container> {
    // Clients and servers of busybox know /dev/log only.
    let script = format!("ln -sf /sock/log /dev/log; {script}; sleep 1000");
    let mut config = container_spec(name, &ctx.images.base, &["sh", "-c", &script]);
    config.mounts = vec![mount(dir, "/sock")];
    pod.start_with(config).await
}

/// As sidecars do (SPIFFE, Envoy, database proxies): the server binds in an emptyDir, another container connects.
async fn socket_in_a_volume_connects_containers(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "sockets")?;
    let pod = ctx.shared_pod().await;
    let server = start(&ctx, &pod, "server", &dir, "syslogd -O /tmp/received").await?;
    let client = start(&ctx, &pod, "client", &dir, "true").await?;
    poll::until("the socket", ctx.patience(10), || async {
        ensure!(dir.join("log").exists(), "not bound");
        Ok(())
    })
    .await?;
    let sent = client.exec(&["logger", "through the volume"]).await?;
    same!(sent.exit_code, 0, "logger: {sent:?}");
    poll::until("the message", ctx.patience(10), || async {
        let received = server.out(&["cat", "/tmp/received"]).await?;
        ensure!(received.contains("through the volume"), "{received:?}");
        Ok(())
    })
    .await?;
    for container in [client, server] {
        container.remove().await?;
    }
    pod.end().await
}

/// A hostPath of type Socket, such as the node's /var/run/docker.sock.
async fn socket_of_the_node_is_refused_by_name(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "node-socket")?;
    let path = dir.join("node.sock");
    let _listener = UnixListener::bind(&path)?;
    let pod = ctx.shared_pod().await;
    let mut config = container_spec("c", &ctx.images.base, &["true"]);
    config.mounts = vec![mount(&path, "/run/node.sock")];
    let created = pod.create_with(config).await.map(drop);
    let path = path.display().to_string();
    expect_error(&created, &["socket", "/run/node.sock", &path])?;
    pod.end().await
}
