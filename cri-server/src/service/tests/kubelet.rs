//! Requests of a stock kubelet, each the smallest one that failed or differed from containerd, on fake shims.

use super::fleet::{Fleet, create, inside, run, run_pod, running};
use super::*;

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn update_with_cpuset_in_host_numbers_succeeds() {
    if !inside("kubelet::update_with_cpuset_in_host_numbers_succeeds") {
        return;
    }
    run(async {
        let fleet = Fleet::new().await;
        let (_, container_id) = running(&fleet.server, "web").await;
        let request = UpdateContainerResourcesRequest {
            container_id: container_id.clone(),
            linux: Some(LinuxContainerResources {
                cpuset_cpus: "4-17".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        fleet
            .server
            .update_container_resources(Request::new(request))
            .await
            .unwrap();
        let request = ContainerStatusRequest {
            container_id,
            verbose: false,
        };
        let status = fleet.server.container_status(Request::new(request)).await;
        let resources = status.unwrap().into_inner().status.unwrap().resources;
        assert_eq!(resources.unwrap().linux.unwrap().cpuset_cpus, "4-17");
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn update_with_limit_below_usage_names_both_figures() {
    if !inside("kubelet::update_with_limit_below_usage_names_both_figures") {
        return;
    }
    run(async {
        let fleet = Fleet::new().await;
        let (_, container_id) = running(&fleet.server, "web").await;
        let update = async |memory_limit_in_bytes| {
            let request = UpdateContainerResourcesRequest {
                container_id: container_id.clone(),
                linux: Some(LinuxContainerResources {
                    memory_limit_in_bytes,
                    ..Default::default()
                }),
                ..Default::default()
            };
            let request = Request::new(request);
            fleet.server.update_container_resources(request).await
        };
        // The fake guest reports 1000 bytes in use.
        let error = update(900).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition);
        let text = error.message();
        assert!(text.contains("900") && text.contains("1000"), "{text}");
        update(1000).await.unwrap();
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn start_and_stats_depend_on_the_container_state() {
    if !inside("kubelet::start_and_stats_depend_on_the_container_state") {
        return;
    }
    run(async {
        let fleet = Fleet::new().await;
        let server = &fleet.server;
        let (_, container_id) = running(server, "web").await;
        let start = StartContainerRequest {
            container_id: container_id.clone(),
        };
        let error = server.start_container(Request::new(start)).await;
        let error = error.unwrap_err();
        assert_eq!(error.code(), Code::AlreadyExists);
        assert!(error.message().contains("running"), "{}", error.message());
        let stats = async || {
            let request = ContainerStatsRequest {
                container_id: container_id.clone(),
            };
            server.container_stats(Request::new(request)).await
        };
        stats().await.unwrap();
        let stop = StopContainerRequest {
            container_id: container_id.clone(),
            timeout: 0,
        };
        server.stop_container(Request::new(stop)).await.unwrap();
        let error = stats().await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition);
        assert!(error.message().contains("exited"), "{}", error.message());
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn create_makes_log_directories_and_missing_host_paths() {
    if !inside("kubelet::create_makes_log_directories_and_missing_host_paths") {
        return;
    }
    run(async {
        let fleet = Fleet::new().await;
        let (server, node) = (&fleet.server, &fleet.node);
        let mut request = run_pod("web");
        let logs = node.at("logs");
        request.config.as_mut().unwrap().log_directory = logs.display().to_string();
        let pod = server.run_pod_sandbox(Request::new(request)).await;
        let pod = pod.unwrap().into_inner().pod_sandbox_id;
        let mut request = create(&pod, "c");
        let config = request.config.as_mut().unwrap();
        config.log_path = "deep/er/0.log".into();
        config.mounts = vec![Mount {
            container_path: "/data".into(),
            host_path: node.at("volumes/new").display().to_string(),
            ..Default::default()
        }];
        server
            .create_container(Request::new(request))
            .await
            .unwrap();
        assert!(logs.join("deep/er").is_dir());
        assert!(node.at("volumes/new").is_dir());
        let mut request = create(&pod, "no-log");
        request.config.as_mut().unwrap().log_path = String::new();
        server
            .create_container(Request::new(request))
            .await
            .unwrap();
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn privileged_container_needs_a_privileged_pod() {
    if !inside("kubelet::privileged_container_needs_a_privileged_pod") {
        return;
    }
    run(async {
        let fleet = Fleet::new().await;
        let server = &fleet.server;
        for is_allowed in [false, true] {
            let mut request = run_pod(if is_allowed { "yes" } else { "no" });
            let linux = &mut request.config.as_mut().unwrap().linux;
            let security = &mut linux.get_or_insert_default().security_context;
            security.get_or_insert_default().privileged = is_allowed;
            let pod = server.run_pod_sandbox(Request::new(request)).await;
            let pod = pod.unwrap().into_inner().pod_sandbox_id;
            let mut request = create(&pod, "c");
            let linux = &mut request.config.as_mut().unwrap().linux;
            let security = &mut linux.get_or_insert_default().security_context;
            security.get_or_insert_default().privileged = true;
            let created = server.create_container(Request::new(request)).await;
            match created {
                Ok(_) => assert!(is_allowed),
                Err(error) => {
                    assert!(!is_allowed);
                    assert_eq!(error.code(), Code::InvalidArgument);
                    let text = error.message();
                    assert!(text.contains("privileged must be true"), "{text}");
                }
            }
        }
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn nri_message_of_a_pod_has_its_network_namespace() {
    if !inside("kubelet::nri_message_of_a_pod_has_its_network_namespace") {
        return;
    }
    run(async {
        let fleet = Fleet::new().await;
        running(&fleet.server, "web").await;
        let pod = fleet.server.runtime.handles().remove(0);
        let metadata = fleet.server.pod_metadata(&pod);
        let message = crate::nri::messages::pod(&pod.snapshot(), &metadata);
        let namespaces = message.linux.unwrap().namespaces;
        assert_eq!(namespaces.len(), 1);
        assert_eq!(namespaces[0].r#type, "network");
        assert!(std::path::Path::new(&namespaces[0].path).exists());
    });
}
