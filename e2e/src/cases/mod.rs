//! The end-to-end cases, by subject. Each is an async function that reads as what a kubelet would see.

mod bad_images;
mod bad_input;
mod blocks;
mod cni;
mod death;
mod exec;
mod images;
mod lifecycle;
mod logs;
pub mod network;
mod nri;
mod observe;
mod robust;
mod security;
mod shown;
mod spec;
mod streaming;
mod trees;
mod volumes;

use crate::runner::Case;

/// All cases in the order they run.
pub fn all() -> Vec<Case> {
    [
        lifecycle::cases(),
        exec::cases(),
        streaming::cases(),
        logs::cases(),
        network::cases(),
        cni::cases(),
        spec::cases(),
        volumes::cases(),
        blocks::cases(),
        shown::cases(),
        security::cases(),
        nri::cases(),
        images::cases(),
        trees::cases(),
        observe::cases(),
        robust::cases(),
        death::cases(),
        bad_input::cases(),
        bad_images::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
