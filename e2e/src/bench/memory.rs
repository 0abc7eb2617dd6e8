//! Memory of idle pods: proportional set sizes of their processes, by kind of mapping for QEMU, and the host's MemAvailable;
//! and the CPU time of QEMU, the cost of a setting that saves memory.

use super::peers::available;
use crate::failure::{Failure, Result};
use crate::node::Node;
use crate::pod::{Container, Pod};
use crate::process::{cpu_time, family, pss};
use crate::{ensure, poll};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Interval of measurements; guests report free memory every two seconds.
const REPORT_INTERVAL: Duration = Duration::from_secs(3);
/// Name under which QEMU's CPU time is printed.
const CPU_TIME: &str = "CPU time of QEMU until then";

/// Starts `count` pods with one sleeping container each and prints the memory of one, as the mean of all.
pub(super) async fn print(node: &Arc<Node>, image: &str, count: usize) -> Result {
    let before = available()?;
    let mut pods = Vec::new();
    for _ in 0..count {
        let pod = Pod::run(node, "idle").await?;
        let container = pod.start("c", image, &["sleep", "1000"]).await?;
        pods.push((pod, container));
    }
    settled(|| Ok(Usage::of(&pods)?.total())).await?;
    let usage = Usage::of(&pods)?;
    let after = available()?;
    let mib = |kib: u64| kib as f64 / 1024.0 / count as f64;
    println!("\nPSS of an idle pod with a sleeping container, mean of {count}:");
    for (name, kib) in &usage.by_name {
        println!("{name:<44} {:>9.1} MiB", mib(*kib));
    }
    println!("{:<44} {:>9.1} MiB", "together", mib(usage.total()));
    println!(
        "{:<44} {:>9.1} MiB",
        "MemAvailable",
        mib(before.saturating_sub(after))
    );
    let cpu_time = usage.cpu_time.as_secs_f64() / count as f64;
    println!("{CPU_TIME:<44} {cpu_time:>9.2} s");
    if let Some((_, container)) = pods.first() {
        let text = container.out(&["cat", "/proc/meminfo"]).await?;
        let fields = [
            "MemTotal",
            "MemFree",
            "Cached",
            "Active(file)",
            "AnonPages",
            "AnonHugePages",
            "Shmem",
            "Mlocked",
            "Slab",
            "KernelStack",
            "PageTables",
            "Percpu",
        ];
        let lines = text.lines().filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            let kib: f64 = value.split_whitespace().next()?.parse().ok()?;
            fields
                .contains(&name)
                .then(|| format!("{name} {:.1}", kib / 1024.0))
        });
        println!("guest, MiB: {}", lines.collect::<Vec<_>>().join(", "));
    }
    for (pod, _) in pods {
        pod.end().await?;
    }
    Ok(())
}

/// Waits until an amount of memory in KiB no longer falls, and returns it. Guests report free memory within some seconds.
/// MemAvailable would never be stable on a machine with other load.
pub(super) async fn settled(amount: impl Fn() -> Result<u64>) -> Result<u64> {
    let mut last = amount()?;
    poll::until_every(
        REPORT_INTERVAL,
        "memory is stable",
        super::SETTLE_TIMEOUT,
        || {
            let before = last;
            let now = amount();
            if let Ok(now) = now {
                last = now;
            }
            async move {
                let now = now?;
                ensure!(now + (1 << 10) >= before, "{before} KiB and falling");
                Ok(now)
            }
        },
    )
    .await
}

/// Memory of all pods' processes and CPU time of their VMMs.
struct Usage {
    /// PSS in KiB by name of the process; kinds of QEMU's mappings begin with a space.
    by_name: BTreeMap<String, u64>,
    cpu_time: Duration,
}

impl Usage {
    fn of(pods: &[(Pod, Container)]) -> Result<Self> {
        let mut usage = Self {
            by_name: BTreeMap::new(),
            cpu_time: Duration::ZERO,
        };
        for (pod, _) in pods {
            let (shim, below) = family(&pod.id)?;
            for pid in std::iter::once(shim).chain(below) {
                let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                *usage.by_name.entry(name.trim().to_owned()).or_default() += pss(pid);
                if name.starts_with("qemu") {
                    usage.cpu_time += cpu_time(pid)?;
                    for (kind, kib) in kinds_of_qemu(pid)? {
                        *usage.by_name.entry(format!("  of it {kind}")).or_default() += kib;
                    }
                }
            }
        }
        Ok(usage)
    }

    /// Returns the PSS of all processes in KiB.
    fn total(&self) -> u64 {
        let processes = self
            .by_name
            .iter()
            .filter(|(name, _)| !name.starts_with(' '));
        processes.map(|(_, kib)| kib).sum()
    }
}

/// Returns the PSS of QEMU's mappings in KiB: the guest's RAM, translated code, and everything else.
fn kinds_of_qemu(pid: i32) -> Result<BTreeMap<&'static str, u64>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut kinds = BTreeMap::new();
    let mut kind = "other";
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words
            .next()
            .ok_or_else(|| Failure(format!("empty line in smaps of {pid}")))?;
        match first.strip_suffix(':') {
            Some("Pss") => {
                let kib: u64 = words
                    .next()
                    .and_then(|n| n.parse().ok())
                    .unwrap_or_default();
                *kinds.entry(kind).or_default() += kib;
            }
            Some(_) => {}
            // The head of a mapping: address range, permissions, …, path.
            None if line.contains("memory-backend-memfd") => kind = "the guest's RAM",
            None if line.contains(" rwxp ") => kind = "translated code",
            None => kind = "other",
        }
    }
    Ok(kinds)
}
