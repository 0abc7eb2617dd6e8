//! Calls for running pods, on fake shims: updates, events, metrics, ids, verbose information.

use super::fleet::{self, Fleet, inside, remove, run, run_pod, running};
use super::*;
use futures::StreamExt;
use std::time::{Duration, Instant};

/// Timeout of each wait.
const WAIT_TIMEOUT: Duration = Duration::from_secs(20);

fn resources(memory_mib: i64, cpu_quota: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        memory_limit_in_bytes: memory_mib << 20,
        cpu_quota,
        ..Default::default()
    }
}

async fn update(server: &Server, id: &str, linux: LinuxContainerResources) -> Result<(), Status> {
    let request = UpdateContainerResourcesRequest {
        container_id: id.into(),
        linux: Some(linux),
        ..Default::default()
    };
    let answer = server
        .update_container_resources(Request::new(request))
        .await;
    answer.map(drop)
}

async fn update_pod(
    server: &Server,
    id: &str,
    linux: LinuxContainerResources,
) -> Result<(), Status> {
    let request = UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: id.into(),
        resources: Some(linux),
        ..Default::default()
    };
    let answer = server
        .update_pod_sandbox_resources(Request::new(request))
        .await;
    answer.map(drop)
}

async fn status(server: &Server, id: &str, verbose: bool) -> ContainerStatusResponse {
    let request = ContainerStatusRequest {
        container_id: id.into(),
        verbose,
    };
    let answer = server.container_status(Request::new(request)).await;
    answer.unwrap().into_inner()
}

async fn limits(server: &Server, id: &str) -> LinuxContainerResources {
    let status = status(server, id, false).await.status.unwrap();
    status.resources.unwrap().linux.unwrap()
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn update_within_vm_is_reported_and_survives_restart() {
    if !inside("pods::update_within_vm_is_reported_and_survives_restart") {
        return;
    }
    run(async {
        let fleet = Fleet::new().await;
        let server = &fleet.server;
        let (pod, container) = running(server, "web").await;
        update(server, &container, resources(100, 50_000))
            .await
            .unwrap();
        // A prefix of an id is sufficient.
        update(server, &container[..12], resources(120, 0))
            .await
            .unwrap();
        assert_eq!(limits(server, &container).await, resources(120, 50_000));
        update_pod(server, &pod, resources(200, 0)).await.unwrap();
        assert_eq!(limits(server, &container).await, resources(120, 50_000));
        server.runtime.clone().shutdown().await;
        let Fleet { server, node, .. } = fleet;
        drop(server);
        let server = fleet::server(&node).await;
        assert_eq!(limits(&server, &container).await, resources(120, 50_000));
        let kept = server
            .pod_metadata(&server.pod(&pod).unwrap())
            .config
            .unwrap();
        assert_eq!(kept.linux.unwrap().resources, Some(resources(200, 0)));
        remove(&server, &pod).await;
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn update_beyond_vm_applies_its_capacity() {
    if !inside("pods::update_beyond_vm_applies_its_capacity") {
        return;
    }
    run(async {
        let fleet = Fleet::new().await;
        let server = &fleet.server;
        let (pod, container) = running(server, "web").await;
        // An error would make a kubelet repeat the call without end.
        let beyond = resources(3000, 150_000);
        update(server, &container, beyond.clone()).await.unwrap();
        update_pod(server, &pod, beyond).await.unwrap();
        let applied = resources(2048, 100_000);
        assert_eq!(limits(server, &container).await, applied);
        let stored = server.pod_metadata(&server.pod(&pod).unwrap());
        let linux = stored.config.unwrap().linux.unwrap();
        assert_eq!(linux.resources, Some(applied));
        remove(server, &pod).await;
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn each_event_stream_gets_all_events_with_statuses() {
    if !inside("pods::each_event_stream_gets_all_events_with_statuses") {
        return;
    }
    run(async {
        let fleet = Fleet::new().await;
        let server = &fleet.server;
        let follow = || async {
            let answer = server
                .get_container_events(Request::new(Default::default()))
                .await;
            answer.unwrap().into_inner()
        };
        let (one, other) = (follow().await, follow().await);
        let (pod, container) = running(server, "web").await;
        remove(server, &pod).await;
        use ContainerEventType::*;
        let expected = [
            (&pod, ContainerCreatedEvent),
            (&pod, ContainerStartedEvent),
            (&container, ContainerCreatedEvent),
            (&container, ContainerStartedEvent),
            (&container, ContainerStoppedEvent),
            (&pod, ContainerStoppedEvent),
            (&container, ContainerDeletedEvent),
            (&pod, ContainerDeletedEvent),
        ];
        for stream in [one, other] {
            let got: Vec<_> = tokio::time::timeout(WAIT_TIMEOUT, stream.take(8).collect())
                .await
                .expect("eight events");
            let got: Vec<_> = got.into_iter().map(Result::unwrap).collect();
            let short: Vec<_> = got
                .iter()
                .map(|event| (&event.container_id, event.container_event_type()))
                .collect();
            assert_eq!(short, expected);
            assert!(got.iter().all(|event| {
                let sandbox = event.pod_sandbox_status.as_ref().unwrap();
                sandbox.metadata.as_ref().unwrap().uid == "u" && event.created_at > 0
            }));
            let stopped = &got[4].containers_statuses[0];
            let exited = boxlite_proto::cri::v1::ContainerState::ContainerExited;
            assert_eq!(stopped.state(), exited);
            assert_eq!(stopped.metadata.as_ref().unwrap().name, "c");
        }
        // A daemon that stops ends its streams.
        let mut last = follow().await;
        server.close_streams();
        assert!(
            tokio::time::timeout(WAIT_TIMEOUT, last.next())
                .await
                .unwrap()
                .is_none()
        );
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn hung_vm_delays_scrape_by_one_deadline_only() {
    if !inside("pods::hung_vm_delays_scrape_by_one_deadline_only") {
        return;
    }
    run(async {
        let fleet = Fleet::new().await;
        let server = &fleet.server;
        let (well, _) = running(server, "well").await;
        let (hung, _) = running(server, "hung").await;
        let list = || async {
            let answer = server
                .list_pod_sandbox_metrics(Request::new(Default::default()))
                .await;
            answer.unwrap().into_inner().pod_metrics
        };
        assert_eq!(list().await.len(), 2);
        *fleet.node.faults.hung.lock().unwrap() = hung.clone();
        let begun = Instant::now();
        let pods = list().await;
        let took = begun.elapsed();
        let ids: Vec<_> = pods.iter().map(|pod| pod.pod_sandbox_id.as_str()).collect();
        assert_eq!(ids, [well.as_str()]);
        assert_eq!(pods[0].container_metrics.len(), 1);
        let limit = server.config.timeouts.stats;
        assert!(took < limit + Duration::from_millis(600), "{took:?}");
        let stats = server
            .list_pod_sandbox_stats(Request::new(Default::default()))
            .await;
        let stats = stats.unwrap().into_inner().stats;
        let with_figures: Vec<_> = stats
            .iter()
            .filter(|pod| pod.linux.as_ref().is_some_and(|linux| linux.cpu.is_some()))
            .map(|pod| pod.attributes.as_ref().unwrap().id.as_str())
            .collect();
        assert_eq!(with_figures, [well.as_str()]);
        let streamed = server
            .stream_pod_sandbox_metrics(Request::new(Default::default()))
            .await;
        let streamed: Vec<_> = streamed.unwrap().into_inner().collect().await;
        assert_eq!(streamed[0].as_ref().unwrap().pod_sandbox_metrics.len(), 1);
        for pod in [well, hung] {
            remove(server, &pod).await;
        }
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn verbose_info_has_spec_without_environment_values() {
    if !inside("pods::verbose_info_has_spec_without_environment_values") {
        return;
    }
    run(async {
        let fleet = Fleet::new().await;
        let server = &fleet.server;
        let pod = server
            .run_pod_sandbox(Request::new(run_pod("web")))
            .await
            .unwrap();
        let pod = pod.into_inner().pod_sandbox_id;
        let mut request = fleet::create(&pod, "c");
        let envs = &mut request.config.as_mut().unwrap().envs;
        envs.push(KeyValue {
            key: "TOKEN".into(),
            value: "hunter2".into(),
        });
        let made = server
            .create_container(Request::new(request))
            .await
            .unwrap();
        let id = made.into_inner().container_id;
        let info = status(server, &id, true).await.info.remove("info").unwrap();
        assert!(
            info.contains("TOKEN=") && !info.contains("hunter2"),
            "{info}"
        );
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["sandboxID"], pod.as_str());
        assert_eq!(info["config"]["metadata"]["name"], "c");
        assert_eq!(info["config"]["image"]["image"], fleet::IMAGE);
        assert_eq!(info["runtimeSpec"]["process"]["args"][0], "/bin/true");
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.clone(),
            verbose: true,
        };
        let answer = server.pod_sandbox_status(Request::new(request)).await;
        let info: serde_json::Value =
            serde_json::from_str(&answer.unwrap().into_inner().info["info"]).unwrap();
        assert!(info["pid"].as_i64().unwrap() > 0);
        assert_eq!(info["config"]["metadata"]["name"], "web");
        remove(server, &pod).await;
    });
}
