//! `/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf` of a pod whose `sandboxer` is this shim: containerd then neither
//! creates them nor mounts them into containers. With a pause container, and with boxlite-cri, they come in the spec.

use crate::error::{Result, ShimError};
use crate::shim_state::write_atomically;
use boxlite_config::dns;
use boxlite_proto::shim::shim::PodConfig;
use oci_spec::runtime::{Mount, Spec};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

/// Directory of the files in the sandbox's bundle.
const DIR: &str = "etc";
/// Hosts file of the node.
const NODE_HOSTS: &str = "/etc/hosts";
/// Names of the files in the bundle and below `/etc` of a container.
const NAMES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// Writes the files of a pod into its sandbox's bundle. The agent has the resolv.conf of a pod with passt, unless the pod names
/// servers.
///
/// # Errors
/// Io if the bundle cannot be written.
pub fn write(bundle: &Path, pod: &PodConfig, hostname: &str, passt: bool) -> Result<()> {
    let dir = bundle.join(DIR);
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .map_err(ShimError::io("create", dir.display()))?;
    let config = &pod.dns_config;
    let resolv = match dns::resolv_conf(&config.servers, &config.searches, &config.options) {
        Some(text) => Some(text.into_bytes()),
        None if passt => None,
        None => Some(dns::node_resolv_conf().map_err(ShimError::io("read", "/etc/resolv.conf"))?),
    };
    let hosts = dns::node_file(Path::new(NODE_HOSTS)).map_err(ShimError::io("read", NODE_HOSTS))?;
    let hostname = format!("{hostname}\n").into_bytes();
    let contents = [Some(hostname), Some(hosts), resolv];
    for (name, content) in NAMES.iter().zip(contents) {
        let Some(content) = content else {
            continue;
        };
        let path = dir.join(name);
        write_atomically(&path, &content)
            .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)))
            .map_err(ShimError::io("write", path.display()))?;
    }
    Ok(())
}

/// Mounts the files of the sandbox's bundle into a container, except those that its spec mounts itself.
pub fn mount(bundle: &Path, spec: &mut Spec) {
    let dir = bundle.join(DIR);
    if !dir.is_dir() {
        return;
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for name in NAMES {
        let destination = Path::new("/etc").join(name);
        let own = |mount: &Mount| mount.destination() == &destination;
        if mounts.iter().any(own) || !dir.join(name).exists() {
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
    fn mount_adds_the_files_that_the_spec_lacks() {
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
        write(dir.path(), &pod, "web", true).expect("written");
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

    #[test]
    fn pod_with_passt_has_no_resolv_conf_of_the_node() {
        let dir = tempfile::tempdir().expect("tempdir");
        write(dir.path(), &PodConfig::new(), "web", true).expect("written");
        let mut spec = Spec::default();
        spec.set_mounts(None);
        mount(dir.path(), &mut spec);
        let mounts = spec.mounts().clone().expect("some");
        let seen: Vec<_> = mounts.iter().map(Mount::destination).collect();
        assert_eq!(seen, [Path::new("/etc/hostname"), Path::new("/etc/hosts")]);
    }
}
