//! An image as a file: an OCI layout in a tar archive, as read by `ctr image import`.

use super::build::Image;
use super::digest;
use crate::failure::Result;
use serde_json::json;
use std::path::Path;

/// Writes `image` under the full name `reference` to `path`.
pub(crate) fn write(image: &Image, reference: &str, path: &Path) -> Result {
    let mut tar = tar::Builder::new(std::fs::File::create(path)?);
    let mut add = |name: &str, bytes: &[u8]| -> Result {
        let mut header = tar::Header::new_gnu();
        header.set_size(u64::try_from(bytes.len())?);
        header.set_mode(0o644);
        Ok(tar.append_data(&mut header, name, bytes)?)
    };
    let blob = |bytes: &[u8]| {
        format!(
            "blobs/sha256/{}",
            digest(bytes).trim_start_matches("sha256:")
        )
    };
    for layer in &image.layers {
        add(&blob(&layer.blob), &layer.blob)?;
    }
    let (config, manifest) = (image.config_blob()?.bytes, image.manifest()?);
    add(&blob(&config), &config)?;
    add(&blob(&manifest.bytes), &manifest.bytes)?;
    let index = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": manifest.kind, "digest": digest(&manifest.bytes), "size": manifest.bytes.len(),
        "platform": {"architecture": "amd64", "os": "linux"},
        "annotations": {"io.containerd.image.name": reference},
    }]});
    add("index.json", &serde_json::to_vec(&index)?)?;
    add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    tar.finish()?;
    Ok(())
}
