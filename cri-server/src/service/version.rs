//! Version of the runtime and of the CRI.

use boxlite_proto::cri::v1::VersionResponse;

/// Name that the kubelet reports for this runtime.
const NAME: &str = "boxlite-cri";
/// Version of the CRI.
const API: &str = "v1";
/// Version of the kubelet's API, the same for every runtime.
const KUBELET_API: &str = "0.1.0";

/// Handles Version.
pub(crate) fn version() -> VersionResponse {
    VersionResponse {
        version: KUBELET_API.into(),
        runtime_name: NAME.into(),
        runtime_version: env!("CARGO_PKG_VERSION").into(),
        runtime_api_version: API.into(),
    }
}
