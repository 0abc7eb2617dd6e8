//! RuntimeConfig and UpdateRuntimeConfig.

use super::Server;
use crate::convert::ConvertError;
use boxlite_proto::cri::v1::{
    CgroupDriver, LinuxRuntimeConfiguration, RuntimeConfigResponse, UpdateRuntimeConfigRequest,
    UpdateRuntimeConfigResponse,
};
use std::net::IpAddr;
use tonic::Status;

/// Returns the cgroup driver: cgroupfs, that is paths instead of systemd slices.
pub(crate) fn get() -> RuntimeConfigResponse {
    RuntimeConfigResponse {
        linux: Some(LinuxRuntimeConfiguration {
            cgroup_driver: CgroupDriver::Cgroupfs as i32,
        }),
    }
}

/// Stores the node's pod CIDRs, for plugins with the `ipRanges` capability. An empty value changes nothing.
pub(crate) fn update(
    server: &Server,
    request: UpdateRuntimeConfigRequest,
) -> Result<UpdateRuntimeConfigResponse, Status> {
    let network = request
        .runtime_config
        .and_then(|config| config.network_config);
    let Some(network) = network else {
        return Err(ConvertError::Missing("runtime_config.network_config").into());
    };
    let cidrs: Vec<String> = network
        .pod_cidr
        .split(',')
        .map(str::trim)
        .filter(|cidr| !cidr.is_empty())
        .map(str::to_owned)
        .collect();
    for cidr in &cidrs {
        if !is_cidr(cidr) {
            return Err(ConvertError::invalid("pod_cidr", cidr, "not a CIDR").into());
        }
    }
    if !cidrs.is_empty() {
        *server.pod_cidrs.lock() = cidrs;
    }
    Ok(UpdateRuntimeConfigResponse {})
}

fn is_cidr(text: &str) -> bool {
    let Some((address, prefix)) = text.split_once('/') else {
        return false;
    };
    match (address.parse::<IpAddr>(), prefix.parse::<u8>()) {
        (Ok(IpAddr::V4(_)), Ok(bits)) => bits <= 32,
        (Ok(IpAddr::V6(_)), Ok(bits)) => bits <= 128,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::is_cidr;

    #[test]
    fn is_cidr_checks_address_and_prefix() {
        assert!(is_cidr("10.1.0.0/16") && is_cidr("fd00::/64"));
        assert!(
            !is_cidr("10.1.0.0")
                && !is_cidr("10.1.0.0/33")
                && !is_cidr("x/8")
                && !is_cidr("10.0.0.0/-1")
        );
    }
}
