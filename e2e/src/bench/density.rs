//! `make bench-density`: idle pods in growing numbers on one node. What does one cost, and how long do the kubelet's periodic calls
//! and a scrape take beside them, also while some of the VMs do not answer?
//!
//! Prints figures and fails only if a call fails; goals are in docs/performance.md.

use super::memory;
use super::peers::available;
use super::table::{Series, ms};
use crate::client::answer;
use crate::failure::{During, Result};
use crate::image::registry::Registry;
use crate::image::set::ImageSet;
use crate::install::Install;
use crate::node::Node;
use crate::pod::{Pod, pod_spec, pull};
use crate::process::{family, pss, vmm};
use k8s_cri::v1::{LinuxContainerResources, ListContainerStatsRequest, ListPodSandboxStatsRequest};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::Arc;
use std::time::Instant;

/// Numbers of pods at which figures are taken, as far as the run has so many.
const STEPS: [usize; 3] = [1, 10, 50];
/// Calls of each kind at each step.
const CALLS: usize = 100;
/// VMs that are stopped by SIGSTOP at the end.
const STOPPED: usize = 10;
/// Memory limit of a pod unless another is chosen, so that 100 of them fit into 24 GiB on QEMU.
const MEMORY_MIB: i64 = 64;

/// Options of a run.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Pods in the end.
    #[arg(long, default_value_t = 100)]
    pods: usize,
    /// Memory limit of a pod in MiB; 0: none.
    #[arg(long, default_value_t = MEMORY_MIB)]
    memory: i64,
}

/// Starts the pods and prints the figures of each step.
pub(crate) async fn run(options: &Options) -> Result {
    let scratch = crate::namespaces::scratch();
    let install = Install::find()?;
    let registry = Registry::start(&install.registry, &scratch, 5000, false).await?;
    let images = ImageSet::push(&registry, &install.busybox).await?;
    let config = crate::context::options("b", "auto", &registry);
    let node = Arc::new(Node::start(&scratch, &install, &config).await?);
    pull(&node, &images.base).await?;
    let before = available()?;
    let mut pods = Vec::new();
    let more = STEPS.into_iter().filter(|&step| step < options.pods);
    for step in more.chain([options.pods]) {
        let begun = Instant::now();
        let starting = (pods.len()..step).map(|_| start(&node, &images.base, options.memory));
        let started = futures::future::join_all(starting).await;
        let started = started.into_iter().collect::<Result<Vec<_>>>();
        let new = started.during(format!("{step} pods"))?;
        println!(
            "\n{step} pods: the last {} at once running after {:.1} s",
            new.len(),
            begun.elapsed().as_secs_f64()
        );
        pods.extend(new);
        print_memory(&pods, before).await?;
        calls(&node).await?;
    }
    let vmms = pods.iter().take(STOPPED).map(|pod| vmm(&pod.id));
    let vmms = vmms.collect::<Result<Vec<_>>>()?;
    let vmms: Vec<_> = vmms.into_iter().map(Pid::from_raw).collect();
    println!("\n{} VMs stopped:", vmms.len());
    for &pid in &vmms {
        kill(pid, Signal::SIGSTOP)?;
    }
    let stopped = calls(&node).await;
    for &pid in &vmms {
        kill(pid, Signal::SIGCONT)?;
    }
    stopped?;
    let begun = Instant::now();
    let ended = futures::future::join_all(pods.iter().map(Pod::end)).await;
    ended.into_iter().collect::<Result<Vec<()>>>()?;
    println!("\nall removed after {:.1} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// Starts a pod with one sleeping container.
async fn start(node: &Arc<Node>, image: &str, memory_mib: i64) -> Result<Pod> {
    let mut config = pod_spec(node, "idle");
    if memory_mib > 0
        && let Some(linux) = &mut config.linux
    {
        linux.resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: memory_mib << 20,
            ..Default::default()
        });
    }
    let pod = Pod::run_with(node, config).await?;
    pod.start("c", image, &["sleep", "100000"]).await?;
    Ok(pod)
}

/// Prints the memory of one pod, as the mean of all.
async fn print_memory(pods: &[Pod], available_before: u64) -> Result {
    let all = || -> Result<u64> {
        let mut sum = 0;
        for pod in pods {
            let (shim, below) = family(&pod.id)?;
            sum += std::iter::once(shim).chain(below).map(pss).sum::<u64>();
        }
        Ok(sum)
    };
    let sum = memory::settled(all).await?;
    let taken = available_before.saturating_sub(available()?);
    let mib = |kib: u64| kib as f64 / 1024.0 / pods.len() as f64;
    println!(
        "a pod: PSS {:.1} MiB, MemAvailable {:.1} MiB",
        mib(sum),
        mib(taken)
    );
    Ok(())
}

/// Prints the times of the calls that kubelets and Prometheus repeat.
async fn calls(node: &Node) -> Result {
    row("ListPodSandbox", async || node.pods().await.map(drop)).await?;
    row("ListContainers", async || node.containers().await.map(drop)).await?;
    row("ListPodSandboxStats", async || {
        let request = ListPodSandboxStatsRequest::default();
        let stats = node.cri.runtime().list_pod_sandbox_stats(request).await;
        answer("ListPodSandboxStats", stats).map(drop)
    })
    .await?;
    row("ListContainerStats", async || {
        let request = ListContainerStatsRequest::default();
        let stats = node.cri.runtime().list_container_stats(request).await;
        answer("ListContainerStats", stats).map(drop)
    })
    .await?;
    row("scrape", async || node.metrics_page().await.map(drop)).await
}

async fn row(name: &str, call: impl AsyncFn() -> Result) -> Result {
    let mut times = Vec::new();
    for _ in 0..CALLS {
        let begun = Instant::now();
        call().await?;
        times.push(ms(begun.elapsed()));
    }
    let times = Series::new(times);
    println!(
        "{name:<20} median {:>7.1} ms, p99 {:>7.1} ms",
        times.median(),
        times.quantile(99)
    );
    Ok(())
}
