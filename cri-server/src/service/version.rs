//! Version.

use boxlite_proto::cri::v1::VersionResponse;

/// What a kubelet calls this runtime.
const NAME: &str = "boxlite-cri";
/// The CRI's version.
const API: &str = "v1";
/// The kubelet's own API version, as every runtime answers it.
const KUBELET_API: &str = "0.1.0";

/// The call.
pub fn version() -> VersionResponse {
    VersionResponse {
        version: KUBELET_API.into(),
        runtime_name: NAME.into(),
        runtime_version: env!("CARGO_PKG_VERSION").into(),
        runtime_api_version: API.into(),
    }
}
