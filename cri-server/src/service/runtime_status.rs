//! Status: readiness of the runtime and its network, supported features, and with `verbose` the configuration.

use super::Server;
use boxlite_proto::cri::v1::{
    RuntimeCondition, RuntimeFeatures, RuntimeHandler, RuntimeHandlerFeatures, RuntimeStatus,
    StatusRequest, StatusResponse,
};
use boxlite_runtime::pool::PoolStatus;
use serde_json::{Value, json};
use std::collections::HashMap;

/// Handles Status.
pub(crate) fn status(server: &Server, request: &StatusRequest) -> StatusResponse {
    let network = server.cni.ready();
    let conditions = vec![
        RuntimeCondition {
            r#type: "RuntimeReady".into(),
            status: true,
            ..Default::default()
        },
        match &network {
            Err(_) if server.has_passt() => RuntimeCondition {
                r#type: "NetworkReady".into(),
                status: true,
                ..Default::default()
            },
            Ok(_) => RuntimeCondition {
                r#type: "NetworkReady".into(),
                status: true,
                ..Default::default()
            },
            Err(error) => RuntimeCondition {
                r#type: "NetworkReady".into(),
                status: false,
                reason: "NetworkPluginNotReady".into(),
                message: format!(
                    "Network plugin returns error: {}",
                    boxlite_runtime::report(error)
                ),
            },
        },
    ];
    let handlers = server
        .config
        .runtime_handlers
        .iter()
        .map(|name| RuntimeHandler {
            name: name.clone(),
            features: Some(RuntimeHandlerFeatures {
                recursive_read_only_mounts: true,
                user_namespaces: true,
            }),
        });
    let mut info = HashMap::new();
    if request.verbose {
        let config = &server.config;
        let details = json!({
            "vmm": server.vmm,
            "commit": env!("BOXLITE_COMMIT"),
            "root": config.root,
            "state": config.state,
            // containerd's name: clients look there for the root file systems.
            "stateDir": config.state,
            // containerd's name, too.
            "maxContainerLogLineSize": boxlite_proto::names::MAX_LOG_LINE_BYTES,
            "cniConfDir": config.cni.conf_dir,
            "cniBinDirs": config.cni.bin_dirs,
            "networkWithoutCni": config.network.without_cni.name(),
            "network": network.as_ref().ok().map(|conf| json!({"name": conf.name, "file": conf.source})),
            "podVcpus": config.pod.vcpus,
            "podMemoryMiB": config.pod.memory_mib,
            "podOverheadMiB": config.pod.overhead_mib,
            "pool": server.runtime.pool_status().as_ref().map(pool),
            "unimplemented": super::unimplemented::TABLE.map(|(call, _)| call),
        });
        info.insert("config".to_owned(), details.to_string());
    }
    StatusResponse {
        status: Some(RuntimeStatus { conditions }),
        info,
        runtime_handlers: handlers.collect(),
        features: Some(RuntimeFeatures {
            supplemental_groups_policy: true,
            mount_options: true,
            ..Default::default()
        }),
    }
}

fn pool(status: &PoolStatus) -> Value {
    let counters = &status.counters;
    let warm = status.warm.iter().map(|(shape, age)| {
        json!({"vcpus": shape.vcpus, "memoryMiB": shape.memory_mib, "ageSeconds": age.as_secs()})
    });
    json!({
        "size": status.size,
        "warm": warm.collect::<Vec<_>>(),
        "filling": status.filling,
        "bytes": status.bytes,
        "held": status.held,
        "hits": counters.hits,
        "misses": counters.misses,
        "failedClaims": counters.failed_claims,
        "fills": counters.fills,
        "failedFills": counters.failed_fills,
    })
}
