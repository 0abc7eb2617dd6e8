//! Images used by containerd's integration tests, made from Debian's busybox and pushed under the names of the module's
//! `integration/images`.

use super::Programs;
use crate::conformance::images::nginx;
use crate::failure::{During, Result};
use crate::image::build::Image;
use crate::image::busybox::{self, with_libraries};
use crate::image::layer::{Compression, Layer, LayerTar};
use crate::image::registry::Registry;
use serde_json::{Value, json};
use std::path::Path;

/// PATH in every image.
const PATH: &str = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
/// `/pause` of the image pause: it ends on SIGTERM.
const PAUSE: &[u8] = b"#!/bin/sh\ntrap 'exit 0' TERM INT\nsleep infinity &\nwait\n";
/// User database of the upstream busybox image: root is a member of wheel.
const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\n\
    nobody:x:65534:65534:nobody:/home:/bin/false\n";
const GROUP: &[u8] = b"root:x:0:\ndaemon:x:1:\nwheel:x:10:root\nnogroup:x:65534:\n";

/// Configuration of the image nginx: notices are on its standard error.
const NGINX_CONF: &[u8] = b"worker_processes 1;\npid /var/run/nginx.pid;\nerror_log /dev/stderr notice;\n\
    events { worker_connections 64; }\nhttp { server { listen 80; root /usr/share/nginx/html; } }\n";

/// Builds and pushes all images. Returns the digest of busybox.
pub(crate) async fn push(
    registry: &Registry,
    busybox: &Path,
    programs: &Programs,
) -> Result<String> {
    let base = vec![busybox::layer(busybox, Compression::Gzip)?, users()?];
    let shell = json!({"Cmd": ["sh"], "Env": [PATH]});
    let one = async |name: &str, tag: &str, more: Vec<LayerTar>, config: Value| -> Result<String> {
        let mut layers: Vec<Layer> = base.clone();
        for tar in more {
            layers.push(tar.finish(Compression::Gzip)?);
        }
        registry.push(name, tag, &Image::new(layers, config)).await
    };
    let busybox = one("containerd/busybox", "1.36", vec![], shell.clone()).await?;
    let mut release = LayerTar::default();
    release.file("etc/os-release", 0o644, b"ID=alpine\n")?;
    one("containerd/alpine", "3.14.0", vec![release], shell.clone()).await?;
    let mut pause = LayerTar::default();
    pause.file("pause", 0o755, PAUSE)?;
    let entrypoint = json!({"Entrypoint": ["/pause"], "Env": [PATH]});
    one("pause", "3.10.2", vec![pause], entrypoint).await?;
    let mut program = LayerTar::default();
    with_libraries(&mut program, &programs.stress, "usr/bin/stress")?;
    let idle = json!({"Cmd": ["sleep", "infinity"], "Env": [PATH]});
    one(
        "e2e-test-images/resource-consumer",
        "1.10",
        vec![program],
        idle,
    )
    .await?;
    let config = json!({"Cmd": ["sh"], "Env": [PATH],
        "Volumes": {"/test_dir": {}, "C:/weird_test_dir": {}, "/:colon_prefixed": {}}});
    one("containerd/volume-copy-up", "2.2", vec![volumes()?], config).await?;
    let mut owned = LayerTar::default();
    owned.owned_dir("test_dir", 0o755, (65534, 65534))?;
    let config = json!({"Cmd": ["sh"], "Env": [PATH], "Volumes": {"/test_dir": {}}});
    one("containerd/volume-ownership", "2.1", vec![owned], config)
        .await
        .during("volume-ownership")?;
    server(registry, &base, &programs.nginx).await?;
    Ok(busybox)
}

/// Pushes nginx, which logs its start.
async fn server(registry: &Registry, base: &[Layer], program: &Path) -> Result {
    let mut config = LayerTar::default();
    config.file("etc/nginx/nginx.conf", 0o644, NGINX_CONF)?;
    let more = vec![nginx(program, 80)?, config.finish(Compression::Gzip)?];
    let command = json!({"Cmd": ["nginx", "-g", "daemon off;"], "Env": [PATH]});
    let image = Image::new([base.to_vec(), more].concat(), command);
    registry.push("containerd/nginx", "1.27.0", &image).await?;
    Ok(())
}

fn users() -> Result<Layer> {
    let mut tar = LayerTar::default();
    tar.file("etc/passwd", 0o644, PASSWD)?
        .file("etc/group", 0o644, GROUP)?;
    tar.finish(Compression::Gzip)
}

/// Returns the three volumes of volume-copy-up.
fn volumes() -> Result<LayerTar> {
    let content = b"test_content\n";
    let mut tar = LayerTar::default();
    tar.dir("test_dir", 0o755)?
        .file("test_dir/test_file", 0o644, content)?
        .dir("C:", 0o755)?
        .dir("C:/weird_test_dir", 0o755)?
        .file("C:/weird_test_dir/weird_test_file", 0o644, content)?
        .dir(":colon_prefixed", 0o755)?
        .file(":colon_prefixed/colon_prefixed_file", 0o644, content)?;
    Ok(tar)
}
