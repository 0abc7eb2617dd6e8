//! `devices` of the request: nodes of the guest's /dev under the names asked for.
//!
//! A VM has none of the host's devices. What a pod asks for by a name that every Linux has (/dev/fuse, /dev/net/tun) exists in
//! the guest as well, and that is what the container gets; what the guest has not is refused there, by name. The choice travels
//! as an annotation, since an OCI device is numbers, and the numbers are the guest's.

use super::ConvertError;
use boxlite_proto::cri::v1::Device;
use serde_json::json;
use std::path::{Component, Path};

/// The annotation's value; `None` where nothing is asked for.
pub fn devices(wanted: &[Device]) -> Result<Option<String>, ConvertError> {
    if wanted.is_empty() {
        return Ok(None);
    }
    let mut list = Vec::new();
    for device in wanted {
        let container_path = if device.container_path.is_empty() {
            &device.host_path
        } else {
            &device.container_path
        };
        below_dev("config.devices.host_path", &device.host_path)?;
        below_dev("config.devices.container_path", container_path)?;
        let permissions = match device.permissions.as_str() {
            "" => "rwm",
            text if text.chars().all(|c| "rwm".contains(c)) => text,
            text => {
                return Err(ConvertError::invalid(
                    "config.devices.permissions",
                    text,
                    "must be made of r, w and m",
                ));
            }
        };
        list.push(json!({
            "source": device.host_path,
            "path": container_path,
            "permissions": permissions,
        }));
    }
    Ok(Some(json!(list).to_string()))
}

/// A plain path below /dev.
fn below_dev(field: &'static str, path: &str) -> Result<(), ConvertError> {
    let inside = Path::new(path).strip_prefix("/dev").is_ok_and(|rest| {
        rest.components().next().is_some()
            && rest
                .components()
                .all(|part| matches!(part, Component::Normal(_)))
    });
    if inside && !path.contains('\0') {
        return Ok(());
    }
    Err(ConvertError::invalid(
        field,
        path,
        "must be a path below /dev: the VM has no other devices",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(host: &str, container: &str, permissions: &str) -> Device {
        Device {
            container_path: container.into(),
            host_path: host.into(),
            permissions: permissions.into(),
        }
    }

    #[test]
    fn paths_below_dev_with_permissions() {
        assert_eq!(devices(&[]), Ok(None));
        let text = devices(&[
            device("/dev/fuse", "", "rw"),
            device("/dev/net/tun", "/dev/tun", ""),
        ])
        .unwrap()
        .unwrap();
        let list: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            list,
            json!([
                {"source": "/dev/fuse", "path": "/dev/fuse", "permissions": "rw"},
                {"source": "/dev/net/tun", "path": "/dev/tun", "permissions": "rwm"},
            ])
        );
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            device("/etc/passwd", "", ""),
            device("/dev/../etc", "", ""),
            device("/dev", "", ""),
            device("", "", ""),
            device("/dev/fuse", "/x", ""),
            device("/dev/fuse", "", "rwx"),
        ] {
            assert!(devices(std::slice::from_ref(&bad)).is_err(), "{bad:?}");
        }
    }
}
