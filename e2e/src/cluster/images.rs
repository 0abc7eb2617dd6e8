//! Images of the cluster's pods, pushed to the loopback registry: `busybox:1` and `agnhost:1` for the project's cases, and the
//! images that Kubernetes' test suite names at registry.k8s.io.
//!
//! The suite's programs are agnhost, pause, etcd and sample-apiserver from Go modules and Debian's bash, curl, dig, netcat and
//! nginx.
//! docs/conformance.md lists the required content.

use super::programs::Programs;
use crate::conformance::images::{nginx, tools};
use crate::failure::{During, Result};
use crate::image::build::Image;
use crate::image::busybox::{self, with_libraries};
use crate::image::layer::{Compression, Layer, LayerTar};
use crate::image::registry::Registry;
use serde_json::{Value, json};
use std::path::Path;

/// Image of most of the project's cases.
pub(crate) const BUSYBOX: &str = "127.0.0.1:5000/busybox:1";
/// Image with Kubernetes' test servers.
pub(crate) const AGNHOST: &str = "127.0.0.1:5000/agnhost:1";

/// Image of the bench's pause containers, which sleep.
pub(crate) const PAUSE: &str = "127.0.0.1:5000/pause:1";

/// Repository prefix of the suite's images.
const E2E: &str = "e2e-test-images";
/// PATH in every image.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Users of agnhost's image.
const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\nuser-defined-in-image:x:1000:1000::/home:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n";
/// Groups of agnhost's image.
const GROUP: &[u8] = b"root:x:0:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n";

/// Builds and pushes the images of the project's cases and, with `suite`, those of Kubernetes' suite.
pub(crate) async fn push(
    registry: &Registry,
    busybox_path: &Path,
    programs: &Programs,
    suite: bool,
) -> Result {
    let base = busybox::layer(busybox_path, Compression::Gzip)?;
    let shell = json!({"Cmd": ["sh"], "Env": [PATH]});
    let push = Push { registry };
    push.image("busybox", "1", &[&base], shell.clone()).await?;
    let server = json!({"Entrypoint": ["/agnhost"], "Cmd": ["pause"], "Env": [PATH]});
    let agnhost = agnhost(&programs.program("agnhost"))?;
    push.image("agnhost", "1", &[&base, &agnhost], server.clone())
        .await?;
    if !suite {
        return Ok(());
    }
    let (shell_layer, tools, clients) = (
        suite_shell(&programs.suite_shell())?,
        tools()?,
        clients(&programs.clients())?,
    );
    let name = |name: &str| format!("{E2E}/{name}");
    for tag in ["2.66.1", "2.55"] {
        let layers = [&base, &tools, &shell_layer, &clients, &agnhost];
        push.image(&name("agnhost"), tag, &layers, server.clone())
            .await?;
    }
    push_servers(&push, programs, &[&base, &agnhost]).await?;
    let plain = [&base, &tools, &shell_layer];
    push.image(
        &name("busybox"),
        "1.37.0-2",
        &[&base, &tools, &shell_layer, &netcat(&programs.clients())?],
        shell.clone(),
    )
    .await?;
    push.image(&name("ipc-utils"), "1.4", &plain, shell.clone())
        .await?;
    push.image(&name("perl"), "5.26", &plain, shell.clone())
        .await?;
    push.image(
        &name("glibc-dns-testing"),
        "2.1.1",
        &[&base, &tools, &shell_layer, &clients],
        shell.clone(),
    )
    .await?;
    let config = json!({"Entrypoint": ["/pause"], "User": "65535:65535", "Env": [PATH]});
    push.image(
        "pause",
        "3.10.2",
        &[&program_layer(&programs.pause(), "pause")?],
        config,
    )
    .await?;
    let user = json!({"Cmd": ["sh"], "Env": [PATH], "User": "1234"});
    push.image(&name("nonroot"), "1.5", &plain, user).await?;
    let nnp = no_new_privileges(&programs.nnp())?;
    let command = json!({"Cmd": ["nnp"], "Env": [PATH]});
    push.image(&name("nonewprivs"), "1.4", &[&base, &nnp], command)
        .await?;
    let nginx = nginx(&programs.nginx(), 80)?;
    for tag in ["1.27.0-2", "1.28.0-2"] {
        let command =
            json!({"Cmd": ["nginx", "-g", "daemon off;"], "Env": [PATH], "StopSignal": "SIGQUIT"});
        push.image(
            &name("nginx"),
            tag,
            &[&base, &tools, &shell_layer, &nginx],
            command,
        )
        .await?;
    }
    Ok(())
}

/// Builds and pushes the images of the suite's other servers. Two of them are agnhost with files that specs read.
async fn push_servers(push: &Push<'_>, programs: &Programs, agnhost: &[&Layer]) -> Result {
    for name in ["kitten", "nautilus"] {
        let files = picture(name)?;
        let layers = [agnhost, &[&files]].concat();
        let config = json!({"Entrypoint": ["/agnhost"], "Cmd": ["test-webserver"], "Env": [PATH]});
        let repository = format!("{E2E}/{name}");
        push.image(&repository, "1.8", &layers, config).await?;
    }
    let sample = format!("{E2E}/sample-apiserver");
    for (program, repository, tag, target) in [
        ("etcd", "etcd", "3.7.0-0", "usr/local/bin/etcd"),
        ("sample-apiserver", &sample, "1.29.2", "sample-apiserver"),
    ] {
        let layer = program_layer(&programs.program(program), target)?;
        let config = json!({"Entrypoint": [format!("/{target}")], "Env": [PATH]});
        push.image(repository, tag, &[&layer], config).await?;
    }
    Ok(())
}

/// Builds and pushes [`PAUSE`].
pub(crate) async fn push_pause(registry: &Registry, busybox_path: &Path) -> Result {
    let base = busybox::layer(busybox_path, Compression::Gzip)?;
    let config = json!({"Entrypoint": ["sleep", "infinity"], "Env": [PATH]});
    let push = Push { registry };
    push.image("pause", "1", &[&base], config).await
}

/// Builds and pushes an image with one static program, its entry point. Returns the image's name.
pub(crate) async fn push_program(registry: &Registry, program: &Path) -> Result<String> {
    let name = program
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let layer = program_layer(program, &name)?;
    let config = json!({"Entrypoint": [format!("/{name}")], "Env": [PATH]});
    let push = Push { registry };
    push.image(&name, "1", &[&layer], config).await?;
    Ok(format!("{}/{name}:1", registry.host))
}

/// Returns agnhost with its certificate, users and upload directory.
fn agnhost(program: &Path) -> Result<Layer> {
    let mut tar = LayerTar::default();
    let bytes = std::fs::read(program).during(program.display())?;
    tar.file("agnhost", 0o755, &bytes)?
        .symlink("agnhost-2", "agnhost")?
        .dir("uploads", 0o755)?
        .file("etc/passwd", 0o644, PASSWD)?
        .file("etc/group", 0o644, GROUP)?;
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (key, certificate) = (at("localhost.key"), at("localhost.crt"));
    let mut args = vec![
        "req",
        "-x509",
        "-subj",
        "/CN=localhost",
        "-days",
        "2",
        "-newkey",
        "rsa:2048",
        "-nodes",
    ];
    args.extend(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]);
    args.extend(["-keyout", &key, "-out", &certificate]);
    crate::namespaces::run("openssl", &args)?;
    tar.file("localhost.crt", 0o644, &std::fs::read(certificate)?)?
        .file("localhost.key", 0o644, &std::fs::read(key)?)?;
    tar.finish(Compression::Gzip)
}

/// Returns the files by which specs recognize the images `kitten` and `nautilus`.
fn picture(name: &str) -> Result<Layer> {
    let data = serde_json::to_vec(&json!({"image": format!("{name}.jpg")}))?;
    let mut tar = LayerTar::default();
    tar.file("data.json", 0o644, &data)?.file(
        "etc/os-release",
        0o644,
        b"NAME=\"Alpine Linux\"\n",
    )?;
    tar.finish(Compression::Gzip)
}

/// Returns a static program at a path.
fn program_layer(program: &Path, target: &str) -> Result<Layer> {
    let mut tar = LayerTar::default();
    tar.file(
        target,
        0o755,
        &std::fs::read(program).during(program.display())?,
    )?;
    tar.finish(Compression::Gzip)
}

/// Returns bash and the program of e2e/cluster/sh.c as `sh`, which runs busybox's shell or bash.
fn suite_shell(program: &Path) -> Result<Layer> {
    let mut tar = LayerTar::default();
    with_libraries(&mut tar, Path::new("/bin/bash"), "bin/bash")?;
    tar.file(
        "bin/sh",
        0o755,
        &std::fs::read(program).during(program.display())?,
    )?;
    tar.finish(Compression::Gzip)
}

/// Returns netcat, which busybox's `nc` does not replace: it has no `-u`.
fn netcat(clients: &Path) -> Result<Layer> {
    let mut tar = LayerTar::default();
    add_unpacked(&mut tar, clients, "bin/nc.openbsd", "bin/nc")?;
    tar.finish(Compression::Gzip)
}

/// Returns dig, curl, getent and netcat.
fn clients(clients: &Path) -> Result<Layer> {
    let mut tar = LayerTar::default();
    add_unpacked(&mut tar, clients, "bin/nc.openbsd", "bin/nc")?;
    add_unpacked(&mut tar, clients, "usr/bin/dig", "usr/bin/dig")?;
    for program in ["usr/bin/curl", "usr/bin/getent"] {
        with_libraries(&mut tar, &Path::new("/").join(program), program)?;
    }
    tar.finish(Compression::Gzip)
}

/// Adds a program of an unpacked package with its libraries, which are unpacked beside it or installed.
fn add_unpacked(tar: &mut LayerTar, root: &Path, program: &str, target: &str) -> Result {
    let path = root.join(program);
    tar.file(target, 0o755, &std::fs::read(&path).during(path.display())?)?;
    let libraries = root.join("usr/lib/x86_64-linux-gnu").display().to_string();
    let script = format!("LD_LIBRARY_PATH={libraries} exec ldd {}", path.display());
    let listing = crate::namespaces::run("sh", &["-c", &script])?;
    for library in busybox::listed_libraries(&listing) {
        let name = Path::new(&library)
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        let target = match library.contains("ld-linux") {
            true => library.trim_start_matches('/').to_owned(),
            false => format!("lib/x86_64-linux-gnu/{name}"),
        };
        tar.file(&target, 0o755, &std::fs::read(&library).during(&library)?)?;
    }
    Ok(())
}

/// Returns the setuid program that prints the user it acts as.
fn no_new_privileges(program: &Path) -> Result<Layer> {
    let mut tar = LayerTar::default();
    tar.file(
        "bin/nnp",
        0o4755,
        &std::fs::read(program).during(program.display())?,
    )?;
    tar.finish(Compression::Gzip)
}

struct Push<'a> {
    registry: &'a Registry,
}

impl Push<'_> {
    async fn image(&self, name: &str, tag: &str, layers: &[&Layer], config: Value) -> Result {
        let layers = layers.iter().map(|&layer| layer.clone()).collect();
        self.registry
            .push(name, tag, &Image::new(layers, config))
            .await?;
        Ok(())
    }
}
