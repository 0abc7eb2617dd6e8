//! [`NodeRuntime`]: the container runtimes with drop-in directories: where a drop-in belongs, its text, and the restart that
//! makes it effective.
//!
//! Writes nothing. containerd before 2.0 has no usable drop-ins: an imported file replaces the whole section of the CRI plugin.

use crate::error::{InstallError, Result};
use std::path::{Path, PathBuf};

/// Directory of containerd's drop-ins, which its configuration must import.
const CONTAINERD_DROP_INS: &str = "/etc/containerd/conf.d";
/// containerd's configuration.
pub(crate) const CONTAINERD_CONFIG: &str = "/etc/containerd/config.toml";
/// containerd's key for the CRI plugin's runtimes, from 2.0 on.
const RUNTIMES: &str = r#"plugins."io.containerd.cri.v1.runtime".containerd.runtimes"#;

/// Container runtime of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum NodeRuntime {
    /// containerd 2.x as a service of systemd.
    Containerd,
    /// k3s, as server or agent.
    K3s,
    /// RKE2, as server or agent.
    Rke2,
    /// CRI-O.
    Crio,
}

impl NodeRuntime {
    /// Detects the runtime from the version that the kubelet reports and the directories of the node.
    pub(crate) fn detect(version: &str, root: &Path) -> Result<Self> {
        let unsupported = |reason| InstallError::Runtime {
            found: version.to_owned(),
            reason,
        };
        let (name, number) = version.split_once("://").unwrap_or((version, ""));
        match name {
            "cri-o" => Ok(Self::Crio),
            "containerd" => {
                let number = number.trim_start_matches('v');
                let major = number.split('.').next().and_then(|n| n.parse::<u32>().ok());
                if major.is_none_or(|major| major < 2) {
                    return Err(unsupported(
                        "drop-ins need containerd 2.0 or newer; docs/containerd.md has the lines for older versions",
                    ));
                }
                let has = |dir: &str| below(root, dir).is_dir();
                Ok(if has("/var/lib/rancher/rke2/agent/etc/containerd") {
                    Self::Rke2
                } else if has("/var/lib/rancher/k3s/agent/etc/containerd") {
                    Self::K3s
                } else {
                    Self::Containerd
                })
            }
            _ => Err(unsupported("known are containerd, k3s, RKE2 and CRI-O")),
        }
    }

    /// Path of the drop-in on the node.
    pub(crate) fn drop_in(self) -> PathBuf {
        match self {
            Self::Containerd => Path::new(CONTAINERD_DROP_INS).join("boxlite.toml"),
            Self::K3s => {
                "/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/boxlite.toml".into()
            }
            Self::Rke2 => {
                "/var/lib/rancher/rke2/agent/etc/containerd/config-v3.toml.d/boxlite.toml".into()
            }
            Self::Crio => "/etc/crio/crio.conf.d/50-boxlite.conf".into(),
        }
    }

    /// Configuration that must import the drop-in's directory; `None` for CRI-O, which always reads it.
    pub(crate) fn importer(self, containerd_config: &Path) -> Option<PathBuf> {
        match self {
            Self::Containerd => Some(containerd_config.to_owned()),
            // Written by k3s and RKE2 at each start; older versions import no drop-ins.
            Self::K3s => Some("/var/lib/rancher/k3s/agent/etc/containerd/config.toml".into()),
            Self::Rke2 => Some("/var/lib/rancher/rke2/agent/etc/containerd/config.toml".into()),
            Self::Crio => None,
        }
    }

    /// Text of the drop-in for a handler whose files are below `prefix`.
    pub(crate) fn drop_in_text(self, handler: &str, prefix: &Path) -> String {
        let prefix = prefix.display();
        let shim = format!("{prefix}/bin/containerd-shim-boxlite-v2");
        let header = "# Written by the Helm chart boxlite, which removes it again.\n";
        match self {
            Self::Containerd | Self::K3s | Self::Rke2 => format!(
                "{header}version = 3\n\n[{RUNTIMES}.{handler}]\nruntime_type = \"io.containerd.boxlite.v2\"\n\
                 runtime_path = \"{shim}\"\npod_annotations = [\"io.boxlite.*\"]\n\n[{RUNTIMES}.{handler}.options]\n\
                 ConfigPath = \"{prefix}/etc/shim.toml\"\n"
            ),
            Self::Crio => format!(
                "{header}[crio.runtime.runtimes.{handler}]\nruntime_type = \"vm\"\nruntime_path = \"{shim}\"\n\
                 runtime_config_path = \"{prefix}/etc/shim.toml\"\n"
            ),
        }
    }

    /// Command that makes a changed drop-in effective. Pods keep running.
    pub(crate) fn restart(self, root: &Path) -> Vec<String> {
        // Units are installed by scripts into /etc and by packages into /usr/lib.
        let has_unit = |unit: &str| {
            let dirs = [
                "/etc/systemd/system",
                "/usr/lib/systemd/system",
                "/usr/local/lib/systemd/system",
            ];
            dirs.iter().any(|dir| below(root, dir).join(unit).exists())
        };
        let unit = match self {
            Self::Containerd => "containerd",
            Self::Crio => "crio",
            Self::K3s if has_unit("k3s-agent.service") => "k3s-agent",
            Self::K3s => "k3s",
            Self::Rke2 if has_unit("rke2-agent.service") => "rke2-agent",
            Self::Rke2 => "rke2-server",
        };
        ["systemctl", "restart", unit].map(str::to_owned).to_vec()
    }
}

/// Returns the path of a file of the node below another root.
pub(crate) fn below(root: &Path, path: impl AsRef<Path>) -> PathBuf {
    let path = path.as_ref();
    root.join(path.strip_prefix("/").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detect_by_version_and_directories() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path();
        let detect = |version| NodeRuntime::detect(version, root);
        assert_eq!(
            detect("containerd://2.1.9").ok(),
            Some(NodeRuntime::Containerd)
        );
        assert_eq!(
            detect("containerd://v2.3.7").ok(),
            Some(NodeRuntime::Containerd)
        );
        assert_eq!(detect("cri-o://1.33.0").ok(), Some(NodeRuntime::Crio));
        let k3s = root.join("var/lib/rancher/k3s/agent/etc/containerd");
        std::fs::create_dir_all(k3s).expect("a directory");
        assert_eq!(
            detect("containerd://2.0.4-k3s2").ok(),
            Some(NodeRuntime::K3s)
        );
        for old in [
            "containerd://1.7.35",
            "containerd://",
            "boxlite-cri://0.1.0",
        ] {
            let error = detect(old).expect_err(old).to_string();
            assert!(error.contains(old), "{error}");
        }
    }

    #[test]
    fn restart_of_k3s_names_the_installed_unit() {
        let dir = tempfile::tempdir().expect("a directory");
        let command = || NodeRuntime::K3s.restart(dir.path()).join(" ");
        assert_eq!(command(), "systemctl restart k3s");
        let units = dir.path().join("etc/systemd/system");
        std::fs::create_dir_all(&units).expect("a directory");
        std::fs::write(units.join("k3s-agent.service"), "").expect("a unit");
        assert_eq!(command(), "systemctl restart k3s-agent");
    }

    #[test]
    fn drop_in_text_is_toml_with_the_handler() {
        let prefix = Path::new("/opt/boxlite");
        let text = NodeRuntime::Containerd.drop_in_text("boxlite", prefix);
        let table: toml::Table = text.parse().expect("TOML");
        assert_eq!(table["version"].as_integer(), Some(3));
        let plugin = &table["plugins"]["io.containerd.cri.v1.runtime"];
        let handler = &plugin["containerd"]["runtimes"]["boxlite"];
        assert_eq!(
            handler["runtime_path"].as_str(),
            Some("/opt/boxlite/bin/containerd-shim-boxlite-v2")
        );
        let text = NodeRuntime::Crio.drop_in_text("boxlite", prefix);
        let table: toml::Table = text.parse().expect("TOML");
        let handler = &table["crio"]["runtime"]["runtimes"]["boxlite"];
        assert_eq!(handler["runtime_type"].as_str(), Some("vm"));
        // CRI-O does not start with an annotation that it does not know.
        assert!(handler.get("allowed_annotations").is_none());
    }
}
