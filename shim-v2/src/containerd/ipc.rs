//! The node's IPC in a pod of a containerd that asked for it: containerd gives its containers the pod's namespace by the VM's
//! pid, which says nothing. boxlite-cri asks with a mount; here that mount is added. What is shown there is
//! [`crate::container::host_ipc`]'s.

use crate::container::host_ipc::HOST;
use oci_spec::runtime::{Mount, Spec};
use std::path::Path;

/// Adds the mount, unless the spec has one there.
pub fn show(spec: &mut Spec) {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    if mounts
        .iter()
        .any(|mount| mount.destination() == Path::new(HOST))
    {
        return;
    }
    let mut mount = Mount::default();
    let options = ["rbind", "rprivate", "ro"].map(str::to_owned);
    mount
        .set_destination(HOST.into())
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(HOST.into()))
        .set_options(Some(options.to_vec()));
    mounts.push(mount);
    spec.set_mounts(Some(mounts));
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn one_mount_however_often() {
        let spec = json!({"ociVersion": "1.0.2", "mounts": []});
        let mut spec: Spec = serde_json::from_value(spec).expect("a spec");
        show(&mut spec);
        show(&mut spec);
        assert_eq!(spec.mounts().as_ref().map(Vec::len), Some(1));
    }
}
