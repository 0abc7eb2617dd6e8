//! Step 2: CPUs, memory and the guest's clock.
//!
//! Under TCG the guest's TSC is the host's. Given its frequency, the guest skips calibration; otherwise it loses 0.4 s at
//! boot and falls back to jiffies under load.

use super::context::Context;
use crate::vmm::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::{Acceleration, InstanceSpec};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Duration of a TSC measurement; 10 ms yields the frequency to 3 ppm.
const TSC_MEASUREMENT: Duration = Duration::from_millis(10);

pub(super) fn configure(context: &mut Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    context.option("-smp", spec.vcpus.to_string());
    context.option("-m", spec.memory_mib.to_string());
    // Shared, because virtiofsd and vhost-device-vsock read and write the guest's buffers.
    context.option(
        "-object",
        format!(
            "memory-backend-memfd,id=mem,size={}M,share=on",
            spec.memory_mib
        ),
    );
    // The guest reports free pages within seconds, and QEMU punches them out of the memfd. libkrun's balloon does the same.
    context.option("-device", "virtio-balloon-device,free-page-reporting=on");
    let words = &mut context.kernel_words;
    words.extend(["reboot=t", "no_timer_check", "random.trust_cpu=on"].map(str::to_owned));
    match spec.acceleration {
        Acceleration::Tcg => {
            words.push(format!("tsc_early_khz={}", tsc_khz(&context.cache)?));
            words.push("tsc=reliable".to_owned());
            // QEMU also keeps translated code by virtual address. With address randomization each process is translated again, and
            // the accumulated code slows a pod with thousands of processes by a factor of ten.
            words.push("norandmaps".to_owned());
            if spec.vcpus == 1 {
                // With several CPUs this would keep them busy: 3.0 % against 0.5 % when idle.
                words.push("nolapic_timer".to_owned());
            }
            // ERMS and FSRM make bulk copies three times slower under emulation; a pod does not need SVM.
            context.option("-cpu", "max,-svm,-erms,-fsrm");
        }
        Acceleration::Kvm => context.option("-cpu", "host"),
    }
    Ok(())
}

/// Returns the host's TSC frequency, measured once per boot of the host.
fn tsc_khz(cache: &Path) -> BoxliteResult<u64> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").step("read the boot id")?;
    let file = cache.join("tsc_khz");
    if let Ok(text) = fs::read_to_string(&file)
        && let Some((known, khz)) = text.split_once(' ')
        && known == boot.trim()
        && let Ok(khz) = khz.trim().parse()
    {
        return Ok(khz);
    }
    let khz = measure_tsc();
    super::derived::write_atomically(&file, format!("{} {khz}\n", boot.trim()).as_bytes())?;
    Ok(khz)
}

fn measure_tsc() -> u64 {
    let (begin, start) = (read_tsc(), Instant::now());
    std::thread::sleep(TSC_MEASUREMENT);
    let (end, span) = (read_tsc(), start.elapsed());
    let ticks = u128::from(end.wrapping_sub(begin));
    u64::try_from(ticks * 1_000_000 / span.as_nanos().max(1)).unwrap_or(u64::MAX)
}

/// JUSTIFICATION for unsafe: the counter has no safe accessor.
fn read_tsc() -> u64 {
    // SAFETY: every x86_64 has RDTSC, and Linux permits it in user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    #[test]
    fn measure_tsc_is_plausible_and_repeatable() {
        let (one, two) = (super::measure_tsc(), super::measure_tsc());
        assert!((500_000..10_000_000).contains(&one), "{one} kHz");
        let apart = one.abs_diff(two);
        assert!(
            apart * 50 < one,
            "{one} and {two} kHz differ by more than 2 %"
        );
    }
}
