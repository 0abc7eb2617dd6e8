//! Capacity of a running pod's VM, which limits every resource update.

use super::Server;
use crate::convert::size::{Room, VmSize};
use boxlite_runtime::LiteBox;

/// Returns the capacity that the pod's VM was started with.
pub fn of_pod(server: &Server, pod: &LiteBox) -> Room {
    let metadata = server.pod_metadata(pod);
    let overhead = metadata
        .config
        .and_then(|config| config.linux)
        .and_then(|linux| linux.overhead);
    let options = pod.snapshot().options;
    let size = VmSize {
        vcpus: options.vcpus,
        memory_mib: options.memory_mib,
    };
    Room::of(size, overhead.as_ref(), &server.config.pod)
}
