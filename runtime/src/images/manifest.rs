//! Indexes, manifests and configs: parsing, the choice of the platform, and what this node accepts of them.
//!
//! Works on bytes whose digest has been checked already; fetches nothing. Called by `pull`.
//!
//! Accepted: OCI image index, OCI manifest, Docker manifest list, Docker schema 2. A document that could be read both
//! as an index and as a manifest is refused, since two readers might disagree about it (CVE-2021-41190).

use oci_spec::image::ImageConfiguration;
use serde::Deserialize;

use super::error::{ImageError, ImageResult};
use super::reference::Digest;

pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(super) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// Layers of one image. Linux's overlayfs stacks at most 500; real images stay below 128.
pub(super) const MAX_LAYERS: usize = 256;
/// Entries of one index.
const MAX_INDEX_ENTRIES: usize = 4096;
/// Indexes in indexes.
pub(super) const MAX_INDEX_DEPTH: usize = 3;
/// Largest manifest or index in bytes: what the OCI distribution specification asks registries to take.
pub(super) const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Largest config in bytes; real ones have a few KiB, histories of generated images some hundred.
pub(super) const MAX_CONFIG_BYTES: u64 = 8 << 20;

/// A pointer to content.
#[derive(Debug, Clone)]
pub(super) struct Descriptor {
    pub media_type: String,
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
}

/// What a manifest URL gave.
#[derive(Debug)]
pub(super) enum Document {
    /// The entry for this machine.
    Index(Descriptor),
    Manifest(Manifest),
}

/// One image of one platform.
#[derive(Debug)]
pub(super) struct Manifest {
    pub config: Descriptor,
    /// Lowest first.
    pub layers: Vec<Descriptor>,
}

/// How a layer's blob is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Plain,
    Gzip,
    Zstd,
}

/// The platform of this machine's guests, in Go's words.
#[derive(Debug, Clone, Copy)]
pub(super) struct Platform {
    pub os: &'static str,
    pub architecture: &'static str,
}

impl Platform {
    /// Guests have the host's architecture and run Linux.
    pub(super) fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            os: "linux",
            architecture,
        }
    }

    fn name(&self) -> String {
        format!("{}/{}", self.os, self.architecture)
    }

    /// Without a variant or with the base one: a guest's CPU need not have what amd64/v3 asks for.
    fn takes(&self, platform: &RawPlatform) -> bool {
        let base = match self.architecture {
            "arm64" => "v8",
            _ => "v1",
        };
        platform.os == self.os
            && platform.architecture == self.architecture
            && platform
                .variant
                .as_deref()
                .is_none_or(|v| v.is_empty() || v == base)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: u32,
    media_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<RawPlatform>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    variant: Option<String>,
}

impl RawDescriptor {
    fn check(self, what: &str) -> ImageResult<Descriptor> {
        let digest =
            Digest::parse(&self.digest).map_err(|reason| ImageError::invalid(what, reason))?;
        Ok(Descriptor {
            media_type: self.media_type,
            digest,
            size: self.size,
        })
    }
}

/// Reads a manifest or index. `what` names it in errors; `media_type` is the response's Content-Type, if it had a useful one.
pub(super) fn parse(
    what: &str,
    media_type: Option<&str>,
    bytes: &[u8],
    platform: Platform,
) -> ImageResult<Document> {
    let raw: RawDocument = serde_json::from_slice(bytes)
        .map_err(|e| ImageError::invalid(what, format!("is no image manifest: {e}")))?;
    if raw.fs_layers.is_some() || raw.schema_version != 2 {
        return Err(ImageError::invalid(
            what,
            "has schema version 1, which is no longer supported",
        ));
    }
    let named = raw.media_type.as_deref().or(media_type).unwrap_or("");
    match (raw.manifests, raw.layers, raw.config) {
        (Some(manifests), None, None) if !matches!(named, OCI_MANIFEST | DOCKER_MANIFEST) => {
            choose(what, manifests, platform).map(Document::Index)
        }
        (None, Some(layers), Some(config)) if !matches!(named, OCI_INDEX | DOCKER_LIST) => {
            if layers.len() > MAX_LAYERS {
                let what = format!("the number of layers of {what}");
                return Err(ImageError::TooLarge {
                    what,
                    limit: MAX_LAYERS as u64,
                    unit: "layers",
                });
            }
            let config = config.check(what)?;
            let layers = layers
                .into_iter()
                .map(|l| l.check(what))
                .collect::<ImageResult<Vec<_>>>()?;
            Ok(Document::Manifest(Manifest { config, layers }))
        }
        _ => Err(ImageError::invalid(
            what,
            format!("is neither an index nor a manifest (media type {named:?})"),
        )),
    }
}

fn choose(what: &str, entries: Vec<RawDescriptor>, platform: Platform) -> ImageResult<Descriptor> {
    if entries.len() > MAX_INDEX_ENTRIES {
        let what = format!("the number of entries of {what}");
        return Err(ImageError::TooLarge {
            what,
            limit: MAX_INDEX_ENTRIES as u64,
            unit: "entries",
        });
    }
    let known = |d: &RawDescriptor| {
        matches!(
            d.media_type.as_str(),
            OCI_INDEX | OCI_MANIFEST | DOCKER_LIST | DOCKER_MANIFEST
        )
    };
    let mut offered = Vec::new();
    let mut without_platform = None;
    for entry in entries.into_iter().filter(known) {
        match &entry.platform {
            Some(p) if platform.takes(p) => return entry.check(what),
            Some(p) => {
                let name = match p.variant.as_deref() {
                    Some(v) if !v.is_empty() => format!("{}/{}/{v}", p.os, p.architecture),
                    _ => format!("{}/{}", p.os, p.architecture),
                };
                // Enough to see what went wrong; an index may list thousands.
                if offered.len() < 16 && name != "unknown/unknown" {
                    offered.push(name);
                }
            }
            // The specification leaves the platform out where there is one image only; its config is checked later.
            None => without_platform = without_platform.or(Some(entry)),
        }
    }
    match without_platform {
        Some(entry) => entry.check(what),
        None => Err(ImageError::NoPlatform {
            what: what.to_owned(),
            wanted: platform.name(),
            offered: if offered.is_empty() {
                "nothing".into()
            } else {
                offered.join(", ")
            },
        }),
    }
}

/// Reads an image's config and checks that it is for `platform` and describes `layers` layers. Gives the diff IDs too.
pub(super) fn parse_config(
    what: &str,
    bytes: &[u8],
    layers: usize,
    platform: Platform,
) -> ImageResult<(ImageConfiguration, Vec<Digest>)> {
    let no_config =
        |e: serde_json::Error| ImageError::invalid(what, format!("is no image config: {e}"));
    let mut value: serde_json::Value = serde_json::from_slice(bytes).map_err(no_config)?;
    // Docker writes `"Volumes": null` and the like where OCI leaves the field out.
    drop_nulls(&mut value);
    let config: ImageConfiguration = serde_json::from_value(value).map_err(no_config)?;
    let (os, architecture) = (config.os().to_string(), config.architecture().to_string());
    if os != platform.os || architecture != platform.architecture {
        return Err(ImageError::NoPlatform {
            what: what.to_owned(),
            wanted: platform.name(),
            offered: format!("{os}/{architecture}"),
        });
    }
    let diff_ids = config.rootfs().diff_ids();
    if diff_ids.len() != layers {
        let reason = format!("names {} diff IDs for {layers} layers", diff_ids.len());
        return Err(ImageError::invalid(what, reason));
    }
    let diff_ids = diff_ids
        .iter()
        .map(|d| {
            Digest::parse(d)
                .map_err(|reason| ImageError::invalid(what, format!("diff ID: {reason}")))
        })
        .collect::<ImageResult<Vec<_>>>()?;
    Ok((config, diff_ids))
}

/// serde_json bounds the nesting at 128, so the recursion is bounded too.
fn drop_nulls(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

impl Compression {
    /// What the first bytes of a blob say; media types lie too often (`+gzip` on plain tars and the reverse).
    pub(super) fn sniff(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A skippable frame, as seekable zstd has in front.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::Plain,
        }
    }
}

/// Refuses what is no layer of a file system (in-toto attestations, Helm charts, encrypted layers).
pub(super) fn check_layer_type(what: &str, media_type: &str) -> ImageResult<()> {
    let known = [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    ];
    let ok = known.iter().any(|k| {
        media_type
            .strip_prefix(k)
            .is_some_and(|suffix| matches!(suffix, "" | "+gzip" | "+zstd" | ".gzip" | ".zstd"))
    });
    if ok {
        Ok(())
    } else {
        Err(ImageError::invalid(
            what,
            format!("has media type {media_type:?}, which is no layer"),
        ))
    }
}

#[cfg(test)]
mod tests;
