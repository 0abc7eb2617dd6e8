//! [`Image`]: a container image of one layer, as an OCI image layout (image-spec v1): `oci-layout`, `index.json` and blobs.
//!
//! The same tree, version and time give the same digest. Tools for OCI layouts push it.

use crate::error::{DistError, Result};
use crate::{archive, tree};
use boxlite_sys::calendar::rfc3339;
use flate2::read::GzDecoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::io;
use std::path::Path;

/// Blobs of an image.
pub(crate) struct Image {
    layer: Vec<u8>,
    config: Vec<u8>,
    manifest: Vec<u8>,
}

impl Image {
    /// Builds an image whose root directory is `root`.
    pub(crate) fn build(root: &Path, entrypoint: &str, version: &str, epoch: u64) -> Result<Self> {
        let layer = archive::gzip(&tree::read(root)?, ".", epoch)?;
        let mut diff = Sha256::new();
        io::copy(&mut GzDecoder::new(&layer[..]), &mut diff)
            .map_err(|source| DistError::Archive { source })?;
        let created = rfc3339(epoch);
        let config = json!({
            "architecture": "amd64", "os": "linux", "created": created,
            "config": { "Entrypoint": [entrypoint], "Env": ["PATH=/"], "WorkingDir": "/" },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", hex::encode(diff.finalize()))] },
            "history": [{ "created": created, "created_by": "boxlite-dist image" }],
        })
        .to_string()
        .into_bytes();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &layer)],
            "annotations": {
                "org.opencontainers.image.created": created,
                "org.opencontainers.image.title": "boxlite-installer",
                "org.opencontainers.image.version": version,
                "org.opencontainers.image.licenses": "Apache-2.0 AND GPL-2.0-only AND LGPL-2.1-only AND BSD-3-Clause",
            },
        })
        .to_string()
        .into_bytes();
        Ok(Self {
            layer,
            config,
            manifest,
        })
    }

    /// Digest of the manifest.
    pub(crate) fn digest(&self) -> String {
        digest(&self.manifest)
    }

    /// Writes the layout into a directory that does not exist.
    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(|source| DistError::Write {
            path: blobs.clone(),
            source,
        })?;
        for blob in [&self.layer, &self.config, &self.manifest] {
            let name = digest(blob);
            crate::write(&blobs.join(name.trim_start_matches("sha256:")), blob)?;
        }
        let mut manifest = descriptor("application/vnd.oci.image.manifest.v1+json", &self.manifest);
        manifest["platform"] = json!({ "architecture": "amd64", "os": "linux" });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [manifest],
        });
        crate::write(&dir.join("index.json"), index.to_string().as_bytes())?;
        crate::write(
            &dir.join("oci-layout"),
            br#"{"imageLayoutVersion":"1.0.0"}"#,
        )
    }
}

fn digest(blob: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(blob)))
}

fn descriptor(kind: &str, blob: &[u8]) -> Value {
    json!({ "mediaType": kind, "digest": digest(blob), "size": blob.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_stores_every_referenced_blob_by_digest() {
        let dir = tempfile::tempdir().expect("a directory");
        let (root, out) = (dir.path().join("root"), dir.path().join("out"));
        fs::create_dir(&root).expect("a directory");
        fs::write(root.join("program"), "x").expect("a file");
        let image = Image::build(&root, "/program", "1.0", 42).expect("an image");
        image.write(&out).expect("a layout");
        let blob = |descriptor: &Value| {
            let name = descriptor["digest"].as_str().expect("a digest");
            let path = out.join("blobs").join(name.replace(':', "/"));
            let content = fs::read(path).expect("a blob");
            assert_eq!(digest(&content), name);
            assert_eq!(descriptor["size"], content.len());
            content
        };
        let index: Value =
            serde_json::from_slice(&fs::read(out.join("index.json")).expect("an index"))
                .expect("JSON");
        assert_eq!(index["manifests"][0]["digest"], image.digest());
        let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0])).expect("JSON");
        let layer = blob(&manifest["layers"][0]);
        let config: Value = serde_json::from_slice(&blob(&manifest["config"])).expect("JSON");
        let mut tar = Vec::new();
        io::copy(&mut GzDecoder::new(&layer[..]), &mut tar).expect("a layer");
        assert_eq!(config["rootfs"]["diff_ids"][0], digest(&tar));
        let again = Image::build(&root, "/program", "1.0", 42).expect("an image");
        assert_eq!(again.digest(), image.digest());
    }
}
