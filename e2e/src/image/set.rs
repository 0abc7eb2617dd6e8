//! Images used by most tests, pushed once: `base` (an OCI index with a foreign platform first), `zstd` (its second
//! layer), `docker` (schema 2), `layers` (whiteouts, opaque directories, hard links, xattrs, devices), `user`.

use super::build::{Format, Image};
use super::layer::{Compression, Layer, LayerTar};
use super::{busybox, registry::Registry};
use crate::failure::Result;
use serde_json::json;
use std::path::Path;

/// References and digests of the pushed images.
#[derive(Debug, Clone)]
pub(crate) struct ImageSet {
    /// The busybox layer, for further images.
    pub busybox: Layer,
    /// `registry/base:1`; digest of its index in [`Self::base_digest`].
    pub base: String,
    /// Digest of the index of `base`.
    pub base_digest: String,
    /// Image ID of `base`.
    pub base_id: String,
    /// `registry/zstd:1`.
    pub zstd: String,
    /// `registry/docker:1`.
    pub docker: String,
    /// `registry/layers:1`.
    pub layers: String,
    /// `registry/user:1`, USER app, WORKDIR /home/app, one volume, ENTRYPOINT and CMD.
    pub user: String,
}

impl ImageSet {
    /// Builds and pushes the images.
    pub(crate) async fn push(registry: &Registry, busybox_path: &Path) -> Result<Self> {
        let busybox = busybox::layer(busybox_path, Compression::Gzip)?;
        let at = |name: &str| format!("{}/{name}:1", registry.host);
        let base = Image::new(
            vec![busybox.clone()],
            json!({"Cmd": ["sh"], "Env": ["PATH=/bin:/usr/bin", "FROM_IMAGE=base"], "Labels": {"e2e": "base"}}),
        );
        let base_digest = registry.push_index("base", "1", &base).await?;
        let mut second = LayerTar::default();
        second
            .dir("opt", 0o755)?
            .file("opt/zstd", 0o644, b"from a zstd layer\n")?;
        let zstd = Image::new(
            vec![busybox.clone(), second.finish(Compression::Zstd)?],
            json!({"Cmd": ["sh"], "Env": ["PATH=/bin"]}),
        );
        registry.push("zstd", "1", &zstd).await?;
        let mut third = LayerTar::default();
        third
            .dir("opt", 0o755)?
            .file("opt/docker", 0o644, b"from a docker manifest\n")?;
        let mut docker = Image::new(
            vec![busybox.clone(), third.finish(Compression::Gzip)?],
            json!({"Cmd": ["sh"], "Env": ["PATH=/bin"]}),
        );
        docker.format = Format::Docker;
        registry.push_index("docker", "1", &docker).await?;
        registry.push("layers", "1", &layered(&busybox)?).await?;
        let user = Image::new(
            vec![busybox.clone()],
            json!({"Entrypoint": ["/bin/echo", "entry"], "Cmd": ["and", "cmd"], "User": "app",
                "WorkingDir": "/home/app", "Env": ["PATH=/bin"], "StopSignal": "SIGQUIT"}),
        );
        registry.push("user", "1", &user).await?;
        Ok(Self {
            busybox,
            base: at("base"),
            base_digest,
            base_id: base.id()?,
            zstd: at("zstd"),
            docker: at("docker"),
            layers: at("layers"),
            user: at("user"),
        })
    }
}

/// Returns an image of three layers above busybox that hide, replace and link.
fn layered(busybox: &Layer) -> Result<Image> {
    let mut one = LayerTar::default();
    one.dir("data", 0o755)?
        .file("data/gone", 0o644, b"must not be seen\n")?
        .file("data/stays", 0o600, b"one\n")?;
    one.dir("opaque", 0o755)?
        .file("opaque/old", 0o644, b"must not be seen\n")?;
    one.dir("dir-to-file", 0o755)?
        .file("dir-to-file/x", 0o644, b"")?
        .file("replaced", 0o644, b"old\n")?;
    let mut two = LayerTar::default();
    two.whiteout("data", "gone")?
        .opaque("opaque")?
        .file("opaque/new", 0o644, b"new\n")?;
    two.file("dir-to-file", 0o644, b"now a file\n")?
        .file("replaced", 0o755, b"new\n")?;
    let mut three = LayerTar::default();
    three
        .dir("links", 0o755)?
        .file("links/a", 0o644, b"linked\n")?
        .hard_link("links/b", "links/a")?;
    three
        .symlink("links/c", "a")?
        .symlink("links/absolute", "/data/stays")?;
    three
        .xattr("user.e2e", b"value")?
        .file("links/xattr", 0o644, b"x")?;
    three.char_device("links/null", 1, 3)?;
    three.owned_file("links/owned", 0o4755, (1000, 50_000), b"o\n")?;
    let big: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    three
        .file("links/big", 0o644, &big)?
        .file("links/holes", 0o644, &vec![0; 5_000_000])?;
    let long = format!("links/{}", "long-name-".repeat(20));
    three.file(&long, 0o644, b"long\n")?;
    let layers = vec![
        busybox.clone(),
        one.finish(Compression::Gzip)?,
        two.finish(Compression::Plain)?,
        three.finish(Compression::Zstd)?,
    ];
    Ok(Image::new(
        layers,
        json!({"Cmd": ["sh"], "Env": ["PATH=/bin"]}),
    ))
}
