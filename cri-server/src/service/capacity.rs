//! Capacity of a running pod's VM, which limits every resource update.

use super::Server;
use crate::convert::ConvertError;
use crate::convert::size::limits;
use boxlite_config::size::{VmCapacity, VmSize};
use boxlite_proto::cri::v1::LinuxContainerResources;
use boxlite_runtime::LiteBox;

/// Capacity of one pod's VM.
#[derive(Debug, Clone, Copy)]
pub struct PodCapacity(VmCapacity);

/// Returns the capacity that the pod's VM was started with.
pub fn of_pod(server: &Server, pod: &LiteBox) -> PodCapacity {
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
    PodCapacity(VmCapacity::new(
        size,
        &limits(overhead.as_ref()),
        &server.config.pod,
    ))
}

impl PodCapacity {
    /// Rejects limits that the VM cannot hold and that exceed the current ones.
    pub fn admit(
        &self,
        update: &LinuxContainerResources,
        current: Option<&LinuxContainerResources>,
    ) -> Result<(), ConvertError> {
        let current = current.map(|current| limits(Some(current)));
        Ok(self.0.admit(&limits(Some(update)), current.as_ref())?)
    }
}
