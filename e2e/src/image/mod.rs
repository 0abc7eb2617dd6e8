//! Test images, built from Debian's dynamic busybox and pushed to a real registry.
//!
//! [`layer`] writes tar layers entry by entry, malformed ones included. [`build`] combines layers, config, manifest and
//! index. [`archive`] writes an image to a file. [`tree`] generates random images with a model of their merged tree.
//! [`registry`] runs Debian's docker-registry and pushes. [`fault_proxy`] injects faults in front of it.

pub(crate) mod archive;
pub(crate) mod build;
pub(crate) mod busybox;
pub(crate) mod fault_proxy;
pub(crate) mod layer;
pub(crate) mod registry;
pub(crate) mod set;
pub(crate) mod tree;

use sha2::{Digest, Sha256};

/// Returns the digest, `sha256:<hex>`, of the bytes.
pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}
