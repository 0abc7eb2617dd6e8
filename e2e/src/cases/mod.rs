//! End-to-end cases by subject. Each is an async function from a kubelet's point of view.

mod bad_images;
mod bad_input;
mod blocks;
mod clients;
mod cni;
mod coherence;
mod collectors;
mod crash;
mod damage;
mod exec;
mod hostile_agent;
mod hostile_guest;
mod images;
mod kubelet;
mod lifecycle;
mod logs;
mod mount_export;
pub(crate) mod network;
mod nri;
mod observe;
mod odd_images;
mod operator;
mod passt;
mod peers;
mod pool;
mod resources;
mod security;
mod sockets;
mod spec;
mod streaming;
mod traces;
mod trees;
mod volumes;
mod work;

use crate::failure::Result;
use crate::pod::container_spec;
use crate::runner::Case;
use k8s_cri::v1::{ContainerConfig, LinuxContainerSecurityContext, Mount};
use std::path::Path;

/// Returns the security context of a container configuration.
fn security_context(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
}

/// Returns a container that prints "bye" and exits with `code` once the file `now` exists in `dir`, which is created.
fn exits_on_signal_file(image: &str, dir: &Path, code: u8) -> Result<ContainerConfig> {
    std::fs::create_dir_all(dir)?;
    let script = format!("until test -e /go/now; do usleep 50000; done; echo bye; exit {code}");
    let mut config = container_spec("c", image, &["sh", "-c", &script]);
    config.mounts = vec![Mount {
        host_path: dir.display().to_string(),
        container_path: "/go".into(),
        ..Default::default()
    }];
    Ok(config)
}

/// Returns all cases in the order in which they run.
pub(crate) fn all() -> Vec<Case> {
    [
        lifecycle::cases(),
        kubelet::cases(),
        exec::cases(),
        streaming::cases(),
        logs::cases(),
        network::cases(),
        cni::cases(),
        passt::cases(),
        spec::cases(),
        volumes::cases(),
        sockets::cases(),
        coherence::cases(),
        blocks::cases(),
        mount_export::cases(),
        security::cases(),
        hostile_guest::cases(),
        hostile_agent::cases(),
        nri::cases(),
        images::cases(),
        damage::cases(),
        odd_images::cases(),
        trees::cases(),
        observe::cases(),
        traces::cases(),
        collectors::cases(),
        operator::cases(),
        resources::cases(),
        clients::cases(),
        peers::cases(),
        pool::cases(),
        work::cases(),
        crash::cases(),
        bad_input::cases(),
        bad_images::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
