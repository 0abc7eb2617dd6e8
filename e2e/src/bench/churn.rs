//! `make bench-churn`: many pods one after another, then many at once. Afterwards the daemon and the node must be as before.
//!
//! Compared: file descriptors, threads and memory of the daemon, and every object of [`LeakSnapshot`]: processes, mounts,
//! network namespaces, interfaces, cgroups, leases, files.

use super::table::{Series, ms};
use crate::ensure;
use crate::failure::{During, Result};
use crate::image::registry::Registry;
use crate::image::set::ImageSet;
use crate::install::Install;
use crate::leak::LeakSnapshot;
use crate::node::Node;
use crate::pod::{Pod, pull};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pods before the first figures, which fill the caches of the daemon.
const WARM_UP_PODS: usize = 20;
/// Number of lines printed during a phase.
const LINES: usize = 10;
/// Allowed growth of the daemon's memory, in percent.
const MAX_GROWTH_PERCENT: u64 = 5;
/// Allowed growth of descriptors and threads: connections that a client or a plugin opens again.
const MAX_MORE_HANDLES: u64 = 4;
/// Time limit for idle threads and connections of the daemon to end.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Options of a run.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Pods one after another.
    #[arg(long, default_value_t = 1000)]
    pods: usize,
    /// Pods created at once, and removed at once.
    #[arg(long, default_value_t = 100)]
    at_once: usize,
}

/// Figures of the daemon's process.
#[derive(Debug, Clone, Copy)]
struct Daemon {
    descriptors: u64,
    threads: u64,
    rss_kib: u64,
}

impl Daemon {
    async fn of(node: &Node) -> Result<Self> {
        let pid = node.service().pid().await?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            number.unwrap_or_default()
        };
        Ok(Self {
            descriptors: std::fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64,
            threads: field("Threads:"),
            rss_kib: field("VmRSS:"),
        })
    }

    fn text(self) -> String {
        format!(
            "daemon: {} descriptors, {} threads, {:.1} MiB",
            self.descriptors,
            self.threads,
            self.rss_kib as f64 / 1024.0
        )
    }

    /// Fails if this is more than `before` by more than allowed.
    fn check(self, before: Self) -> Result {
        let rss = before.rss_kib + before.rss_kib * MAX_GROWTH_PERCENT / 100;
        ensure!(
            self.descriptors <= before.descriptors + MAX_MORE_HANDLES
                && self.threads <= before.threads + MAX_MORE_HANDLES
                && self.rss_kib <= rss,
            "{}, before: {}",
            self.text(),
            before.text()
        );
        Ok(())
    }
}

/// Runs both phases. Fails if anything leaks.
pub(crate) async fn run(options: &Options) -> Result {
    let scratch = crate::namespaces::scratch();
    let install = Install::find()?;
    let registry = Registry::start(&install.registry, &scratch, 5000, false).await?;
    let images = ImageSet::push(&registry, &install.busybox).await?;
    let config = crate::context::options("b", "auto", &registry);
    let node = Arc::new(Node::start(&scratch, &install, &config).await?);
    pull(&node, &images.base).await?;
    for _ in 0..WARM_UP_PODS.min(options.pods) {
        life(&node, &images.base).await?;
    }
    let objects = LeakSnapshot::take(&node)?;
    let before = Daemon::of(&node).await?;
    println!("before: {}; {}", before.text(), objects.counts());

    let mut times = Vec::new();
    let started = Instant::now();
    for done in 1..=options.pods {
        let start = Instant::now();
        life(&node, &images.base)
            .await
            .during(format!("pod {done} of {}", options.pods))?;
        times.push(ms(start.elapsed()));
        if done % (options.pods / LINES).max(1) == 0 {
            let daemon = Daemon::of(&node).await?;
            println!(
                "{done} pods, {} s: {}",
                started.elapsed().as_secs(),
                daemon.text()
            );
        }
    }
    let (first, last) = times.split_at(times.len() / 2);
    let (first, last) = (Series::new(first.to_vec()), Series::new(last.to_vec()));
    println!(
        "a pod from nothing to gone, ms: first half {:.0} (p99 {:.0}), second half {:.0} (p99 {:.0})",
        first.median(),
        first.quantile(99),
        last.median(),
        last.quantile(99)
    );
    at_once(&node, &images.base, options.at_once).await?;

    let objects = objects.restored(&node).await?;
    let settled = crate::poll::until("the daemon is as before", SETTLE_TIMEOUT, || async {
        Daemon::of(&node).await?.check(before)
    });
    let settled = settled.await;
    let after = Daemon::of(&node).await?;
    println!("after: {}; {}", after.text(), objects.counts());
    settled
}

/// Runs one pod with one container, and removes both.
async fn life(node: &Arc<Node>, image: &str) -> Result {
    let pod = Pod::run(node, "churn").await?;
    pod.start("c", image, &["sleep", "1000"]).await?;
    pod.end().await
}

async fn at_once(node: &Arc<Node>, image: &str, count: usize) -> Result {
    let start = Instant::now();
    let starting = (0..count).map(|_| async {
        let pod = Pod::run(node, "churn").await?;
        pod.start("c", image, &["sleep", "1000"]).await?;
        Result::Ok(pod)
    });
    let pods = futures::future::join_all(starting).await;
    let running = start.elapsed();
    let pods = pods
        .into_iter()
        .collect::<Result<Vec<_>>>()
        .during("at once")?;
    let list = Instant::now();
    ensure!(node.pods().await?.len() == count, "not all pods are listed");
    let list = list.elapsed();
    let start = Instant::now();
    let ended = futures::future::join_all(pods.iter().map(Pod::end)).await;
    ended.into_iter().collect::<Result<Vec<()>>>()?;
    println!(
        "{count} pods at once: all running after {:.1} s, ListPodSandbox {:.1} ms, all removed after {:.1} s",
        running.as_secs_f64(),
        ms(list),
        start.elapsed().as_secs_f64()
    );
    Ok(())
}
