//! [`Image`]: layers and a configuration, as an OCI or Docker manifest, alone or in an index.

use super::digest;
use super::layer::{Compression, Layer};
use crate::failure::Result;
use serde_json::{Value, json};

/// Media types of manifest and configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// application/vnd.oci.image.*
    Oci,
    /// Docker image manifest version 2, schema 2.
    Docker,
}

/// A blob with its media type, as a manifest's descriptor names it.
#[derive(Debug, Clone)]
pub(crate) struct Blob {
    /// Media type.
    pub kind: String,
    /// Content.
    pub bytes: Vec<u8>,
}

impl Blob {
    fn descriptor(&self) -> Value {
        json!({"mediaType": self.kind, "digest": digest(&self.bytes), "size": self.bytes.len()})
    }
}

/// An image of one platform.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    /// Layers, lowest first.
    pub layers: Vec<Layer>,
    /// The `config` object of the image configuration (Env, Cmd, User …).
    pub config: Value,
    /// Media types.
    pub format: Format,
}

impl Image {
    /// Creates an OCI image from layers and the `config` object of its configuration.
    pub(crate) fn new(layers: Vec<Layer>, config: Value) -> Self {
        Self {
            layers,
            config,
            format: Format::Oci,
        }
    }

    /// Returns the image configuration.
    pub(crate) fn config_blob(&self) -> Result<Blob> {
        let diff_ids: Vec<_> = self.layers.iter().map(|l| l.diff_id.as_str()).collect();
        let bytes = serde_json::to_vec(&json!({
            "architecture": "amd64", "os": "linux", "created": "2023-11-14T22:13:20Z", "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": diff_ids.iter().map(|_| json!({"created_by": "boxlite-e2e"})).collect::<Vec<_>>(),
        }))?;
        let kind = match self.format {
            Format::Oci => "application/vnd.oci.image.config.v1+json",
            Format::Docker => "application/vnd.docker.container.image.v1+json",
        };
        Ok(Blob {
            kind: kind.into(),
            bytes,
        })
    }

    /// Returns the image ID, the digest of the configuration.
    pub(crate) fn id(&self) -> Result<String> {
        Ok(digest(&self.config_blob()?.bytes))
    }

    /// Returns the manifest.
    pub(crate) fn manifest(&self) -> Result<Blob> {
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|l| json!({"mediaType": self.layer_type(l.compression), "digest": l.digest, "size": l.blob.len()}))
            .collect();
        let kind = match self.format {
            Format::Oci => "application/vnd.oci.image.manifest.v1+json",
            Format::Docker => "application/vnd.docker.distribution.manifest.v2+json",
        };
        let config = self.config_blob()?.descriptor();
        let bytes = serde_json::to_vec(
            &json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers}),
        )?;
        Ok(Blob {
            kind: kind.into(),
            bytes,
        })
    }

    fn layer_type(&self, compression: Compression) -> &'static str {
        match (self.format, compression) {
            (Format::Oci, Compression::Plain) => "application/vnd.oci.image.layer.v1.tar",
            (Format::Oci, Compression::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (Format::Oci, Compression::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
            (Format::Docker, Compression::Plain) => "application/vnd.docker.image.rootfs.diff.tar",
            (Format::Docker, _) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
        }
    }

    /// Returns an index with a foreign platform's manifest before this one, so that a client that uses the first entry
    /// fails.
    pub(crate) fn index(&self, foreign: &Blob) -> Result<Blob> {
        let mut first = foreign.descriptor();
        first["platform"] = json!({"architecture": "s390x", "os": "linux"});
        let mut own = self.manifest()?.descriptor();
        own["platform"] = json!({"architecture": "amd64", "os": "linux"});
        let kind = match self.format {
            Format::Oci => "application/vnd.oci.image.index.v1+json",
            Format::Docker => "application/vnd.docker.distribution.manifest.list.v2+json",
        };
        let bytes = serde_json::to_vec(
            &json!({"schemaVersion": 2, "mediaType": kind, "manifests": [first, own]}),
        )?;
        Ok(Blob {
            kind: kind.into(),
            bytes,
        })
    }
}
