//! Images used by critest, made from Debian's busybox and nginx and pushed under the names that it expects.
//!
//! Half of them are indexes whose first entry is an empty image of another architecture, so that a runtime that uses the
//! first entry fails. Replacements for tools that Debian's busybox lacks (`pgrep`, a System V `ipcs`, a bridge in a
//! kernel without bridges) are in [`tools`] and in docs/conformance.md.

use super::Programs;
use crate::failure::{During, Result};
use crate::image::build::{Format, Image};
use crate::image::busybox::{self, with_libraries};
use crate::image::layer::{Compression, Layer, LayerTar};
use crate::image::registry::Registry;
use serde_json::{Value, json};
use std::path::Path;

/// Repository prefix of most of the images, at gcr.io.
const STAGING: &str = "k8s-staging-cri-tools";
/// Repository prefix of Kubernetes' test images, at registry.k8s.io.
const E2E: &str = "e2e-test-images";
/// PATH in every image.
const PATH: &str = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";

/// Substitute for `pgrep`, which the images' busybox lacks.
const PGREP: &[u8] = b"#!/bin/sh
found=1
for status in /proc/[0-9]*/comm; do
  read -r name < $status 2>/dev/null || continue
  pid=${status#/proc/}
  case $name in *$1*) [ ${pid%/comm} = $$ ] || { echo ${pid%/comm}; found=0; } ;; esac
done
exit $found
";

/// Substitute for `brctl`, since the guest's kernel has no bridges. The specs test whether a network device can be
/// created: NET_ADMIN in both cases.
const BRCTL: &[u8] = b"#!/bin/sh
case $1 in addbr) exec ip link add \"$2\" type dummy || exec ip link add \"$2\" type veth ;; esac
exec busybox brctl \"$@\"
";

/// Builds and pushes all images. Every registry host of the references maps to this registry.
pub(crate) async fn push(registry: &Registry, busybox_path: &Path, programs: &Programs) -> Result {
    let base = vec![busybox::layer(busybox_path, Compression::Gzip)?, tools()?];
    let push = Push { registry };
    let shell = json!({"Cmd": ["sh"], "Env": [PATH]});
    push.index(&format!("{E2E}/busybox"), "1.29-2", &base, shell.clone())
        .await?;
    let page = json!({"Cmd": ["httpd", "-f", "-v", "-p", "80", "-h", "/var/www"], "Env": [PATH],
        "ExposedPorts": {"80/tcp": {}}});
    // The spec waits for this server's name in the log.
    let start = "echo httpd serves; exec httpd -f -v -p 80 -h /var/www";
    let page_config = merge(page, json!({"Cmd": ["sh", "-c", start]}));
    push.index(&format!("{E2E}/httpd"), "2.4.39-4", &base, page_config)
        .await?;
    servers(&push, &base, programs).await?;
    let mut nnp = LayerTar::default();
    let program = std::fs::read(&programs.nnp).during(programs.nnp.display())?;
    nnp.file("nnp", 0o4755, &program)?;
    let layers = [base.clone(), vec![nnp.finish(Compression::Gzip)?]].concat();
    let config = json!({"Entrypoint": ["/nnp"], "Env": [PATH]});
    push.plain(&format!("{E2E}/nonewprivs"), "1.3", &layers, config)
        .await?;
    let pause = json!({"Entrypoint": ["sleep", "infinity"], "User": "65535:65535", "Env": [PATH]});
    push.index("pause", "3.9", &base, pause).await?;
    users(&push, &base).await?;
    references(&push, &base).await
}

/// Builds the nginx images of two ports.
async fn servers(push: &Push<'_>, base: &[Layer], programs: &Programs) -> Result {
    let repositories = [
        (format!("{E2E}/nginx"), "1.14-2", 80),
        (format!("{STAGING}/hostnet-nginx-amd64"), "latest", 12003),
    ];
    for (name, tag, port) in repositories {
        let layers = [base.to_vec(), vec![nginx(&programs.nginx, port)?]].concat();
        let config =
            json!({"Cmd": ["nginx", "-g", "daemon off;"], "Env": [PATH], "StopSignal": "SIGQUIT"});
        push.index(&name, tag, &layers, config).await?;
    }
    Ok(())
}

/// Builds images whose configuration names a user.
async fn users(push: &Push<'_>, base: &[Layer]) -> Result {
    for (name, user) in [
        ("uid", "1002"),
        ("username", "www-data"),
        ("uid-group", "1003:1004"),
        ("username-group", "www-data:1004"),
    ] {
        let config = json!({"Cmd": ["sh"], "Env": [PATH], "User": user});
        push.plain(
            &format!("{STAGING}/test-image-user-{name}"),
            "latest",
            base,
            config,
        )
        .await?;
    }
    let mut people = LayerTar::default();
    people.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\ndefault-user:x:1000:1000::/tmp:/bin/sh\n",
    )?;
    people.file(
        "etc/group",
        0o644,
        b"root:x:0:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n",
    )?;
    let layers = [base.to_vec(), vec![people.finish(Compression::Gzip)?]].concat();
    let config = json!({"Cmd": ["sh"], "Env": [PATH], "User": "1000"});
    push.index(
        &format!("{STAGING}/test-image-predefined-group"),
        "latest",
        &layers,
        config,
    )
    .await
}

/// Builds images that are only pulled, listed and removed.
async fn references(push: &Push<'_>, base: &[Layer]) -> Result {
    for (name, tag, content) in [
        ("test-image-1", "latest", "1"),
        ("test-image-2", "latest", "2"),
        ("test-image-3", "latest", "3"),
        ("test-image-latest", "latest", "latest"),
        ("test-image-tag", "test", "tag test"),
        ("test-image-tag", "all", "tag all"),
        ("test-image-tags", "1", "tags"),
        ("test-image-tags", "2", "tags"),
        ("test-image-tags", "3", "tags"),
    ] {
        let mut layer = LayerTar::default();
        layer.file("content", 0o644, content.as_bytes())?;
        let layers = [base.to_vec(), vec![layer.finish(Compression::Gzip)?]].concat();
        let config = json!({"Cmd": ["sh"], "Env": [PATH]});
        let name = format!("{STAGING}/{name}");
        if content == "2" || content.starts_with("tag") {
            push.index(&name, tag, &layers, config).await?;
        } else {
            push.plain(&name, tag, &layers, config).await?;
        }
    }
    Ok(())
}

/// Returns a layer of programs that specs call and Debian's busybox lacks.
pub(crate) fn tools() -> Result<Layer> {
    let mut tar = LayerTar::default();
    tar.file("bin/pgrep", 0o755, PGREP)?
        .file("bin/brctl", 0o755, BRCTL)?;
    with_libraries(&mut tar, Path::new("/usr/bin/ipcs"), "bin/ipcs")?;
    tar.finish(Compression::Gzip)
}

/// Returns a layer with nginx and its libraries, as in the usual image: worker user, log files that are the container's
/// streams, a page.
pub(crate) fn nginx(program: &Path, port: u16) -> Result<Layer> {
    let mut tar = LayerTar::default();
    for dir in [
        "usr/sbin",
        "etc/nginx",
        "usr/share/nginx",
        "usr/share/nginx/html",
        "var/run",
        "run",
        "var/lib",
        "var/lib/nginx",
        "var/log",
        "var/log/nginx",
    ] {
        tar.dir(dir, 0o755)?;
    }
    with_libraries(&mut tar, program, "usr/sbin/nginx")?;
    let config = format!(
        "user www-data;\nworker_processes 1;\npid /var/run/nginx.pid;\nerror_log /var/log/nginx/error.log;\n\
         events {{ worker_connections 64; }}\nhttp {{\n  access_log /var/log/nginx/access.log;\n  server {{\n    listen {port};\n    \
         listen [::]:{port};\n    root /usr/share/nginx/html;\n  }}\n}}\n"
    );
    tar.file("etc/nginx/nginx.conf", 0o644, config.as_bytes())?;
    tar.file(
        "usr/share/nginx/html/index.html",
        0o644,
        b"<h1>Welcome to nginx!</h1>\n",
    )?;
    tar.symlink("var/log/nginx/access.log", "/dev/stdout")?
        .symlink("var/log/nginx/error.log", "/dev/stderr")?;
    tar.finish(Compression::Zstd)
}

fn merge(mut config: Value, more: Value) -> Value {
    if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
        config.extend(more);
    }
    config
}

struct Push<'a> {
    registry: &'a Registry,
}

impl Push<'_> {
    /// Pushes a manifest list whose first entry is another platform.
    async fn index(&self, name: &str, tag: &str, layers: &[Layer], config: Value) -> Result {
        let mut image = Image::new(layers.to_vec(), config);
        // Docker's media types do not include zstd.
        if layers.iter().all(|l| l.compression != Compression::Zstd) {
            image.format = Format::Docker;
        }
        self.registry.push_index(name, tag, &image).await?;
        Ok(())
    }

    /// Pushes a plain OCI manifest.
    async fn plain(&self, name: &str, tag: &str, layers: &[Layer], config: Value) -> Result {
        let image = Image::new(layers.to_vec(), config);
        self.registry.push(name, tag, &image).await?;
        Ok(())
    }
}
