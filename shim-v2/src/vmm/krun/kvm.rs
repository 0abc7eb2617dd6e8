//! Checks that the device of KVM is one, before the VM is entered: libkrun's own error does not name the device.
//!
//! Whether KVM can run guest code is the probe's question.

use crate::vmm::step::StepExt;
use boxlite_proto::error::{BoxliteError, BoxliteResult};
use kvm_ioctls::Kvm;
use std::ffi::CString;
use std::path::Path;

/// Device of KVM.
pub(super) const DEVICE: &str = "/dev/kvm";
/// Version of KVM's API, which has not changed since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// Opens the device and asks for the version of its API.
pub(super) fn check(device: &Path) -> BoxliteResult<()> {
    let path = CString::new(device.as_os_str().as_encoded_bytes());
    let path = path.step(format!("open {}", device.display()))?;
    let kvm = Kvm::new_with_path(path).step(format!("open {}", device.display()))?;
    match kvm.get_api_version() {
        API_VERSION => Ok(()),
        version => Err(BoxliteError::Step {
            step: format!("use KVM by {}", device.display()),
            source: format!("not a KVM device: version {version} of the API").into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_names_a_device_that_is_not_kvm() {
        for device in ["/dev/null", "/dev/boxlite-no-such-device"] {
            let error = check(Path::new(device)).unwrap_err().to_string();
            assert!(error.contains(device), "{error}");
        }
    }
}
