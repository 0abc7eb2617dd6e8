//! Delivery of events to a receiver that starts late, stops and restarts.

use super::*;
use async_trait::async_trait;
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim_async::{Events, create_events};
use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
use containerd_shim_protos::ttrpc::asynchronous::{Server, TtrpcContext};
use std::path::Path;
use tokio::sync::mpsc;

struct Daemon(mpsc::UnboundedSender<Envelope>);

#[async_trait]
impl Events for Daemon {
    async fn forward(
        &self,
        _: &TtrpcContext,
        request: ForwardRequest,
    ) -> containerd_shim_protos::ttrpc::Result<Empty> {
        let _ = self.0.send(request.envelope.unwrap_or_default());
        Ok(Empty::default())
    }
}

async fn serve(path: &Path, to: mpsc::UnboundedSender<Envelope>) -> Server {
    let _ = std::fs::remove_file(path);
    let listener = std::os::unix::net::UnixListener::bind(path).expect("binds");
    let mut server = Server::new()
        .add_listener(Listener::try_from(listener).expect("listens"))
        .register_service(create_events(Arc::new(Daemon(to))));
    server.start().await.expect("serves");
    server
}

fn oom(n: u32) -> TaskOOM {
    TaskOOM {
        container_id: n.to_string(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publish_while_receiver_restarts_delivers_in_order() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("events");
    let (to, mut from) = mpsc::unbounded_channel();
    let ended = CancellationToken::new();
    let (publisher, deliver) = Publisher::new(
        EventTransport::new(&path.display().to_string(), "", ""),
        "ns",
        ended.clone(),
    );
    let task = tokio::spawn(deliver);

    for n in 0..3 {
        publisher.publish(&oom(n));
    }
    let mut server = serve(&path, to.clone()).await;
    for n in 0..3 {
        let envelope = from.recv().await.expect("delivered");
        assert_eq!(envelope.topic, "/tasks/oom");
        assert_eq!(envelope.namespace, "ns");
        assert_eq!(envelope.event.type_url, "containerd.events.TaskOOM");
        assert_eq!(
            envelope.event.value,
            oom(n).write_to_bytes().expect("encodes")
        );
    }
    server.shutdown().await.expect("stops");
    for n in 3..6 {
        publisher.publish(&oom(n));
    }
    let _server = serve(&path, to).await;
    let mut seen = Vec::new();
    while seen.last() != Some(&oom(5).write_to_bytes().expect("encodes")) {
        seen.push(from.recv().await.expect("delivered").event.value.clone());
    }
    // At least once: an event in flight when the receiver stopped may arrive twice, but not out of order.
    seen.dedup();
    let wanted: Vec<_> = (3..6)
        .map(|n| oom(n).write_to_bytes().expect("encodes"))
        .collect();
    assert_eq!(seen, wanted);
    ended.cancel();
    task.await.expect("ends");
}

#[tokio::test]
async fn publish_to_full_queue_drops_the_oldest() {
    let (publisher, deliver) = Publisher::new(
        EventTransport::new("/nowhere/at/all", "", ""),
        "ns",
        CancellationToken::new(),
    );
    drop(deliver);
    for n in 0..(QUEUE_CAPACITY as u32 + 10) {
        publisher.publish(&oom(n));
    }
    let queue = publisher.shared.queue();
    assert_eq!((queue.events.len(), queue.dropped), (QUEUE_CAPACITY, 10));
}

/// Creates an executable shell script at `path`.
fn program(path: &Path, script: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, format!("#!/bin/sh\n{script}")).expect("written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    path.display().to_string()
}

#[tokio::test]
async fn publish_program_is_retried_until_containerd_is_back() {
    // Longer than a rejected event is kept.
    const DOWNTIME: Duration = Duration::from_secs(2);
    let dir = tempfile::tempdir().expect("tempdir");
    let socket = dir.path().join("c.sock");
    let log = dir.path().join("log");
    let script = format!(
        "[ -S {} ] || exit 1\necho delivered >> {}\n",
        socket.display(),
        log.display()
    );
    let path = program(&dir.path().join("publish"), &script);
    let ended = CancellationToken::new();
    let (publisher, deliver) = Publisher::new(
        EventTransport::new("", &path, &socket.display().to_string()),
        "ns",
        ended.clone(),
    );
    let task = tokio::spawn(deliver);
    publisher.publish(&oom(1));
    tokio::time::sleep(DOWNTIME).await;
    let _daemon = std::os::unix::net::UnixListener::bind(&socket).expect("binds");
    let limit = tokio::time::Instant::now() + MAX_RETRY_DELAY * 5;
    while !log.exists() && tokio::time::Instant::now() < limit {
        tokio::time::sleep(MIN_RETRY_DELAY).await;
    }
    ended.cancel();
    task.await.expect("ends");
    assert_eq!(
        std::fs::read_to_string(&log).expect("log exists"),
        "delivered\n"
    );
}

#[tokio::test]
async fn publish_without_ttrpc_address_runs_containerd() {
    let dir = tempfile::tempdir().expect("tempdir");
    let log = dir.path().join("log");
    let script = format!("echo \"$@\" >> {0}\nwc -c >> {0}\n", log.display());
    let path = program(&dir.path().join("publish"), &script);
    let transport = EventTransport::new("", &path, "/run/c.sock");
    let ended = CancellationToken::new();
    let (publisher, deliver) = Publisher::new(transport, "ns", ended.clone());
    publisher.publish(&oom(1));
    ended.cancel();
    deliver.await;
    let seen = std::fs::read_to_string(&log).expect("it ran");
    let mut lines = seen.lines();
    assert_eq!(
        lines.next(),
        Some("--address /run/c.sock publish --topic /tasks/oom --namespace ns")
    );
    let size: usize = lines
        .next()
        .and_then(|size| size.trim().parse().ok())
        .expect("a size");
    assert!(size > "containerd.events.TaskOOM".len());
}
