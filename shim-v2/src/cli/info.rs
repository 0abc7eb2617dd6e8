//! The answer to `-info`: RuntimeInfo with the OCI features of this runtime, as containerd decodes it.
//!
//! containerd's CRI plugin reports recursive read-only mounts (`rro`) and user namespaces (namespace `user` and ID-mapped
//! mounts) to the kubelet from these features, since 2.3.4. Only describes: nothing here enables a feature.

use super::{CliError, RUNTIME_NAME};
use crate::containerd::annotations::PREFIX;
use boxlite_proto::names::MOUNT_FLAGS;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use serde_json::{Value, json};

/// Type of the features, under which containerd registers them; JSON, as all OCI types in containerd's messages.
const FEATURES_TYPE_URL: &str =
    "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
/// Versions of the OCI runtime specification.
const OCI_VERSIONS: [&str; 2] = ["1.0.0", "1.3.0"];
/// Options of bind mounts that the shim evaluates, beside [`MOUNT_FLAGS`].
const BIND_OPTIONS: [&str; 11] = [
    "bind", "private", "rbind", "ro", "rprivate", "rro", "rshared", "rslave", "rw", "shared",
    "slave",
];

/// Returns the encoded message.
///
/// # Errors
/// The message cannot be encoded.
pub(super) fn encoded() -> Result<Vec<u8>, CliError> {
    let info = RuntimeInfo {
        name: RUNTIME_NAME.to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
        .into(),
        features: Some(Any {
            type_url: FEATURES_TYPE_URL.to_owned(),
            value: features().to_string().into_bytes(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    info.write_to_bytes().map_err(CliError::Encode)
}

fn features() -> Value {
    let mut mount_options: Vec<&str> = BIND_OPTIONS.into_iter().chain(MOUNT_FLAGS).collect();
    mount_options.sort_unstable();
    json!({
        "ociVersionMin": OCI_VERSIONS[0],
        "ociVersionMax": OCI_VERSIONS[1],
        // Hooks would run on the node and find no process of the container there.
        "hooks": [],
        "mountOptions": mount_options,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {"enabled": true},
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}},
        },
        // They change the VM, if the node's configuration allows them.
        "potentiallyUnsafeConfigAnnotations": [PREFIX],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::Features;

    #[test]
    fn encoded_has_features_that_containerd_reads() {
        let bytes = encoded().expect("encoded");
        let info = RuntimeInfo::parse_from_bytes(&bytes).expect("decoded");
        assert_eq!(info.name, RUNTIME_NAME);
        assert_eq!(info.features.type_url, FEATURES_TYPE_URL);
        let json: Value = serde_json::from_slice(&info.features.value).expect("json");
        let list = |value: &Value| -> Vec<String> {
            serde_json::from_value(value.clone()).expect("list of strings")
        };
        assert!(list(&json["mountOptions"]).contains(&"rro".to_owned()));
        assert!(list(&json["linux"]["namespaces"]).contains(&"user".to_owned()));
        assert_eq!(json["linux"]["mountExtensions"]["idmap"]["enabled"], true);
        let annotations = list(&json["potentiallyUnsafeConfigAnnotations"]);
        assert_eq!(annotations, ["io.boxlite."]);
        let features: Features = serde_json::from_slice(&info.features.value).expect("features");
        assert_eq!(features.hooks().as_deref(), Some(&[][..]));
    }
}
