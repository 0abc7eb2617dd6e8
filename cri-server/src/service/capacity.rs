//! Capacity of a running pod's VM, which limits every resource update.

use super::Server;
use crate::convert::ConvertError;
use crate::convert::size::limits;
use boxlite_config::size::VmCapacity;
use boxlite_proto::cri::v1::LinuxContainerResources;
use boxlite_runtime::LiteBox;

/// Capacity of one pod's VM.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PodCapacity(VmCapacity);

/// Returns the capacity that the pod's VM was started with.
pub(crate) fn of_pod(server: &Server, pod: &LiteBox) -> PodCapacity {
    let options = pod.snapshot().options;
    PodCapacity(VmCapacity::new(
        options.memory_mib,
        options.vcpus,
        &server.config.pod,
    ))
}

impl PodCapacity {
    /// Rejects limits that the VM cannot hold and that exceed the current ones.
    pub(crate) fn admit(
        &self,
        update: &LinuxContainerResources,
        current: Option<&LinuxContainerResources>,
    ) -> Result<(), ConvertError> {
        let current = current.map(|current| limits(Some(current)));
        Ok(self.0.admit(&limits(Some(update)), current.as_ref())?)
    }
}
