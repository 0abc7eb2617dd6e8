//! Configuration of a containerd 2.x without the shim, for runtimes that are compared or that the shim is added to.
//!
//! Tables of the runtimes are the caller's.

use crate::ensure;
use crate::failure::Result;
use crate::install;
use crate::node::Node;
use crate::service::Service;
use k8s_cri::v1::VersionRequest;
use std::path::Path;
use tokio::process::Command;

/// Returns the configuration of a containerd with all files below `dir`: images from `dir/certs.d`, networks from `dir/cni`, the
/// pause image, no NRI. `top` are further keys of the top level, `runtimes` further tables.
pub(crate) fn configuration(
    dir: &Path,
    cni: &Path,
    pause: &str,
    top: &str,
    runtimes: &str,
) -> String {
    let (at, cni) = (dir.display(), cni.display());
    format!(
        r#"version = 3
root = "{at}/root"
state = "{at}/state"
{top}
[grpc]
address = "{at}/c.sock"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{pause}"
[plugins."io.containerd.cri.v1.images".registry]
config_path = "{at}/certs.d"
[plugins."io.containerd.nri.v1.nri"]
disable = true
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{cni}"]
conf_dir = "{at}/cni"
{runtimes}
"#
    )
}

/// Returns the configuration of a containerd whose only runtime is runc.
pub(crate) fn with_runc(dir: &Path, cni: &Path, pause: &str) -> String {
    let top = format!("[ttrpc]\naddress = \"{}/t.sock\"", dir.display());
    let runc = r#"[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2""#;
    configuration(dir, cni, pause, "", &format!("{top}\n{runc}"))
}

/// Starts the containerd of this configuration file and waits until its CRI plugin answers. It finds programs in its own directory,
/// in `others`, and in this program's PATH. Returns its node.
pub(crate) async fn serve(containerd: &Service, config: &Path, others: &[&Path]) -> Result<Node> {
    let bin = install::cache().join("containerd-2/usr/bin");
    ensure!(
        bin.join("containerd").exists(),
        "{} not found: run e2e/scripts/containerd 2",
        bin.display()
    );
    let path = std::env::var_os("PATH").unwrap_or_default();
    let own = std::iter::once(bin.as_path()).chain(others.iter().copied());
    let path = own.map(Path::to_owned).chain(std::env::split_paths(&path));
    let path = std::env::join_paths(path)?;
    let mut command = Command::new(bin.join("containerd"));
    command.arg("--config").arg(config).env("PATH", path);
    let node = Node::foreign(config.parent().unwrap_or(config))?;
    containerd
        .start(command, || async {
            let mut runtime = node.cri.runtime();
            runtime.version(VersionRequest::default()).await?;
            Ok(())
        })
        .await?;
    Ok(node)
}
