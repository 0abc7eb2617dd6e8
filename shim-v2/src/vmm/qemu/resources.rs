//! Step 2: CPUs, memory, and the clock the guest is told about.
//!
//! Under TCG the guest's TSC is the host's. Told its frequency, the guest calibrates nothing; untold, it loses 0.4 s at
//! boot and falls back to jiffies under load.

use super::context::Context;
use crate::vmm::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::{Acceleration, InstanceSpec};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Time over which the TSC is measured; 10 ms gave the frequency to 3 ppm.
const TSC_SPAN: Duration = Duration::from_millis(10);

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
    let words = &mut context.kernel_words;
    words.extend(["reboot=t", "no_timer_check", "random.trust_cpu=on"].map(str::to_owned));
    match spec.acceleration {
        Acceleration::Tcg => {
            words.push(format!("tsc_early_khz={}", tsc_khz(&context.cache)?));
            words.push("tsc=reliable".to_owned());
            // QEMU keeps translated code by its virtual address, too: with random addresses each process is translated anew,
            // and what gathers makes a pod of some thousand processes ten times slower.
            words.push("norandmaps".to_owned());
            if spec.vcpus == 1 {
                // With more CPUs than one it would keep them busy: idle 3.0 % against 0.5 %.
                words.push("nolapic_timer".to_owned());
            }
            // ERMS and FSRM make bulk copies three times slower under emulation; SVM is of no use in a pod.
            context.option("-cpu", "max,-svm,-erms,-fsrm");
        }
        Acceleration::Kvm => context.option("-cpu", "host"),
    }
    Ok(())
}

/// The host's TSC frequency, measured once per boot of the host.
fn tsc_khz(cache: &Path) -> BoxliteResult<u64> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").step("reading the boot id")?;
    let file = cache.join("tsc_khz");
    if let Ok(text) = fs::read_to_string(&file)
        && let Some((known, khz)) = text.split_once(' ')
        && known == boot.trim()
        && let Ok(khz) = khz.trim().parse()
    {
        return Ok(khz);
    }
    let khz = measure_tsc();
    super::derived::write_whole(&file, format!("{} {khz}\n", boot.trim()).as_bytes())?;
    Ok(khz)
}

fn measure_tsc() -> u64 {
    let (begin, start) = (read_tsc(), Instant::now());
    std::thread::sleep(TSC_SPAN);
    let (end, span) = (read_tsc(), start.elapsed());
    let ticks = u128::from(end.wrapping_sub(begin));
    u64::try_from(ticks * 1_000_000 / span.as_nanos().max(1)).unwrap_or(u64::MAX)
}

/// JUSTIFICATION for unsafe: the counter has no safe reader.
fn read_tsc() -> u64 {
    // SAFETY: every x86_64 has RDTSC, and Linux leaves it open to processes.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    #[test]
    fn tsc_is_plausible_and_steady() {
        let (one, two) = (super::measure_tsc(), super::measure_tsc());
        assert!((500_000..10_000_000).contains(&one), "{one} kHz");
        let apart = one.abs_diff(two);
        assert!(
            apart * 50 < one,
            "{one} and {two} kHz differ by more than 2 %"
        );
    }
}
