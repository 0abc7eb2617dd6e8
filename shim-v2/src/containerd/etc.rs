//! `/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf` of a pod whose `sandboxer` is this shim: containerd makes none then,
//! and mounts none into its containers. With a pause container, and with boxlite-cri, they come in the spec.

use crate::error::{Result, ShimError};
use crate::shim_state::write_atomically;
use boxlite_proto::shim::shim::PodConfig;
use oci_spec::runtime::{Mount, Spec};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

/// Directory of the files in the sandbox's bundle.
const DIR: &str = "etc";
/// Their names there and below `/etc` of a container.
const NAMES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// Writes the files of a pod into its sandbox's bundle.
///
/// # Errors
/// Io where the bundle cannot be written.
pub fn write(bundle: &Path, pod: &PodConfig, hostname: &str) -> Result<()> {
    let dir = bundle.join(DIR);
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .map_err(ShimError::io("create", dir.display()))?;
    let host = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let contents = [
        format!("{hostname}\n"),
        host("/etc/hosts"),
        resolv(pod).unwrap_or_else(|| host("/etc/resolv.conf")),
    ];
    for (name, content) in NAMES.iter().zip(contents) {
        let path = dir.join(name);
        write_atomically(&path, content.as_bytes())
            .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)))
            .map_err(ShimError::io("write", path.display()))?;
    }
    Ok(())
}

/// None: the pod says nothing, and gets the node's.
fn resolv(pod: &PodConfig) -> Option<String> {
    let dns = &pod.dns_config;
    if dns.servers.is_empty() && dns.searches.is_empty() && dns.options.is_empty() {
        return None;
    }
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    Some(text)
}

/// Adds mounts of the files in the sandbox's bundle, where there are some and the spec has none of its own.
pub fn mount(bundle: &Path, spec: &mut Spec) {
    let dir = bundle.join(DIR);
    if !dir.is_dir() {
        return;
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for name in NAMES {
        let destination = Path::new("/etc").join(name);
        if mounts
            .iter()
            .any(|mount| mount.destination() == &destination)
        {
            continue;
        }
        let mut mount = Mount::default();
        mount
            .set_destination(destination)
            .set_typ(Some("bind".to_owned()))
            .set_source(Some(dir.join(name)))
            .set_options(Some(vec!["rbind".to_owned(), "rw".to_owned()]));
        mounts.push(mount);
    }
    spec.set_mounts(Some(mounts));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_gets_what_its_spec_lacks() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2", "mounts": [{"destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts"}],
        }))
        .expect("a spec");
        mount(dir.path(), &mut spec);
        assert_eq!(
            spec.mounts().as_ref().map(Vec::len),
            Some(1),
            "no files, no mounts"
        );

        let mut pod = PodConfig::new();
        pod.dns_config.mut_or_insert_default().servers = vec!["10.0.0.10".to_owned()];
        pod.dns_config.mut_or_insert_default().searches =
            vec!["svc.local".to_owned(), "local".to_owned()];
        write(dir.path(), &pod, "web").expect("written");
        let resolv = std::fs::read_to_string(dir.path().join("etc/resolv.conf")).expect("there");
        assert_eq!(resolv, "search svc.local local\nnameserver 10.0.0.10\n");
        mount(dir.path(), &mut spec);
        let mounts = spec.mounts().clone().expect("some");
        let seen: Vec<_> = mounts
            .iter()
            .map(|mount| mount.destination().display().to_string())
            .collect();
        assert_eq!(seen, ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"]);
        assert_eq!(
            mounts[0].source().as_deref(),
            Some(Path::new("/kubelet/hosts"))
        );
    }
}
