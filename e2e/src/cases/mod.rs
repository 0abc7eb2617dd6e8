//! End-to-end cases by subject. Each is an async function from a kubelet's point of view.

mod bad_images;
mod bad_input;
mod blocks;
mod clients;
mod cni;
mod coherence;
mod crash;
mod exec;
mod images;
mod kubelet;
mod lifecycle;
mod logs;
mod mount_export;
pub(crate) mod network;
mod nri;
mod observe;
mod odd_images;
mod resources;
mod security;
mod sockets;
mod spec;
mod streaming;
mod trees;
mod volumes;

use crate::runner::Case;

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
        spec::cases(),
        volumes::cases(),
        sockets::cases(),
        coherence::cases(),
        blocks::cases(),
        mount_export::cases(),
        security::cases(),
        nri::cases(),
        images::cases(),
        odd_images::cases(),
        trees::cases(),
        observe::cases(),
        resources::cases(),
        clients::cases(),
        crash::cases(),
        bad_input::cases(),
        bad_images::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
