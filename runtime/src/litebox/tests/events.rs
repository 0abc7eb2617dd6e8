//! Tests of events and metadata updates, during a box's life and across the death of a runtime.

use super::recovery::live_and_die;
use super::*;
use crate::{EventKind, Events};
use std::collections::BTreeSet;

async fn receive(events: &mut Events, count: usize) -> Vec<(EventKind, String)> {
    let mut received = Vec::new();
    for _ in 0..count {
        let event = tokio::time::timeout(WAIT_TIMEOUT, events.next())
            .await
            .expect("an event")
            .unwrap();
        assert!(event.at_ns > 0);
        received.push((event.kind, event.id));
    }
    received
}

fn pairs(expected: &[(EventKind, &str)]) -> Vec<(EventKind, String)> {
    expected
        .iter()
        .map(|(kind, id)| (*kind, (*id).to_owned()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_ordered_and_carry_state() {
    use EventKind::{Created, Deleted, Started, Stopped};
    let node = FakeNode::new();
    let shim = node.serve("b1").await;
    let (runtime, litebox) = one_box(&node).await;
    let mut events = runtime.events();
    run_container(&node, &litebox, "c1").await;
    run_container(&node, &litebox, "c2").await;
    let start = [
        (Created, "b1"),
        (Started, "b1"),
        (Created, "c1"),
        (Started, "c1"),
        (Created, "c2"),
        (Started, "c2"),
    ];
    assert_eq!(receive(&mut events, 6).await, pairs(&start));
    shim.exit("c1", 3);
    let exit = events.next().await.unwrap();
    assert_eq!((exit.kind, exit.id.as_str()), (Stopped, "c1"));
    let state = &exit.state;
    assert_eq!(state.sandbox.state, BoxState::Ready);
    let c1 = state.containers.iter().find(|c| c.id == "c1").unwrap();
    assert_eq!((c1.state, c1.exit_code), (ContainerState::Exited, 3));
    litebox.remove_container("c1").await.unwrap();
    litebox.stop().await.unwrap();
    litebox.remove().await.unwrap();
    let end = [
        (Deleted, "c1"),
        (Stopped, "c2"),
        (Stopped, "b1"),
        (Deleted, "c2"),
        (Deleted, "b1"),
    ];
    assert_eq!(receive(&mut events, 5).await, pairs(&end));
    runtime.shutdown().await;
    assert!(events.next().await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_create_emits_no_events() {
    let node = FakeNode::new();
    node.serve("b1").await;
    let (runtime, litebox) = one_box(&node).await;
    let mut events = runtime.events();
    node.faults.fail_start_sandbox.store(true, Ordering::SeqCst);
    litebox.start().await.unwrap_err();
    node.serve("b1").await;
    node.faults
        .fail_start_sandbox
        .store(false, Ordering::SeqCst);
    node.faults.fail_task_create.store(true, Ordering::SeqCst);
    litebox
        .create_container(node.container_options("c1"))
        .await
        .unwrap_err();
    litebox.remove().await.unwrap();
    use EventKind::{Created, Deleted, Started, Stopped};
    let only = [
        (Created, "b1"),
        (Started, "b1"),
        (Stopped, "b1"),
        (Deleted, "b1"),
    ];
    assert_eq!(receive(&mut events, 4).await, pairs(&only));
}

#[test]
fn restart_emits_missed_exits_and_keeps_metadata() {
    let shims = tokio::runtime::Runtime::new().unwrap();
    let node = std::sync::Arc::new(FakeNode::new());
    let shim = shims.block_on(node.serve("b1"));
    let first = node.clone();
    live_and_die(async move {
        let (_runtime, litebox) = one_box(&first).await;
        for id in ["c1", "c2"] {
            run_container(&first, &litebox, id).await;
        }
        let add = |what: &'static [u8]| {
            Box::new(move |have: &[u8]| [have, what].concat()) as crate::litebox::UpdateMetadata
        };
        litebox
            .update_container("c1", b"{}".to_vec(), add(b"+1"))
            .await
            .unwrap();
        litebox
            .update_container("c1", b"{}".to_vec(), add(b"+2"))
            .await
            .unwrap();
        litebox
            .update_limits(b"{}".to_vec(), add(b"+box"))
            .await
            .unwrap();
        assert_eq!(litebox.snapshot().metadata, b"m+box");
    });
    let calls = shim.calls.lock().unwrap().join("\n");
    assert!(calls.contains("update pod {}"), "{calls}");
    shim.exit("c2", 42);
    live_and_die(async move {
        let runtime = BoxliteRuntime::open(node.options()).await.unwrap();
        let litebox = runtime.get_box("b1").unwrap();
        assert_eq!(litebox.snapshot().metadata, b"m+box");
        assert_eq!(litebox.container("c1").unwrap().metadata, b"cm+1+2");
        let mut events = runtime.events();
        let found: BTreeSet<_> = receive(&mut events, 3)
            .await
            .into_iter()
            .map(|(kind, id)| (id, format!("{kind:?}")))
            .collect();
        let expected = [("b1", "Started"), ("c1", "Started"), ("c2", "Stopped")];
        let expected = expected.map(|(id, kind)| (id.to_owned(), kind.to_owned()));
        assert_eq!(found, expected.into());
        // Emitted once; further events follow.
        shim.exit("c1", 0);
        let next = receive(&mut events, 1).await;
        assert_eq!(next, pairs(&[(EventKind::Stopped, "c1")]));
        litebox.remove().await.unwrap();
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn update_of_exited_container_is_refused() {
    let node = FakeNode::new();
    let shim = node.serve("b1").await;
    let (_runtime, litebox) = one_box(&node).await;
    run_container(&node, &litebox, "c1").await;
    shim.exit("c1", 0);
    until("exit shows", || {
        state_of(&litebox, "c1") == ContainerState::Exited
    })
    .await;
    let update_metadata = Box::new(|_: &[u8]| b"x".to_vec());
    let refused = litebox
        .update_container("c1", b"{}".to_vec(), update_metadata)
        .await
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::FailedPrecondition);
    assert_eq!(litebox.container("c1").unwrap().metadata, b"cm");
}
