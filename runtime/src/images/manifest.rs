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

mod lenient;

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
    /// Layers of the file system, lowest first.
    pub layers: Vec<Descriptor>,
    /// Media types of other blobs (signatures, attestations), which containerd does not unpack either.
    pub ignored: Vec<String>,
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

    /// As [`Self::takes`], for a config: no other image could be chosen instead, so variant and OS features may be any.
    fn takes_config(&self, platform: &RawPlatform) -> bool {
        let found = Normalized::of(platform);
        found.os == self.os && found.architecture == self.architecture
    }

    /// Accepts no variant or the base variant, because a guest's CPU need not support amd64/v3, and no OS features, which
    /// mark entries for particular kernels or runtimes.
    fn takes(&self, platform: &RawPlatform) -> bool {
        self.takes_config(platform)
            && Normalized::of(platform).variant.is_empty()
            && platform.os_features.is_empty()
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
            "aarch64" | "arm64" => (
                "arm64",
                match strip_base(&variant, &["8", "v8", "v8.0"]) {
                    "9" | "9.0" | "v9.0" => "v9",
                    other => other,
                },
            ),
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
    /// Only its type is checked, as in containerd: OCI documents without it exist.
    #[serde(rename = "schemaVersion")]
    _schema_version: Option<i64>,
    #[serde(default)]
    media_type: String,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    digest: String,
    #[serde(default)]
    size: i64,
    platform: Option<RawPlatform>,
}

#[derive(Debug, Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    variant: Option<String>,
    #[serde(default, rename = "os.features")]
    os_features: Vec<String>,
}

impl RawDescriptor {
    /// Checks the fields that a download needs. Entries that are not downloaded may lack them.
    fn check(self, what: &str) -> ImageResult<Descriptor> {
        let digest =
            Digest::parse(&self.digest).map_err(|reason| ImageError::invalid(what, reason))?;
        match u64::try_from(self.size) {
            Ok(size) if size > 0 => Ok(Descriptor {
                media_type: self.media_type,
                digest,
                size,
            }),
            _ => Err(ImageError::invalid(
                what,
                format!("size {} of {digest} is not positive", self.size),
            )),
        }
    }
}

/// Parses a manifest or index. `what` is its name in errors, `media_type` is the response's Content-Type.
pub(super) fn parse(
    what: &str,
    media_type: Option<&str>,
    bytes: &[u8],
    platform: Platform,
) -> ImageResult<Document> {
    let invalid =
        |e: serde_json::Error| ImageError::invalid(what, format!("not an image manifest: {e}"));
    let parsed = lenient::parse(bytes).map_err(invalid)?;
    let version_1 = parsed.has("fsLayers");
    let (index, manifest) = (
        parsed.has("manifests"),
        parsed.has("config") || parsed.has("layers"),
    );
    let raw: RawDocument = serde_json::from_value(parsed.value).map_err(invalid)?;
    if version_1 {
        return Err(ImageError::invalid(
            what,
            "schema version 1 is not supported",
        ));
    }
    let named = match raw.media_type.as_str() {
        "" => media_type.unwrap_or(""),
        named => named,
    };
    if index && !manifest && !matches!(named, OCI_MANIFEST | DOCKER_MANIFEST) {
        choose(what, raw.manifests.unwrap_or_default(), platform).map(Document::Index)
    } else if let Some(config) = raw.config
        && !index
        && !matches!(named, OCI_INDEX | DOCKER_LIST)
    {
        read_manifest(what, config, raw.layers.unwrap_or_default()).map(Document::Manifest)
    } else {
        let reason = format!("neither an index nor a manifest (media type {named:?})");
        Err(ImageError::invalid(what, reason))
    }
}

fn read_manifest(
    what: &str,
    config: RawDescriptor,
    blobs: Vec<RawDescriptor>,
) -> ImageResult<Manifest> {
    if blobs.len() > MAX_LAYERS {
        return Err(ImageError::TooLarge {
            subject: format!("the number of layers of {what}"),
            limit: MAX_LAYERS as u64,
            unit: "layers",
        });
    }
    let config = config.check(what)?;
    let (mut layers, mut ignored) = (Vec::new(), Vec::new());
    for blob in blobs {
        let blob = blob.check(what)?;
        if is_layer(what, &blob)? {
            layers.push(blob);
        } else {
            ignored.push(blob.media_type);
        }
    }
    if let (true, Some(first)) = (layers.is_empty(), ignored.first()) {
        let reason =
            format!("not an image: media type {first:?} of its first blob is not a layer type");
        return Err(ImageError::invalid(what, reason));
    }
    Ok(Manifest {
        config,
        layers,
        ignored,
    })
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
    let mut value = lenient::parse(bytes).map_err(no_config)?.value;
    let found: RawPlatform = serde_json::from_value(value.clone()).map_err(no_config)?;
    // A missing architecture matches any. containerd pulls such an image, too, but its transfer service does not unpack it.
    if !found.architecture.is_empty() && !platform.takes_config(&found) {
        return Err(ImageError::NoPlatform {
            subject: what.to_owned(),
            wanted: platform.name(),
            offered: format!("{}/{}", found.os, found.architecture),
        });
    }
    if let serde_json::Value::Object(map) = &mut value {
        map.insert("os".into(), platform.os.into());
        map.insert("architecture".into(), platform.architecture.into());
        let rootfs = map.entry("rootfs").or_insert_with(|| serde_json::json!({}));
        if let serde_json::Value::Object(rootfs) = rootfs {
            rootfs.entry("type").or_insert_with(|| "layers".into());
            rootfs
                .entry("diff_ids")
                .or_insert_with(|| serde_json::json!([]));
        }
    }
    let config: ImageConfiguration = serde_json::from_value(value).map_err(no_config)?;
    let rootfs = config.rootfs();
    if !matches!(rootfs.typ().as_str(), "" | "layers") {
        let reason = format!("rootfs type {:?} is not \"layers\"", rootfs.typ());
        return Err(ImageError::invalid(what, reason));
    }
    let diff_ids = rootfs.diff_ids();
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

/// Reports whether a blob is a layer of the file system. Other blobs beside layers (in-toto attestations, signatures) are
/// not part of it. Fails for layers in a form that cannot be read, such as encrypted ones.
fn is_layer(what: &str, blob: &Descriptor) -> ImageResult<bool> {
    let tars = [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    ];
    let media_type = blob.media_type.as_str();
    let suffix = tars.iter().find_map(|tar| media_type.strip_prefix(tar));
    if suffix.is_some_and(|s| matches!(s, "" | "+gzip" | "+zstd" | ".gzip" | ".zstd")) {
        return Ok(true);
    }
    let layer = suffix.is_some_and(|s| s.starts_with('+'))
        || media_type.starts_with("application/vnd.oci.image.layer.")
        || media_type == "application/vnd.erofs.layer.v1";
    if layer {
        let reason = format!(
            "media type {media_type:?} of layer {} is not supported",
            blob.digest
        );
        return Err(ImageError::invalid(what, reason));
    }
    Ok(false)
}

#[cfg(test)]
mod oddities;
#[cfg(test)]
mod tests;
