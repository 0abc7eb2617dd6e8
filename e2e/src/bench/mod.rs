//! `make bench`: cost of a pod, as ratios to a bare boot of the same VMM, kernel and agent in the same run.
//!
//! Prints medians with the fastest and slowest sample and writes no file. State is in memory (tmpfs).

pub(crate) mod churn;
pub(crate) mod density;
pub(crate) mod life;
mod memory;
mod peers;
pub(crate) mod table;
pub(crate) mod work;

use crate::bail;
use crate::failure::{During, Failure, Result};
use crate::image::registry::Registry;
use crate::image::set::ImageSet;
use crate::install::Install;
use crate::namespaces::run as command;
use crate::node::Node;
use crate::pod::{Pod, pull};
use crate::{ensure, poll};
use k8s_cri::v1::*;
use serde_json::json;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};
use table::{Series, ms};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::process::Command;

/// Subject of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Subject {
    /// Pods against a bare boot of the same VMM and kernel.
    #[default]
    Pod,
    /// A pod's calls in guest instructions.
    Work,
    /// Memory of idle pods.
    Memory,
    /// The same pods by other runtimes.
    Peers,
}

/// Repetitions of measurements that boot a VM.
const BOOT_SAMPLES: usize = 9;
/// Idle pods whose memory is measured.
const IDLE_PODS: usize = 5;
/// Pods of each peer, one after another and at once.
const PEER_PODS: usize = 10;
/// Time for memory to become stable.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time limit of the boot of a warm VM.
const FILL_TIMEOUT: Duration = Duration::from_secs(60);
/// Repetitions of all other measurements.
const CALL_SAMPLES: usize = 30;

/// Measures the subject and prints the results. `count` replaces the number of idle pods or of each peer's pods.
pub(crate) async fn run(subject: Subject, count: Option<usize>) -> Result<bool> {
    match subject {
        Subject::Pod => pods(count.unwrap_or(IDLE_PODS)).await?,
        Subject::Work => guest_work().await?,
        Subject::Memory => idle_memory(count.unwrap_or(IDLE_PODS)).await?,
        Subject::Peers => peers::run(count.unwrap_or(PEER_PODS)).await?,
    }
    Ok(true)
}

/// Prints a pod's calls with their time and the guest's work.
async fn guest_work() -> Result {
    let scratch = crate::namespaces::scratch();
    let install = work::counting(&scratch, &Install::find()?)?;
    let registry = Registry::start(&install.registry, &scratch, 5000, false).await?;
    let images = ImageSet::push(&registry, &install.busybox).await?;
    let options = crate::context::options("b", "qemu", &registry);
    let node = Arc::new(Node::start(&scratch, &install, &options).await?);
    pull(&node, &images.base).await?;
    life::run(&node, &images.base, true).await?;
    let costs = life::run(&node, &images.base, true).await?;
    println!(
        "{:<36} {:>9} {:>14} {:>14} {:>14} {:>10}",
        "", "ms", "instructions", "recorded", "kernel", "translated"
    );
    for ((name, cost), recorded) in life::CALLS.iter().zip(costs).zip(life::recorded()?) {
        let work = cost.work.unwrap_or_default();
        println!(
            "{name:<36} {:>9.1} {:>14} {recorded:>14} {:>14} {:>10}",
            cost.time.as_secs_f64() * 1000.0,
            work.instructions,
            work.kernel,
            work.translated
        );
    }
    Ok(())
}

async fn idle_memory(idle: usize) -> Result {
    let scratch = crate::namespaces::scratch();
    let install = Install::find()?;
    let registry = Registry::start(&install.registry, &scratch, 5000, false).await?;
    let images = ImageSet::push(&registry, &install.busybox).await?;
    let options = crate::context::options("b", "auto", &registry);
    let node = Arc::new(Node::start(&scratch, &install, &options).await?);
    pull(&node, &images.base).await?;
    memory::print(&node, &images.base, idle).await
}

async fn pods(idle: usize) -> Result {
    let scratch = crate::namespaces::scratch();
    let install = Install::find()?;
    let registry = Registry::start(&install.registry, &scratch, 5000, false).await?;
    let images = ImageSet::push(&registry, &install.busybox).await?;
    let node = Arc::new(
        Node::start(
            &scratch,
            &install,
            &crate::context::options("b", "auto", &registry),
        )
        .await?,
    );
    let pulls = pulls(&node, &images).await?;
    let warm = Pod::run(&node, "warm").await?;
    let kind = vmm_of(&warm).await?;
    warm.end().await?;
    machine(&kind)?;

    let mut bare = Vec::new();
    for i in 0..BOOT_SAMPLES {
        bare.push(
            bare_boot(&scratch, &install, &kind, i)
                .await
                .during("bare boot")?,
        );
    }
    let bare = Series::new(bare);
    let mut cold = Vec::new();
    let mut ends = Vec::new();
    for _ in 0..BOOT_SAMPLES {
        let start = Instant::now();
        let pod = Pod::run(&node, "cold").await?;
        cold.push(ms(start.elapsed()));
        let start = Instant::now();
        pod.end().await?;
        ends.push(ms(start.elapsed()));
    }
    let warm = warm_starts(&scratch, &install, &registry).await?;
    let pod = Pod::run(&node, "idle").await?;
    let (starts, execs) = calls(&pod, &images).await?;
    let unit = bare.median();
    println!(
        "{:<44} {:>9} {:>9} {:>9} {:>8} {:>4}",
        "", "median ms", "fastest", "slowest", "ratio", "n"
    );
    bare.row("bare boot: VMM, kernel, agent ready", unit);
    Series::new(cold).row("RunPodSandbox, cold", unit);
    warm.row("RunPodSandbox, from the pool", unit);
    starts.row("CreateContainer + StartContainer", unit);
    execs.row("ExecSync true", unit);
    pulls.row("PullImage, one layer", unit);
    Series::new(ends).row("StopPodSandbox + RemovePodSandbox", unit);
    pod.end().await?;
    memory::print(&node, &images.base, idle).await
}

async fn vmm_of(pod: &Pod) -> Result<String> {
    for text in pod.status_verbose(true).await?.info.values() {
        let value: serde_json::Value = serde_json::from_str(text)?;
        if let Some(kind) = value.get("vmm").and_then(|v| v.as_str()) {
            return Ok(kind.to_owned());
        }
    }
    bail!("PodSandboxStatus has no VMM")
}

fn machine(kind: &str) -> Result {
    let cpu = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = cpu
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .unwrap_or(": unknown")
        .trim_start_matches([' ', '\t', ':']);
    let cores = cpu.lines().filter(|l| l.starts_with("processor")).count();
    let total = boxlite_sys::proc_memory::meminfo("MemTotal").unwrap_or_default();
    println!(
        "machine: {cores} × {model}, {} GiB, Linux {}",
        total >> 30,
        command("uname", &["-r"])?.trim()
    );
    println!("VMM: {kind}, guests of 1 vCPU; all state on tmpfs\n");
    Ok(())
}

async fn pulls(node: &Arc<Node>, images: &ImageSet) -> Result<Series> {
    let mut times = Vec::new();
    for _ in 0..BOOT_SAMPLES {
        let image = Some(ImageSpec {
            image: images.base.clone(),
            ..Default::default()
        });
        node.cri
            .image()
            .remove_image(RemoveImageRequest { image })
            .await?;
        let start = Instant::now();
        pull(node, &images.base).await?;
        times.push(ms(start.elapsed()));
    }
    Ok(Series::new(times))
}

async fn calls(pod: &Pod, images: &ImageSet) -> Result<(Series, Series)> {
    let mut starts = Vec::new();
    for i in 0..BOOT_SAMPLES {
        let start = Instant::now();
        let container = pod
            .start(&format!("c{i}"), &images.base, &["sleep", "1000"])
            .await?;
        starts.push(ms(start.elapsed()));
        container.stop(0).await?;
        container.remove().await?;
    }
    let container = pod.start("exec", &images.base, &["sleep", "1000"]).await?;
    let mut execs = Vec::new();
    for _ in 0..CALL_SAMPLES {
        let start = Instant::now();
        container.out(&["true"]).await?;
        execs.push(ms(start.elapsed()));
    }
    container.stop(0).await?;
    container.remove().await?;
    Ok((Series::new(starts), Series::new(execs)))
}

/// Measures RunPodSandbox on a node with a pool, each time with one VM that waits and none that boots.
async fn warm_starts(scratch: &Path, install: &Install, registry: &Registry) -> Result<Series> {
    let mut options = crate::context::options("w", "auto", registry);
    options.pool = Some("size = 1\nidle_seconds = 1".into());
    let node = Arc::new(Node::start(scratch, install, &options).await?);
    let mut times = Vec::new();
    for _ in 0..BOOT_SAMPLES {
        poll::until("a warm VM waits", FILL_TIMEOUT, || async {
            let waiting = node.metric("boxlite_pool_warm_vms").await?;
            ensure!(waiting == 1, "{waiting} wait");
            Ok(())
        })
        .await?;
        let start = Instant::now();
        let pod = Pod::run(&node, "warm").await?;
        times.push(ms(start.elapsed()));
        pod.end().await?;
    }
    let hits = node
        .metric("boxlite_pool_claims_total{result=\"hit\"}")
        .await?;
    ensure!(
        hits == BOOT_SAMPLES as u64,
        "{hits} pods came from the pool"
    );
    node.terminate().await?;
    Ok(Series::new(times))
}

/// Measures from the spawn of a vmm child to the agent's call on the ready port: no network, no scratch disk, an empty
/// share.
async fn bare_boot(scratch: &Path, install: &Install, kind: &str, turn: usize) -> Result<f64> {
    let dir = scratch.join(format!("bare{turn}"));
    let (work, share) = (dir.join("vm"), dir.join("share"));
    std::fs::create_dir_all(&work)?;
    std::fs::create_dir_all(&share)?;
    let spec = json!({
        "id": format!("bare{turn}"), "kind": kind, "vcpus": 1, "memory_mib": 320, "acceleration": "tcg",
        "installation": {
            "guest": install.guest, "libkrunfw": install.libkrunfw, "qemu": install.qemu, "virtiofsd": install.virtiofsd,
            "vhost_device_vsock": install.vhost_device_vsock, "cache": scratch.join("b/root/cache"),
        },
        "work_dir": work, "share_dir": share, "disks": [], "nics": [], "netns": null, "debug_console": false,
    });
    std::fs::create_dir_all(scratch.join("b/root/cache"))?;
    let listener = UnixListener::bind(work.join("vsock_2696"))?;
    let log = std::fs::File::create(dir.join("log"))?;
    let start = Instant::now();
    // Started as by the shim: as PID 1 of a PID namespace, so that its helpers end with it.
    let mut child = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child"])
        .arg(&install.shim)
        .arg("vmm")
        .current_dir(&work)
        .stdin(Stdio::piped())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(true)
        .spawn()?;
    // Kept open: a vmm child that finds stdin closed treats its shim as dead.
    let mut stdin = child.stdin.take();
    if let Some(stdin) = &mut stdin {
        stdin.write_all(format!("{spec}\n").as_bytes()).await?;
    }
    let boot_failure = |what: &str| {
        let text = |name: &Path| std::fs::read_to_string(name).unwrap_or_default();
        Failure(format!(
            "{what}; log: {} console: {}",
            text(&dir.join("log")),
            text(&work.join("console.log"))
        ))
    };
    let ready = tokio::select! {
        accepted = listener.accept() => accepted.map(|_| ()).map_err(Failure::from),
        ended = child.wait() => Err(boot_failure(&format!("the vmm child ended: {ended:?}"))),
        () = tokio::time::sleep(Duration::from_secs(60)) => Err(boot_failure("not ready within 60 s")),
    };
    let elapsed = ms(start.elapsed());
    ready?;
    child.start_kill()?;
    child.wait().await?;
    Ok(elapsed)
}
