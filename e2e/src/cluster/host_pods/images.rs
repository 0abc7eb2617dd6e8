//! Images of a kubeadm-style cluster, pushed to the loopback registry: kube-proxy with iptables, CoreDNS, a pause image for
//! containerd, and busybox.

use crate::cluster::programs::Programs;
use crate::failure::{During, Result};
use crate::image::build::Image;
use crate::image::busybox::{self, with_libraries};
use crate::image::layer::{Compression, Layer, LayerTar};
use crate::image::registry::Registry;
use crate::install::Install;
use crate::node;
use serde_json::json;
use std::path::Path;

pub(super) const BUSYBOX: &str = "127.0.0.1:5000/busybox:1";
pub(super) const PROXY: &str = "127.0.0.1:5000/kube-proxy:1";
pub(super) const DNS: &str = "127.0.0.1:5000/coredns:1";
pub(super) const PAUSE: &str = "127.0.0.1:5000/pause:1";
/// Extensions that iptables loads.
const EXTENSIONS: &str = "/usr/lib/x86_64-linux-gnu/xtables";
/// Names by which kube-proxy calls iptables.
const IPTABLES: [&str; 6] = [
    "iptables",
    "iptables-save",
    "iptables-restore",
    "ip6tables",
    "ip6tables-save",
    "ip6tables-restore",
];

/// Pushes the images.
pub(super) async fn push(registry: &Registry, install: &Install, programs: &Programs) -> Result {
    let base = busybox::layer(&install.busybox, Compression::Plain)?;
    let env = json!(["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]);
    let program = |name: &str| program(&programs.program(name), name);
    for (name, layers, command) in [
        ("busybox", vec![base.clone()], json!(["sh"])),
        ("pause", vec![base.clone()], json!(["sleep", "2147483647"])),
        (
            "kube-proxy",
            vec![base.clone(), program("kube-proxy")?, iptables()?],
            json!(["kube-proxy"]),
        ),
        (
            "coredns",
            vec![base.clone(), program("coredns")?],
            json!(["coredns"]),
        ),
    ] {
        let image = Image::new(layers, json!({"Cmd": command, "Env": env}));
        registry.push(name, "1", &image).await?;
    }
    Ok(())
}

/// Writes containerd's configuration of the registry.
pub(super) fn write_mirrors(dir: &Path) -> Result {
    let host = "127.0.0.1:5000";
    let mirror = (host.to_owned(), format!("http://{host}"), None);
    node::write_mirrors(&dir.join("certs.d"), &[mirror])
}

fn program(path: &Path, name: &str) -> Result<Layer> {
    let mut tar = LayerTar::default();
    let bytes = std::fs::read(path).during(path.display())?;
    tar.file(&format!("usr/bin/{name}"), 0o755, &bytes)?;
    tar.finish(Compression::Plain)
}

/// Returns the machine's iptables, so that the rules are in the same tables as those of its CNI plugins.
fn iptables() -> Result<Layer> {
    let mut tar = LayerTar::default();
    let program = std::fs::canonicalize("/usr/sbin/iptables").during("iptables")?;
    tar.dir("usr/sbin", 0o755)?;
    with_libraries(&mut tar, &program, "usr/sbin/xtables")?;
    for name in IPTABLES {
        tar.symlink(&format!("usr/sbin/{name}"), "xtables")?;
    }
    for entry in std::fs::read_dir(EXTENSIONS).during(EXTENSIONS)? {
        let path = entry?.path();
        if path.is_file() {
            let bytes = std::fs::read(&path)?;
            let target = path.display().to_string();
            tar.file(target.trim_start_matches('/'), 0o644, &bytes)?;
        }
    }
    tar.finish(Compression::Plain)
}
