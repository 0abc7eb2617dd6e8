//! Capacity of a running pod's VM, which limits every resource update.
//!
//! No answer of the CRI makes a kubelet give a resize up: it decides on Infeasible and Deferred before its first call
//! (pkg/kubelet/allocation/handlers.go of 1.37), and repeats the calls after an error without end. Hence a kubelet's
//! limits beyond the VM are applied as far as the VM goes, and the status reports the applied ones. Plugins get an error.

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

    /// Lowers limits that [`Self::admit`] rejects to the capacity of the VM. `subject` is for the log.
    pub(crate) fn cap(
        &self,
        subject: &str,
        mut update: LinuxContainerResources,
        current: Option<&LinuxContainerResources>,
    ) -> LinuxContainerResources {
        let current = current.map(|current| limits(Some(current)));
        let (capped, reasons) = self.0.cap(&limits(Some(&update)), current.as_ref());
        for reason in reasons {
            tracing::warn!(
                id = subject,
                reason,
                "resize exceeds the VM; applied the VM's capacity"
            );
        }
        let lowered = update
            .memory_limit_in_bytes
            .saturating_sub(capped.memory_bytes);
        if update.memory_swap_limit_in_bytes > 0 {
            // Limit of memory and swap together.
            update.memory_swap_limit_in_bytes -= lowered.min(update.memory_swap_limit_in_bytes);
        }
        update.memory_limit_in_bytes = capped.memory_bytes;
        update.cpu_quota = capped.cpu_quota_us;
        update
    }
}
