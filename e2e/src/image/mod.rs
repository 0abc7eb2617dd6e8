//! Images for the tests, made here from Debian's dynamic busybox and pushed to a real registry.
//!
//! [`layer`] writes tar layers entry by entry (broken ones too), [`build`] puts layers, config, manifest and index
//! together, [`archive`] writes one as a file, [`tree`] makes random ones with a model of what a guest must see, [`registry`]
//! runs Debian's docker-registry and pushes, [`front`] stands before it and misbehaves.

pub mod archive;
pub mod build;
pub mod busybox;
pub mod front;
pub mod layer;
pub mod registry;
pub mod set;
pub mod tree;

use sha2::{Digest, Sha256};

/// `sha256:<hex>` of the bytes.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}
