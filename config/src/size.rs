//! VM size of a pod: vCPUs and memory from the pod's limits and the configured defaults.
//!
//! [`VmCapacity`] checks later updates against the VM, which does not grow while it runs.

use crate::budget;
use crate::cgroup::UNLIMITED_BYTES;
use crate::pod::{PodDefaults, VCPUS};
use boxlite_sys::proc_memory;

const MIB: u64 = 1 << 20;
/// Default period of the CPU quota in µs, as in the kernel and the kubelet.
const DEFAULT_PERIOD_US: i64 = 100_000;

/// Limits of a pod or container as the kubelet or containerd states them. Zero and negative values mean no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory limit.
    pub memory_bytes: i64,
    /// CPU time per period in µs.
    pub cpu_quota_us: i64,
    /// Period in µs; 100 ms if unset.
    pub cpu_period_us: i64,
}

impl Limits {
    /// Returns the memory limit rounded up to MiB; `None` without one. An exbibyte or more means unlimited, as in cgroup v1.
    pub fn memory_mib(&self) -> Option<u64> {
        let bytes = u64::try_from(self.memory_bytes).ok()?;
        (bytes > 0 && bytes < UNLIMITED_BYTES).then(|| bytes.div_ceil(MIB))
    }

    /// Returns the CPU limit rounded up to whole CPUs that a VM can have; `None` without one.
    pub fn vcpus(&self) -> Option<u8> {
        if self.cpu_quota_us <= 0 {
            return None;
        }
        let period = self.period_us();
        let count = self.cpu_quota_us / period + i64::from(self.cpu_quota_us % period > 0);
        u8::try_from(count.clamp(*VCPUS.start(), *VCPUS.end())).ok()
    }

    fn millicpus(&self) -> Option<i64> {
        (self.cpu_quota_us > 0).then(|| self.cpu_quota_us.saturating_mul(1000) / self.period_us())
    }

    fn period_us(&self) -> i64 {
        if self.cpu_period_us > 0 {
            self.cpu_period_us
        } else {
            DEFAULT_PERIOD_US
        }
    }
}

/// Size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmSize {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM in MiB, the guest's own need included.
    pub memory_mib: u32,
    /// Limit of all containers together, in bytes. The guest enforces it, so that its limit acts before any on the host.
    pub containers_bytes: u64,
}

/// Everything that decides on a VM's size.
#[derive(Debug, Clone, Default)]
pub struct SizeRequest {
    /// Limits of the pod.
    pub limits: Limits,
    /// vCPUs set by an annotation; takes precedence over the limit.
    pub vcpus: Option<u8>,
    /// Memory for the containers set by an annotation; takes precedence over the limit.
    pub memory_mib: Option<u32>,
    /// Memory of the node; a larger limit means as much as all of it.
    pub node_mib: Option<u64>,
}

/// A size that cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizeError {
    /// The memory limit exceeds any VM's.
    #[error("invalid memory limit: {0} MiB are more than a VM can have")]
    TooLarge(u64),
    /// An update asks for more than the VM has.
    #[error("{0}; a VM does not grow while it runs: the pod must be created again")]
    Beyond(String),
}

/// Returns the VM size for a pod.
pub fn vm_size(request: &SizeRequest, defaults: &PodDefaults) -> Result<VmSize, SizeError> {
    let limit_mib = request.limits.memory_mib();
    let requested_mib = request.memory_mib.map(u64::from).or(limit_mib);
    let pod_mib = requested_mib.unwrap_or(u64::from(defaults.memory_mib));
    let whole = pod_mib.saturating_add(budget::guest_mib(pod_mib, defaults));
    u32::try_from(whole).map_err(|_| SizeError::TooLarge(whole))?;
    let pod_mib = pod_mib.min(request.node_mib.unwrap_or(u64::MAX));
    let vm_mib = pod_mib + budget::guest_mib(pod_mib, defaults);
    let exact_bytes = u64::try_from(request.limits.memory_bytes).ok();
    let containers_bytes = exact_bytes
        .filter(|_| request.memory_mib.is_none() && limit_mib == Some(pod_mib))
        .unwrap_or(pod_mib * MIB);
    let vcpus = request.vcpus.or(request.limits.vcpus());
    Ok(VmSize {
        vcpus: vcpus.or(defaults.vcpus).unwrap_or(1),
        memory_mib: u32::try_from(vm_mib).map_err(|_| SizeError::TooLarge(vm_mib))?,
        containers_bytes,
    })
}

/// Returns the node's memory in MiB; `None` if the kernel does not say.
pub fn node_mib() -> Option<u64> {
    proc_memory::meminfo("MemTotal").map(|bytes| bytes >> 20)
}

/// Capacity of a running VM, against which updates are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmCapacity {
    vm_mib: u64,
    available_mib: u64,
    vcpus: u8,
}

impl VmCapacity {
    /// Returns the capacity of a VM with this RAM and these CPUs.
    pub fn new(memory_mib: u32, vcpus: u8, defaults: &PodDefaults) -> Self {
        let vm_mib = u64::from(memory_mib);
        Self {
            vm_mib,
            available_mib: budget::containers_mib(vm_mib, defaults),
            vcpus,
        }
    }

    /// Rejects limits that do not fit, with the arithmetic. A limit that is no higher than the current one passes: a pod
    /// without limits may have a container whose limit is above its VM's size.
    pub fn admit(&self, update: &Limits, current: Option<&Limits>) -> Result<(), SizeError> {
        let current = current.copied().unwrap_or_default();
        match self
            .memory_beyond(update, &current)
            .or_else(|| self.cpu_beyond(update, &current))
        {
            Some(arithmetic) => Err(SizeError::Beyond(arithmetic)),
            None => Ok(()),
        }
    }

    /// Lowers limits that [`Self::admit`] rejects to the VM's capacity and returns them with the arithmetic of each.
    pub fn cap(&self, update: &Limits, current: Option<&Limits>) -> (Limits, Vec<String>) {
        let current = current.copied().unwrap_or_default();
        let (mut capped, mut reasons) = (*update, Vec::new());
        if let Some(reason) = self.memory_beyond(update, &current) {
            capped.memory_bytes = i64::try_from(self.available_mib * MIB).unwrap_or(i64::MAX);
            reasons.push(reason);
        }
        if let Some(reason) = self.cpu_beyond(update, &current) {
            capped.cpu_quota_us = update.period_us().saturating_mul(self.vcpus.into());
            reasons.push(reason);
        }
        (capped, reasons)
    }

    fn memory_beyond(&self, update: &Limits, current: &Limits) -> Option<String> {
        let Self {
            vm_mib,
            available_mib,
            ..
        } = *self;
        let wanted_mib = update.memory_mib()?;
        if wanted_mib <= available_mib || wanted_mib <= current.memory_mib().unwrap_or(0) {
            return None;
        }
        let overhead_mib = vm_mib.saturating_sub(available_mib);
        Some(format!(
            "memory_limit_in_bytes = {} is {wanted_mib} MiB, and the pod's VM has {available_mib} MiB for containers ({vm_mib} MiB - {overhead_mib} MiB overhead)",
            update.memory_bytes
        ))
    }

    fn cpu_beyond(&self, update: &Limits, current: &Limits) -> Option<String> {
        let (wanted, vcpus) = (update.millicpus()?, self.vcpus);
        if wanted <= i64::from(vcpus) * 1000 || wanted <= current.millicpus().unwrap_or(0) {
            return None;
        }
        Some(format!(
            "cpu_quota = {} in a period of {} is {}.{:03} CPUs, and the pod's VM has {vcpus}",
            update.cpu_quota_us,
            update.period_us(),
            wanted / 1000,
            wanted % 1000
        ))
    }
}

#[cfg(test)]
mod tests;
