//! Requests of a stock kubelet, each the smallest one that failed or differed from containerd, on fake shims.

use super::fleet::{Fleet, inside, run, running};
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
