//! The pod's resolv.conf with name servers from DHCP. The host mounts its own into containers whose pod names servers.
//!
//! Flow: `network` → [`write`]; `container::create` → [`mount`].

use oci_spec::runtime::{Mount, Spec};
use std::fmt::Write;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

/// The file in the VM. Containers of the pod share it.
const PATH: &str = "/run/boxlite/resolv.conf";
/// The file in a container.
const TARGET: &str = "/etc/resolv.conf";

/// Writes the file, unless there are no servers.
pub(crate) fn write(servers: &[Ipv4Addr]) -> io::Result<()> {
    if servers.is_empty() {
        return Ok(());
    }
    std::fs::write(PATH, text(servers))
}

fn text(servers: &[Ipv4Addr]) -> String {
    let mut text = String::new();
    for server in servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    text
}

/// Adds the file to a container, if the pod has one and the container has no other.
pub(crate) fn mount(spec: &mut Spec, read_only: bool) {
    mount_file(spec, Path::new(PATH), read_only);
}

fn mount_file(spec: &mut Spec, file: &Path, read_only: bool) {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let taken = mounts
        .iter()
        .any(|mount| mount.destination() == Path::new(TARGET));
    if taken || !file.exists() {
        return;
    }
    let access = if read_only { "ro" } else { "rw" };
    let mut mount = Mount::default();
    mount
        .set_destination(TARGET.into())
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(file.to_owned()))
        .set_options(Some(
            ["rbind", "rprivate", access].map(str::to_owned).to_vec(),
        ));
    mounts.push(mount);
    spec.set_mounts(Some(mounts));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_file_yields_to_the_mount_of_the_spec() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let parse = |text: &str| serde_json::from_str::<Spec>(text).expect("a spec");
        let mut spec = parse(r#"{"ociVersion": "1.0.2", "mounts": []}"#);
        mount_file(&mut spec, Path::new("/no/such/file"), false);
        assert_eq!(spec.mounts().as_ref().map(Vec::len), Some(0));
        mount_file(&mut spec, file.path(), true);
        mount_file(&mut spec, file.path(), true);
        let mounts = spec.mounts().clone().expect("mounts");
        assert_eq!(mounts.len(), 1);
        assert_eq!(mounts[0].source().as_deref(), Some(file.path()));
        assert_eq!(
            text(&[Ipv4Addr::new(10, 0, 0, 53)]),
            "nameserver 10.0.0.53\n"
        );
    }
}
