//! Realistic clients: duplicate and concurrent calls, deadlines during a call, many clients at a time.

use super::fleet::{Fleet, create, inside, remove, run, run_pod, running};
use super::*;
use proptest::prelude::*;
use std::collections::HashSet;
use std::time::Duration;

/// Requests of a client, for two pods with two containers each.
#[derive(Debug, Clone, Copy)]
enum Op {
    Run(usize),
    Create(usize, usize),
    Start(usize, usize),
    Update(usize, usize),
    UpdatePod(usize),
    Exec(usize, usize),
    Stop(usize, usize),
    RemoveContainer(usize, usize),
    StopPod(usize),
    RemovePod(usize),
}

/// Ids that a client knows.
#[derive(Debug, Default, Clone)]
struct Known {
    pods: [String; 2],
    containers: [[String; 2]; 2],
}

/// An id of no object.
fn or_unknown(id: &str) -> String {
    if id.is_empty() {
        "ab".repeat(32)
    } else {
        id.to_owned()
    }
}

/// Performs the call; returns the id of a created object.
async fn call(server: &Server, known: &Known, op: Op) -> Result<String, Status> {
    let pod = |pod: usize| or_unknown(&known.pods[pod]);
    let container = |pod: usize, c: usize| or_unknown(&known.containers[pod][c]);
    let done = match op {
        Op::Run(p) => {
            let request = Request::new(run_pod(["one", "two"][p]));
            let answer = server.run_pod_sandbox(request).await?;
            return Ok(answer.into_inner().pod_sandbox_id);
        }
        Op::Create(p, c) => {
            let request = Request::new(create(&pod(p), ["a", "b"][c]));
            let answer = server.create_container(request).await?;
            return Ok(answer.into_inner().container_id);
        }
        Op::Start(p, c) => {
            let container_id = container(p, c);
            let request = Request::new(StartContainerRequest { container_id });
            server.start_container(request).await.map(drop)
        }
        Op::Update(p, c) => {
            let request = update(&container(p, c), 64 << 20);
            server.update_container_resources(request).await.map(drop)
        }
        Op::UpdatePod(p) => {
            let request = update_pod(&pod(p), 128 << 20);
            server.update_pod_sandbox_resources(request).await.map(drop)
        }
        // The fake guest runs no commands; the call must fail cleanly.
        Op::Exec(p, c) => {
            let request = ExecSyncRequest {
                container_id: container(p, c),
                cmd: vec!["true".into()],
                timeout: 1,
            };
            server.exec_sync(Request::new(request)).await.map(drop)
        }
        Op::Stop(p, c) => {
            let request = StopContainerRequest {
                container_id: container(p, c),
                timeout: 0,
            };
            server.stop_container(Request::new(request)).await.map(drop)
        }
        Op::RemoveContainer(p, c) => {
            let container_id = container(p, c);
            let request = Request::new(RemoveContainerRequest { container_id });
            server.remove_container(request).await.map(drop)
        }
        Op::StopPod(p) => {
            let pod_sandbox_id = pod(p);
            let request = Request::new(StopPodSandboxRequest { pod_sandbox_id });
            server.stop_pod_sandbox(request).await.map(drop)
        }
        Op::RemovePod(p) => {
            let pod_sandbox_id = pod(p);
            let request = Request::new(RemovePodSandboxRequest { pod_sandbox_id });
            server.remove_pod_sandbox(request).await.map(drop)
        }
    };
    done.map(|()| String::new())
}

fn update(id: &str, memory: i64) -> Request<UpdateContainerResourcesRequest> {
    Request::new(UpdateContainerResourcesRequest {
        container_id: id.into(),
        linux: Some(LinuxContainerResources {
            memory_limit_in_bytes: memory,
            ..Default::default()
        }),
        ..Default::default()
    })
}

fn update_pod(id: &str, memory: i64) -> Request<UpdatePodSandboxResourcesRequest> {
    Request::new(UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: id.into(),
        resources: Some(LinuxContainerResources {
            memory_limit_in_bytes: memory,
            ..Default::default()
        }),
        ..Default::default()
    })
}

fn op() -> impl Strategy<Value = Op> {
    let (p, c) = (0..2usize, 0..2usize);
    let both = (p.clone(), c);
    prop_oneof![
        3 => p.clone().prop_map(Op::Run),
        4 => both.clone().prop_map(|(p, c)| Op::Create(p, c)),
        4 => both.clone().prop_map(|(p, c)| Op::Start(p, c)),
        1 => both.clone().prop_map(|(p, c)| Op::Update(p, c)),
        1 => p.clone().prop_map(Op::UpdatePod),
        1 => both.clone().prop_map(|(p, c)| Op::Exec(p, c)),
        1 => both.clone().prop_map(|(p, c)| Op::Stop(p, c)),
        1 => both.prop_map(|(p, c)| Op::RemoveContainer(p, c)),
        1 => p.clone().prop_map(Op::StopPod),
        1 => p.prop_map(Op::RemovePod),
    ]
}

/// Codes that a non-idempotent operation may return to a second or late caller.
fn acceptable(op: Op, status: &Status) -> bool {
    let expected = match op {
        Op::Stop(..) | Op::RemoveContainer(..) | Op::StopPod(_) | Op::RemovePod(_) => false,
        // The fake guest has no Execution service.
        Op::Exec(..) => status.code() != Code::Ok,
        _ => matches!(
            status.code(),
            Code::NotFound | Code::AlreadyExists | Code::FailedPrecondition
        ),
    };
    expected && !status.message().contains("panicked")
}

async fn replay(ops: &[Op]) {
    let fleet = Fleet::new().await;
    let mut known = Known::default();
    for &op in ops {
        let (one, other) = tokio::join!(
            call(&fleet.server, &known, op),
            call(&fleet.server, &known, op)
        );
        for answer in [&one, &other] {
            if let Err(status) = answer {
                assert!(acceptable(op, status), "{op:?}: {status:?}");
            }
        }
        let made = match (one, other) {
            (Ok(one), Ok(other)) => {
                assert_eq!(one, other, "{op:?}: two were made");
                Some(one)
            }
            (Ok(made), Err(_)) | (Err(_), Ok(made)) => Some(made),
            (Err(_), Err(_)) => None,
        };
        match (op, made) {
            (Op::Run(p), Some(id)) => known.pods[p] = id,
            (Op::Create(p, c), Some(id)) => known.containers[p][c] = id,
            _ => {}
        }
        let names: Vec<_> = fleet
            .server
            .runtime
            .boxes()
            .into_iter()
            .map(|b| b.name)
            .collect();
        let single: HashSet<_> = names.iter().collect();
        assert_eq!(
            names.len(),
            single.len(),
            "two pods of one name after {op:?}"
        );
    }
    for pod in fleet.server.runtime.boxes() {
        remove(&fleet.server, &pod.id).await;
    }
    fleet.assert_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn concurrent_duplicate_calls_are_idempotent() {
    if !inside("robust::concurrent_duplicate_calls_are_idempotent") {
        return;
    }
    let config = ProptestConfig {
        cases: 12,
        failure_persistence: None,
        max_shrink_iters: 16,
        ..ProptestConfig::default()
    };
    proptest!(config, |(ops in proptest::collection::vec(op(), 4..14))| {
        run(replay(&ops));
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn interrupted_call_leaks_nothing_and_retry_succeeds() {
    if !inside("robust::interrupted_call_leaks_nothing_and_retry_succeeds") {
        return;
    }
    // A client that disconnects drops the future of its call at any point.
    let cut = async |server: &Server, known: &Known, op: Op| {
        for milliseconds in [0, 1, 3, 8, 20] {
            let limit = Duration::from_millis(milliseconds);
            let _ = tokio::time::timeout(limit, call(server, known, op)).await;
        }
        call(server, known, op).await
    };
    run(async {
        let fleet = Fleet::new().await;
        let server = &fleet.server;
        let slow = &fleet.node.faults.slow_start_ms;
        slow.store(60, std::sync::atomic::Ordering::SeqCst);
        let mut known = Known::default();
        for op in [
            Op::Run(0),
            Op::Create(0, 0),
            Op::Start(0, 0),
            Op::Update(0, 0),
            Op::UpdatePod(0),
            Op::Stop(0, 0),
            Op::RemoveContainer(0, 0),
            Op::StopPod(0),
            Op::RemovePod(0),
        ] {
            let id = cut(server, &known, op).await.unwrap_or_else(|status| {
                // One of the interrupted calls succeeded without a recipient, and another one after it was
                // interrupted, too.
                assert_eq!(status.code(), Code::AlreadyExists, "{op:?}: {status:?}");
                let pods = server.runtime.boxes();
                match op {
                    Op::Run(_) => pods[0].id.clone(),
                    _ => server.runtime.containers()[0].id.clone(),
                }
            });
            match op {
                Op::Run(_) => known.pods[0] = id,
                Op::Create(..) => known.containers[0][0] = id,
                _ => {}
            }
            assert!(server.runtime.boxes().len() <= 1, "{op:?}");
        }
        fleet.assert_nothing_left();
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn fifty_concurrent_clients_succeed() {
    if !inside("robust::fifty_concurrent_clients_succeed") {
        return;
    }
    run(async {
        let fleet = Fleet::new().await;
        let (pod, container_id) = running(&fleet.server, "shared").await;
        let clients = (0..50).map(|number| {
            let (server, pod, container_id) =
                (fleet.server.clone(), pod.clone(), container_id.clone());
            tokio::spawn(async move {
                if number % 10 == 0 {
                    let (own, _) = running(&server, &format!("own{number}")).await;
                    remove(&server, &own).await;
                }
                for _ in 0..10 {
                    let stats = ContainerStatsRequest {
                        container_id: container_id.clone(),
                    };
                    server.container_stats(Request::new(stats)).await.unwrap();
                    let status = PodSandboxStatusRequest {
                        pod_sandbox_id: pod.clone(),
                        verbose: false,
                    };
                    server
                        .pod_sandbox_status(Request::new(status))
                        .await
                        .unwrap();
                    let list = server
                        .list_containers(Request::new(Default::default()))
                        .await
                        .unwrap();
                    assert!(!list.into_inner().containers.is_empty());
                    server
                        .update_container_resources(update(&container_id, 32 << 20))
                        .await
                        .unwrap();
                }
            })
        });
        for client in clients.collect::<Vec<_>>() {
            client.await.unwrap();
        }
        remove(&fleet.server, &pod).await;
        fleet.assert_nothing_left();
    });
}
