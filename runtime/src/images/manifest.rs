//! Parses and checks indexes, manifests and configs, and selects the platform.
//!
//! Works on bytes whose digest has been verified. Called by `pull`.
//!
//! Supports OCI image indexes, OCI manifests, Docker manifest lists and Docker schema 2. A document that could be read
//! both as an index and as a manifest is rejected (CVE-2021-41190).

use oci_spec::image::ImageConfiguration;
use serde::Deserialize;

use super::error::{ImageError, ImageResult};
use super::reference::Digest;

pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(super) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// Maximum number of layers of an image. overlayfs supports 500; real images have fewer than 128.
pub(super) const MAX_LAYERS: usize = 256;
/// Maximum number of entries of an index.
const MAX_INDEX_ENTRIES: usize = 4096;
/// Maximum nesting of indexes.
pub(super) const MAX_INDEX_DEPTH: usize = 3;
/// Maximum size of a manifest or index: the size that registries must accept by the OCI distribution specification.
pub(super) const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Maximum size of a config; real ones have a few KiB, or some hundred KiB with the history of generated images.
pub(super) const MAX_CONFIG_BYTES: u64 = 8 << 20;

/// Descriptor of content.
#[derive(Debug, Clone)]
pub(super) struct Descriptor {
    pub media_type: String,
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
}

/// A parsed manifest document.
#[derive(Debug)]
pub(super) enum Document {
    /// An index, with its entry for this machine.
    Index(Descriptor),
    Manifest(Manifest),
}

/// Manifest of an image.
#[derive(Debug)]
pub(super) struct Manifest {
    pub config: Descriptor,
    /// Lowest first.
    pub layers: Vec<Descriptor>,
}

/// Compression of a layer's blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Plain,
    Gzip,
    Zstd,
}

/// Platform of this machine's guests, with Go's names.
#[derive(Debug, Clone, Copy)]
pub(super) struct Platform {
    pub os: &'static str,
    pub architecture: &'static str,
}

impl Platform {
    /// Returns Linux on the host's architecture.
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

    /// As [`Self::takes`], for a config, whose variant may be any.
    fn takes_any_variant(&self, platform: &RawPlatform) -> bool {
        let found = Normalized::of(platform);
        found.os == self.os && found.architecture == self.architecture
    }

    /// Accepts no variant or the base variant, because a guest's CPU need not support amd64/v3.
    fn takes(&self, platform: &RawPlatform) -> bool {
        let found = Normalized::of(platform);
        found.os == self.os && found.architecture == self.architecture && found.variant.is_empty()
    }
}

/// A platform in the form of containerd's `platforms.Normalize`.
#[derive(Debug, PartialEq, Eq)]
struct Normalized {
    os: String,
    architecture: String,
    /// Empty for the base variant of the architecture.
    variant: String,
}

impl Normalized {
    fn of(platform: &RawPlatform) -> Self {
        let os = match platform.os.to_ascii_lowercase().as_str() {
            "" => "linux".to_owned(),
            "macos" => "darwin".to_owned(),
            os => os.to_owned(),
        };
        let variant = platform.variant.as_deref().unwrap_or_default();
        let variant = variant.to_ascii_lowercase();
        let (architecture, variant) = match platform.architecture.to_ascii_lowercase().as_str() {
            "i386" => ("386", ""),
            "x86_64" | "x86-64" | "amd64" => ("amd64", strip_base(&variant, &["v1"])),
            "aarch64" | "arm64" => ("arm64", strip_base(&variant, &["8", "v8", "v8.0"])),
            "armhf" => ("arm", "v7"),
            "armel" => ("arm", "v6"),
            "arm" => (
                "arm",
                match variant.as_str() {
                    "" | "7" => "v7",
                    "5" => "v5",
                    "6" => "v6",
                    "8" => "v8",
                    other => other,
                },
            ),
            other => {
                return Self {
                    os,
                    architecture: other.to_owned(),
                    variant,
                };
            }
        };
        Self {
            os,
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
        }
    }
}

/// Returns an empty variant for one of the names of the architecture's base variant.
fn strip_base<'a>(variant: &'a str, base: &[&str]) -> &'a str {
    if base.contains(&variant) { "" } else { variant }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: Option<u32>,
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

#[derive(Debug, Deserialize)]
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

/// Parses a manifest or index. `what` names it in errors; `media_type` is the response's Content-Type.
pub(super) fn parse(
    what: &str,
    media_type: Option<&str>,
    bytes: &[u8],
    platform: Platform,
) -> ImageResult<Document> {
    let invalid =
        |e: serde_json::Error| ImageError::invalid(what, format!("not an image manifest: {e}"));
    let mut value: serde_json::Value = serde_json::from_slice(bytes).map_err(invalid)?;
    normalize(&mut value);
    let raw: RawDocument = serde_json::from_value(value).map_err(invalid)?;
    // containerd does not require the version, but refuses documents of version 1.
    if raw.fs_layers.is_some() || raw.schema_version.is_some_and(|version| version < 2) {
        return Err(ImageError::invalid(
            what,
            "schema version 1 is not supported",
        ));
    }
    let named = raw.media_type.as_deref().or(media_type).unwrap_or("");
    match (raw.manifests, raw.layers, raw.config) {
        (Some(manifests), None, None) if !matches!(named, OCI_MANIFEST | DOCKER_MANIFEST) => {
            choose(what, manifests, platform).map(Document::Index)
        }
        (None, layers, Some(config)) if !matches!(named, OCI_INDEX | DOCKER_LIST) => {
            let layers = layers.unwrap_or_default();
            if layers.len() > MAX_LAYERS {
                let what = format!("the number of layers of {what}");
                return Err(ImageError::TooLarge {
                    subject: what,
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
            format!("neither an index nor a manifest (media type {named:?})"),
        )),
    }
}

fn choose(what: &str, entries: Vec<RawDescriptor>, platform: Platform) -> ImageResult<Descriptor> {
    if entries.len() > MAX_INDEX_ENTRIES {
        let what = format!("the number of entries of {what}");
        return Err(ImageError::TooLarge {
            subject: what,
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
                // A bounded number, since an index may list thousands.
                if offered.len() < 16 && name != "unknown/unknown" {
                    offered.push(name);
                }
            }
            // The platform is optional if there is only one image; its config is checked later.
            None => without_platform = without_platform.or(Some(entry)),
        }
    }
    match without_platform {
        Some(entry) => entry.check(what),
        None => Err(ImageError::NoPlatform {
            subject: what.to_owned(),
            wanted: platform.name(),
            offered: if offered.is_empty() {
                "nothing".into()
            } else {
                offered.join(", ")
            },
        }),
    }
}

/// Parses an image's config, checks that it is for `platform` and describes `layers` layers, and returns the diff IDs.
pub(super) fn parse_config(
    what: &str,
    bytes: &[u8],
    layers: usize,
    platform: Platform,
) -> ImageResult<(ImageConfiguration, Vec<Digest>)> {
    let no_config =
        |e: serde_json::Error| ImageError::invalid(what, format!("not an image config: {e}"));
    let mut value: serde_json::Value = serde_json::from_slice(bytes).map_err(no_config)?;
    normalize(&mut value);
    let found: RawPlatform = serde_json::from_value(value.clone()).map_err(no_config)?;
    // A missing architecture matches any, as in containerd.
    if !found.architecture.is_empty() && !platform.takes_any_variant(&found) {
        return Err(ImageError::NoPlatform {
            subject: what.to_owned(),
            wanted: platform.name(),
            offered: format!("{}/{}", found.os, found.architecture),
        });
    }
    if let serde_json::Value::Object(map) = &mut value {
        map.insert("os".into(), platform.os.into());
        map.insert("architecture".into(), platform.architecture.into());
        map.entry("rootfs")
            .or_insert_with(|| serde_json::json!({"type": "layers", "diff_ids": []}));
    }
    let config: ImageConfiguration = serde_json::from_value(value).map_err(no_config)?;
    let diff_ids = config.rootfs().diff_ids();
    if diff_ids.len() != layers {
        let reason = format!("it has {} diff IDs for {layers} layers", diff_ids.len());
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

/// Field names of manifests, indexes and configs, except those of free-form maps.
const FIELDS: [&str; 29] = [
    "schemaVersion",
    "mediaType",
    "manifests",
    "layers",
    "fsLayers",
    "digest",
    "size",
    "platform",
    "os",
    "architecture",
    "variant",
    "config",
    "rootfs",
    "diff_ids",
    "history",
    "created",
    "author",
    "User",
    "ExposedPorts",
    "Env",
    "Entrypoint",
    "Cmd",
    "Volumes",
    "WorkingDir",
    "Labels",
    "StopSignal",
    "type",
    "empty_layer",
    "created_by",
];
/// Fields with free-form keys.
const MAPS: [&str; 4] = ["Labels", "Volumes", "ExposedPorts", "annotations"];

/// Removes null members and corrects the case of field names, so that documents are read as Go reads them: Docker writes
/// null for fields that OCI omits, and Go's JSON ignores the case of names. The recursion is bounded because serde_json
/// limits the nesting to 128.
fn normalize(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(map) => {
            for (name, mut value) in std::mem::take(map) {
                let known = FIELDS
                    .iter()
                    .find(|field| field.eq_ignore_ascii_case(&name));
                let name = known.map_or(name, |field| (*field).to_owned());
                if value.is_null() {
                    continue;
                }
                if MAPS.contains(&name.as_str()) {
                    drop_nulls(&mut value);
                } else {
                    normalize(&mut value);
                }
                map.insert(name, value);
            }
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(normalize),
        _ => {}
    }
}

/// Removes null members.
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
    /// Detects the compression from the first bytes of a blob. Media types are unreliable (`+gzip` on plain tars).
    pub(super) fn sniff(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A skippable frame, with which seekable zstd starts.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::Plain,
        }
    }
}

/// Rejects media types other than file system layers (in-toto attestations, Helm charts, encrypted layers).
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
            format!("media type {media_type:?} is not a layer type"),
        ))
    }
}

#[cfg(test)]
mod tests;
