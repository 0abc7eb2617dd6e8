//! The registry with plugins on socket pairs: order, rejections, dead and hung plugins, and that no container is
//! missed.

mod fake;
mod merge;

use super::session::SessionError;
use super::{Nri, Registry};
use boxlite_proto::nri::v1alpha1::*;
use fake::{FakeHost, LIMITS, Log, Reply, events, join, ok, registry};
use prost::Message as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Subscription of a plugin that names no event, to all events.
const ALL: i32 = 0;

fn bit(event: Event) -> i32 {
    1 << (event as i32 - 1)
}

fn pod() -> PodSandbox {
    PodSandbox {
        id: "pod".into(),
        ..Default::default()
    }
}

fn container(id: &str) -> Container {
    Container {
        id: id.into(),
        pod_sandbox_id: "pod".into(),
        ..Default::default()
    }
}

fn fine(_: &str, _: &[u8]) -> Reply {
    Reply::Ok(Vec::new())
}

fn nri(registry: &Arc<Registry>) -> Nri {
    Nri(Some(registry.clone()))
}

async fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn events_reach_subscribers_in_index_order() {
    let (registry, log) = (registry(Default::default()), Log::default());
    assert!(join(&registry, "20", "late", ALL, &log, fine).await);
    let only_start = bit(Event::StartContainer);
    assert!(join(&registry, "10", "early", only_start, &log, fine).await);
    let session = nri(&registry).begin_session().await;
    let (pod, container) = (pod(), container("c"));
    session
        .request(Event::RunPodSandbox, &pod, None)
        .await
        .unwrap();
    session
        .create(&pod, container.clone(), 1, &|_| Ok(()))
        .await
        .unwrap();
    session
        .request(Event::StartContainer, &pod, Some(&container))
        .await
        .unwrap();
    session.stop(&pod, &container).await;
    session.stop(&pod, &container).await;
    session
        .notify(Event::RemoveContainer, &pod, Some(&container))
        .await;
    session.stop_pod(&pod).await;
    session.stop_pod(&pod).await;
    session.notify(Event::RemovePodSandbox, &pod, None).await;
    assert_eq!(
        events(&log),
        [
            "late RunPodSandbox",
            "late CreateContainer",
            "late ValidateContainerAdjustment",
            "early StartContainer",
            "late StartContainer",
            "late StopContainer",
            "late RemoveContainer",
            "late StopPodSandbox",
            "late RemovePodSandbox",
        ]
    );
}

#[tokio::test]
async fn rejection_names_plugin_and_stops_the_event() {
    let (registry, log) = (registry(Default::default()), Log::default());
    let no = |method: &str, _: &[u8]| match method {
        "RunPodSandbox" => Reply::Refuse("not today"),
        _ => Reply::Ok(Vec::new()),
    };
    assert!(join(&registry, "00", "no", ALL, &log, no).await);
    assert!(join(&registry, "10", "yes", ALL, &log, fine).await);
    let session = nri(&registry).begin_session().await;
    let error = session
        .request(Event::RunPodSandbox, &pod(), None)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "NRI plugin 00-no rejected RunPodSandbox: not today"
    );
    assert_eq!(events(&log), ["no RunPodSandbox"]);
    // Notifications reach all plugins.
    session.notify(Event::RemovePodSandbox, &pod(), None).await;
    assert_eq!(events(&log).len(), 3);
}

#[tokio::test]
async fn hung_and_dead_plugins_do_not_fail_the_call() {
    for reply in [|| Reply::Hang, || Reply::Close] {
        let (registry, log) = (registry(Default::default()), Log::default());
        let bad = move |method: &str, _: &[u8]| match method {
            "RunPodSandbox" => reply(),
            _ => Reply::Ok(Vec::new()),
        };
        assert!(join(&registry, "00", "bad", ALL, &log, bad).await);
        assert!(join(&registry, "10", "good", ALL, &log, fine).await);
        let session = nri(&registry).begin_session().await;
        let begun = Instant::now();
        session
            .request(Event::RunPodSandbox, &pod(), None)
            .await
            .unwrap();
        assert!(begun.elapsed() < LIMITS.request + Duration::from_secs(3));
        session.notify(Event::RemovePodSandbox, &pod(), None).await;
        assert_eq!(
            events(&log),
            [
                "bad RunPodSandbox",
                "good RunPodSandbox",
                "good RemovePodSandbox"
            ]
        );
        for _ in 0..1000 {
            if registry.plugins.lock().await.len() == 1 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(registry.plugins.lock().await.len(), 1);
    }
}

#[tokio::test]
async fn failure_policy_fails_the_call_and_keeps_the_plugin() {
    let (registry, log) = (registry(Default::default()), Log::default());
    let strict = |method: &str, _: &[u8]| match method {
        "Configure" => ok(ConfigureResponse {
            events: ALL,
            failure_policy: Some(FailurePolicy {
                fail_request: true,
                keep_connected: true,
            }),
        }),
        "RunPodSandbox" => Reply::Hang,
        _ => Reply::Ok(Vec::new()),
    };
    assert!(join(&registry, "00", "strict", ALL, &log, strict).await);
    let session = nri(&registry).begin_session().await;
    let error = session
        .request(Event::RunPodSandbox, &pod(), None)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("00-strict") && error.contains("not answered within"),
        "{error}"
    );
    session.notify(Event::RemovePodSandbox, &pod(), None).await;
    assert_eq!(
        events(&log),
        ["strict RunPodSandbox", "strict RemovePodSandbox"]
    );
    assert_eq!(registry.plugins.lock().await.len(), 1);
}

#[tokio::test]
async fn invalid_registration_is_rejected() {
    let (registry, log) = (registry(Default::default()), Log::default());
    assert!(!join(&registry, "1", "short", ALL, &log, fine).await);
    assert!(!join(&registry, "00", "a b", ALL, &log, fine).await);
    assert!(!join(&registry, "00", "events", 1 << 20, &log, fine).await);
    let silent = |method: &str, _: &[u8]| match method {
        "Configure" => Reply::Hang,
        _ => Reply::Ok(Vec::new()),
    };
    assert!(!join(&registry, "00", "silent", ALL, &log, silent).await);
    let bad_sync = |method: &str, _: &[u8]| match method {
        "Synchronize" => Reply::Refuse("no"),
        _ => Reply::Ok(Vec::new()),
    };
    assert!(!join(&registry, "00", "sync", ALL, &log, bad_sync).await);
    assert!(registry.plugins.lock().await.is_empty());
}

#[tokio::test]
async fn silent_plugin_times_out() {
    let registry = registry(Default::default());
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let begun = Instant::now();
    assert!(registry.clone().connect(ours, None).await.is_none());
    assert!(begun.elapsed() >= LIMITS.registration);
}

#[tokio::test]
async fn new_plugin_sees_existing_and_concurrent_containers() {
    let host = Arc::new(FakeHost::default());
    let (registry, log) = (registry(host.clone()), Log::default());
    // An RPC is between its event and its change: the plugin waits, and then sees the container.
    let session = nri(&registry).begin_session().await;
    let seen = Log::default();
    let found = seen.clone();
    let script = move |method: &str, payload: &[u8]| {
        if method == "Synchronize" {
            let request = SynchronizeRequest::decode(payload).unwrap();
            let ids = request.containers.iter().map(|c| c.id.clone());
            found.lock().unwrap().extend(ids);
        }
        Reply::Ok(Vec::new())
    };
    let joining = {
        let (registry, log) = (registry.clone(), log.clone());
        tokio::spawn(async move { join(&registry, "00", "new", ALL, &log, script).await })
    };
    wait_for("Configure", || !log.lock().unwrap().is_empty()).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(log.lock().unwrap().len(), 1, "Synchronize has to wait");
    host.containers.lock().unwrap().push(container("between"));
    // A later RPC waits for the plugin and notifies it.
    let next = {
        let nri = nri(&registry);
        tokio::spawn(async move {
            let session = nri.begin_session().await;
            session
                .create(&pod(), container("next"), 1, &|_| Ok(()))
                .await
                .map(drop)
        })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!next.is_finished());
    drop(session);
    assert!(joining.await.unwrap());
    next.await.unwrap().unwrap();
    assert_eq!(*seen.lock().unwrap(), ["between"]);
    assert_eq!(events(&log)[0], "new CreateContainer");
}

#[tokio::test]
async fn large_state_is_synchronized_in_parts_or_rejected() {
    let host = Arc::new(FakeHost::default());
    for id in 0..30 {
        let mut large = container(&id.to_string());
        large.args = vec!["x".repeat(200_000)];
        host.containers.lock().unwrap().push(large);
    }
    let (registry, log) = (registry(host), Log::default());
    assert!(!join(&registry, "00", "old", ALL, &log, fine).await);
    let seen = Log::default();
    let found = seen.clone();
    let script = move |method: &str, payload: &[u8]| match method {
        "Synchronize" => {
            let request = SynchronizeRequest::decode(payload).unwrap();
            let ids = request.containers.iter().map(|c| c.id.clone());
            found.lock().unwrap().extend(ids);
            ok(SynchronizeResponse {
                more: request.more,
                ..Default::default()
            })
        }
        _ => Reply::Ok(Vec::new()),
    };
    assert!(join(&registry, "00", "new", ALL, &log, script).await);
    assert_eq!(seen.lock().unwrap().len(), 30);
}

#[tokio::test]
async fn legacy_plugin_gets_state_changes() {
    let (registry, log) = (registry(Default::default()), Log::default());
    let old = |method: &str, payload: &[u8]| match method {
        "StateChange" => {
            let change = StateChangeEvent::decode(payload).unwrap();
            assert_eq!(change.pod.unwrap().id, "pod");
            Reply::Ok(Vec::new())
        }
        "Configure" | "Synchronize" => Reply::Ok(Vec::new()),
        _ => Reply::Unimplemented,
    };
    assert!(join(&registry, "00", "old", ALL, &log, old).await);
    let session = nri(&registry).begin_session().await;
    session
        .request(Event::RunPodSandbox, &pod(), None)
        .await
        .unwrap();
    session.stop_pod(&pod()).await;
    assert_eq!(
        events(&log),
        ["old RunPodSandbox", "old StateChange", "old StateChange"]
    );
}

#[tokio::test]
async fn plugin_may_update_containers_during_an_event() {
    let host = Arc::new(FakeHost::default());
    let (registry, log) = (registry(host.clone()), Log::default());
    let update = ContainerUpdate {
        container_id: "other".into(),
        ..Default::default()
    };
    let script = move |method: &str, _: &[u8]| match method {
        "StartContainer" => Reply::UpdateFirst(vec![update.clone()]),
        _ => Reply::Ok(Vec::new()),
    };
    assert!(join(&registry, "00", "busy", ALL, &log, script).await);
    let session = nri(&registry).begin_session().await;
    session
        .request(Event::StartContainer, &pod(), Some(&container("c")))
        .await
        .unwrap();
    assert_eq!(host.updates.lock().unwrap()[0].container_id, "other");
}

#[tokio::test]
async fn validator_sees_owners_and_may_reject() {
    let (registry, log) = (registry(Default::default()), Log::default());
    let adjuster = |method: &str, _: &[u8]| match method {
        "CreateContainer" => ok(CreateContainerResponse {
            adjust: Some(ContainerAdjustment {
                args: vec!["true".into()],
                ..Default::default()
            }),
            ..Default::default()
        }),
        _ => Reply::Ok(Vec::new()),
    };
    let validator = |method: &str, payload: &[u8]| match method {
        "ValidateContainerAdjustment" => {
            let request = ValidateContainerAdjustmentRequest::decode(payload).unwrap();
            assert_eq!(request.adjust.unwrap().args, ["true"]);
            assert!(request.container.unwrap().args.is_empty());
            let owners = &request.owners.unwrap().owners["c"];
            assert_eq!(owners.simple[&(Field::Args as i32)], "00-adjuster");
            assert_eq!(request.plugins.len(), 2);
            ok(ValidateContainerAdjustmentResponse {
                reject: true,
                reason: "no arguments".into(),
            })
        }
        _ => Reply::Ok(Vec::new()),
    };
    let create = bit(Event::CreateContainer);
    assert!(join(&registry, "00", "adjuster", create, &log, adjuster).await);
    let validate = bit(Event::ValidateContainerAdjustment);
    assert!(join(&registry, "10", "validator", validate, &log, validator).await);
    let session = nri(&registry).begin_session().await;
    let error = session
        .create(&pod(), container("c"), 1, &|_| Ok(()))
        .await
        .unwrap_err();
    assert!(matches!(&error, SessionError::Rejected { plugin, reason }
        if plugin == "10-validator" && reason == "no arguments"));
}

#[tokio::test]
async fn limits_beyond_vm_are_rejected_with_plugin_name() {
    let (registry, log) = (registry(Default::default()), Log::default());
    let greedy = |method: &str, _: &[u8]| match method {
        "CreateContainer" => ok(CreateContainerResponse {
            adjust: Some(ContainerAdjustment {
                linux: Some(LinuxContainerAdjustment {
                    resources: Some(LinuxResources {
                        memory: Some(LinuxMemory {
                            limit: Some(OptionalInt64 { value: 1 << 40 }),
                            ..Default::default()
                        }),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        _ => Reply::Ok(Vec::new()),
    };
    assert!(join(&registry, "10", "greedy", ALL, &log, greedy).await);
    let session = nri(&registry).begin_session().await;
    let admit = |wanted: &LinuxResources| {
        let limit = wanted.memory.and_then(|memory| memory.limit);
        assert_eq!(limit.map(|limit| limit.value), Some(1 << 40));
        Err("it is too much".to_owned())
    };
    let refused = session.create(&pod(), container("c"), 1, &admit).await;
    let text = refused.unwrap_err().to_string();
    for word in ["10-greedy", "linux.resources", "it is too much"] {
        assert!(text.contains(word), "{word}: {text}");
    }
}

#[tokio::test]
async fn pod_update_is_rejectable_and_legacy_plugins_consent() {
    let (registry, log) = (registry(Default::default()), Log::default());
    let reply = |word: &'static str| {
        move |method: &str, _: &[u8]| match (method, word) {
            ("UpdatePodSandbox", "old") => Reply::Unimplemented,
            ("UpdatePodSandbox", _) => Reply::Refuse("too much"),
            _ => Reply::Ok(Vec::new()),
        }
    };
    assert!(join(&registry, "00", "old", ALL, &log, reply("old")).await);
    let session = nri(&registry).begin_session().await;
    let request = UpdatePodSandboxRequest {
        pod: Some(pod()),
        ..Default::default()
    };
    session.update_pod(&request).await.unwrap();
    drop(session);
    assert!(join(&registry, "10", "no", ALL, &log, reply("no")).await);
    let session = nri(&registry).begin_session().await;
    let error = session.update_pod(&request).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "NRI plugin 10-no rejected UpdatePodSandbox: too much"
    );
}

#[tokio::test]
async fn disabled_nri_sends_nothing() {
    let session = Nri::default().begin_session().await;
    assert!(!session.has_plugins().await);
    session
        .request(Event::RunPodSandbox, &pod(), None)
        .await
        .unwrap();
    let (adjust, updates) = session
        .create(&pod(), container("c"), 1, &|_| Ok(()))
        .await
        .unwrap();
    assert_eq!((adjust, updates.len()), (Default::default(), 0));
}

#[tokio::test]
async fn stop_notifies_plugins_and_leaves_no_task() {
    let (registry, log) = (registry(Default::default()), Log::default());
    assert!(join(&registry, "00", "p", ALL, &log, fine).await);
    nri(&registry).stop().await;
    assert_eq!(events(&log), ["p Shutdown"]);
    assert!(registry.tasks.is_empty());
}
