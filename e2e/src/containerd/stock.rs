//! Configuration of a containerd 2.x without the shim, for runtimes that are compared or that the shim is added to.
//!
//! Tables of the runtimes are the caller's.

use std::path::Path;

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
