//! Test images, built from Debian's dynamic busybox and pushed to a real registry.
//!
//! [`layer`] writes tar layers entry by entry, malformed ones included. [`build`] combines layers, config, manifest and
//! index. [`archive`] writes an image to a file. [`tree`] generates random images with a model of their merged tree.
//! [`registry`] runs Debian's docker-registry and pushes. [`fault_proxy`] injects faults in front of it.

pub mod archive;
pub mod build;
pub mod busybox;
pub mod fault_proxy;
pub mod layer;
pub mod registry;
pub mod set;
pub mod tree;

use sha2::{Digest, Sha256};

/// Returns the digest, `sha256:<hex>`, of the bytes.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}
