//! A guest whose agent is hostile: `boxlite-hostile-agent` instead of the real one, under the real shim and daemon. The memory of
//! both stays bounded, a neighbor's commands are not slowed down, and the pod is removed in time.

use crate::case;
use crate::context::Backend;
use crate::failure::{During, Result};
use crate::node::Node;
use crate::pod::{Container, Pod, container_spec, pod_spec, pull};
use crate::process::{peak, shims};
use crate::runner::{Case, Context};
use crate::{ensure, poll, same};
use boxlite_sys::sync::Mutex;
use k8s_cri::v1::*;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub(crate) fn cases() -> Vec<Case> {
    // One case, because each would need a neighbor.
    vec![case!(hostile_agents_harm_only_their_pods, 150)]
}

/// Maximum memory of daemon and shim, each, in bytes.
const MAX_MEMORY_BYTES: u64 = 128 << 20;
/// Factor by which an attack may slow down a neighbor's commands.
const MAX_SLOWDOWN: u32 = 2;
/// Duration of a command, on an idle or busy machine, which is not taken for a slowdown.
const USUAL_LATENCY: Duration = Duration::from_secs(3);
/// Number of commands whose median is the latency.
const COMMANDS: usize = 3;
/// Most time in which StopContainer and StopPodSandbox end after the grace period, on an idle machine.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Length of a record of an empty line, in bytes.
const RECORD_BYTES: u64 = 41;
/// Number of empty lines that fill the queue of the shim, 4 MiB.
const QUEUE_LINES: u64 = 5 << 20;
/// Size at which the log of the flood is emptied, since the suite's directory is in memory. Larger than a flood that ends.
const MAX_LOG_BYTES: u64 = 64 << 20;
/// Interval at which the size of that log is read.
const LOG_INTERVAL: Duration = Duration::from_millis(50);
/// Interval at which the memory is read.
const MEMORY_INTERVAL: Duration = Duration::from_millis(100);

/// A node whose first pod has the real agent.
struct AttackTest {
    ctx: Context,
    node: Arc<Node>,
    agent: PathBuf,
    neighbor: Pod,
    beside: Container,
    /// Duration of the neighbor's start.
    boot: Duration,
    /// Duration of a command of the neighbor before the attacks.
    baseline: Duration,
    /// Largest memory of daemon and shims so far, by process name.
    seen: Mutex<(u64, u64)>,
    /// Number of bytes that the flood of output has added to its log.
    output_bytes: AtomicU64,
}

impl AttackTest {
    async fn start(ctx: Context, name: &str) -> Result<Self> {
        let agent = ctx.scratch.join(format!("agent-{name}"));
        std::fs::copy(&ctx.install.guest, &agent)?;
        let node = ctx
            .dedicated_node(name, |o| o.guest = Some(agent.clone()))
            .await?;
        pull(&node, &ctx.images.base).await?;
        let begun = Instant::now();
        let neighbor = Pod::run(&node, "neighbor").await?;
        let boot = begun.elapsed();
        let beside = neighbor
            .start("beside", &ctx.images.base, &["sleep", "1000"])
            .await?;
        let mut test = Self {
            ctx,
            node,
            agent,
            neighbor,
            beside,
            boot,
            baseline: Duration::ZERO,
            seen: Mutex::default(),
            output_bytes: AtomicU64::new(0),
        };
        test.baseline = test.latency().await?;
        Ok(test)
    }

    /// Gives the following pods the hostile agent.
    fn install_agent(&self, boot: &str) -> Result {
        let hostile = &self.ctx.install.hostile_agent;
        let draft = self.agent.with_extension("new");
        std::fs::copy(hostile, &draft).during(hostile.display())?;
        let mut file = std::fs::OpenOptions::new().append(true).open(&draft)?;
        write!(file, "\nboxlite-boot:{boot}\n")?;
        drop(file);
        Ok(std::fs::rename(draft, &self.agent)?)
    }

    /// Restarts the daemon with a limit for the start of a pod, in seconds.
    async fn limit_starts(&self, seconds: u64) -> Result {
        let path = self.node.dir.join("config.toml");
        let text = std::fs::read_to_string(&path)?;
        let limited = |line: &str| match line.starts_with("run_pod_seconds") {
            true => format!("run_pod_seconds = {seconds}\n"),
            false => format!("{line}\n"),
        };
        std::fs::write(&path, text.lines().map(limited).collect::<String>())?;
        self.node.terminate().await?;
        self.node.serve().await
    }

    /// Returns the median duration of a neighbor's command.
    async fn latency(&self) -> Result<Duration> {
        let mut all = Vec::new();
        for _ in 0..COMMANDS {
            let begun = Instant::now();
            same!(
                self.beside.out(&["echo", "fine"]).await?,
                "fine\n",
                "the neighbor"
            );
            all.push(begun.elapsed());
        }
        all.sort();
        Ok(all[COMMANDS / 2])
    }

    /// Fails if an attack slows the neighbor down all the time. The other suite beside this one may do so for a while.
    async fn check_neighbor(&self, attack: &str) -> Result {
        let limit = (self.baseline * MAX_SLOWDOWN)
            .max(self.ctx.patience(1) * 2)
            .max(USUAL_LATENCY);
        let fast = poll::until(
            "the neighbor is not slowed down",
            self.ctx.patience(30),
            || async {
                let took = self.latency().await?;
                ensure!(
                    took <= limit,
                    "a command took {took:?}, {:?} before",
                    self.baseline
                );
                Ok(())
            },
        );
        fast.await.during(attack)
    }

    /// Returns the number of empty lines that an attacker writes: without end, but few in the emulated KVM host.
    fn output_lines(&self) -> u64 {
        match self.ctx.backend {
            Backend::Qemu => u64::MAX,
            Backend::Krun => 1 << 20,
        }
    }

    /// Returns the most time in which a call ends a container or a pod, beside the other suite.
    fn stop_timeout(&self) -> Duration {
        STOP_TIMEOUT + self.ctx.patience(5)
    }

    /// Completes a call while the memory of daemon and shims is measured.
    async fn measured<T>(&self, call: impl Future<Output = T>) -> Result<T> {
        tokio::pin!(call);
        loop {
            self.measure().await?;
            if let Ok(result) = tokio::time::timeout(MEMORY_INTERVAL, &mut call).await {
                self.measure().await?;
                return Ok(result);
            }
        }
    }

    async fn measure(&self) -> Result {
        let daemon = peak(self.node.service().pid().await?);
        let directory = self.node.dir.display().to_string();
        let shims = shims(&directory)?;
        let shim = shims.into_iter().map(peak).max().unwrap_or_default();
        let mut seen = self.seen.lock();
        *seen = (seen.0.max(daemon), seen.1.max(shim));
        Ok(())
    }

    /// Removes the neighbor. Fails if daemon or shim had too much memory.
    async fn end(self) -> Result {
        self.measure().await?;
        self.neighbor.end().await?;
        let (daemon, shim) = *self.seen.lock();
        ensure!(
            daemon < MAX_MEMORY_BYTES,
            "the daemon had {} MiB",
            daemon >> 20
        );
        ensure!(shim < MAX_MEMORY_BYTES, "the shim had {} MiB", shim >> 20);
        same!(self.node.pods().await?.len(), 0, "pods");
        self.node.terminate().await
    }
}

/// Attacks that overload the host, or lie to it.
const FLOODS: [&str; 6] = ["events", "exits", "logs", "mounts", "ports", "stats"];
/// Attacks that delay the host. The mount is last: from then on this program would wait for it, too.
const DELAYS: [&str; 3] = ["errors", "hang", "fuse"];
/// Ways in which an agent fails to serve. The first ends the connection, the others end at the time limit.
const BOOTS: [&str; 3] = ["noise", "pings", "silent"];

async fn hostile_agents_harm_only_their_pods(ctx: Context) -> Result {
    let test = AttackTest::start(ctx, "attacks").await?;
    test.install_agent("serve")?;
    let mut spec = pod_spec(&test.node, "attackers");
    let context = spec
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default();
    // For the exchange of ports.
    context.namespace_options = Some(NamespaceOption {
        network: NamespaceMode::Node.into(),
        ..Default::default()
    });
    let pod = Pod::run_with(&test.node, spec).await?;
    let log = PathBuf::from(&pod.config.log_directory).join("logs.log");
    let floods = test.measured(flood(&test, &pod));
    tokio::select! {
        outcome = floods => outcome??,
        error = empty_log(&log, &test.output_bytes) => error?,
    }
    let unresponsive = test.measured(UnresponsivePod::start(&test, &pod)).await??;
    // Long enough for a boot like the neighbor's, so that each agent is reached.
    let limit = test.boot.mul_f64(1.5).as_secs() + 1;
    test.limit_starts(limit).await?;
    // Both consist of waiting.
    let boots = boot(&test, Duration::from_secs(limit));
    let both = futures::future::try_join(unresponsive.end(test.stop_timeout()), boots);
    test.measured(both).await??;
    test.end().await
}

/// Starts a container that makes the agent attack.
async fn attack(test: &AttackTest, pod: &Pod, attack: &str) -> Result<Container> {
    let lines = test.output_lines().to_string();
    let command = ["attack", attack, &test.beside.id, &lines];
    let mut config = container_spec(attack, &test.ctx.images.base, &command);
    let volume = test.node.dir.join("volume");
    std::fs::create_dir_all(volume.join("hanging"))?;
    config.mounts = vec![Mount {
        host_path: volume.display().to_string(),
        container_path: "/volume".into(),
        propagation: MountPropagation::PropagationBidirectional.into(),
        ..Default::default()
    }];
    super::security_context(&mut config).privileged = true;
    pod.start_with(config).await.during(attack)
}

/// Makes all floods at once.
async fn flood(test: &AttackTest, pod: &Pod) -> Result {
    let mut attackers = Vec::new();
    for name in FLOODS {
        attackers.push((name, attack(test, pod, name).await?));
    }
    test.check_neighbor("floods").await?;
    for (name, container) in &attackers {
        check_attacker(test, name, container).await.during(name)?;
    }
    same!(
        test.beside.status().await?.state(),
        ContainerState::ContainerRunning,
        "the neighbor"
    );
    let ends = attackers.iter().map(|(name, container)| async move {
        let begun = Instant::now();
        container.stop(0).await.during(name)?;
        let took = begun.elapsed();
        let limit = test.stop_timeout();
        ensure!(took < limit, "{name}: StopContainer took {took:?}");
        container.remove().await
    });
    futures::future::try_join_all(ends).await?;
    Ok(std::fs::remove_dir_all(&pod.config.log_directory)?)
}

/// Empties the log of the flood when it is large, and counts its bytes.
async fn empty_log(path: &Path, bytes: &AtomicU64) -> Result {
    let mut interval = tokio::time::interval(LOG_INTERVAL);
    let mut emptied = 0;
    loop {
        interval.tick().await;
        let Ok(log) = std::fs::OpenOptions::new().write(true).open(path) else {
            continue;
        };
        let length = log.metadata()?.len();
        bytes.store(emptied + length, Ordering::Relaxed);
        if length > MAX_LOG_BYTES {
            emptied += length;
            log.set_len(0)?;
        }
    }
}

/// Checks what the host reports of an attacker.
async fn check_attacker(test: &AttackTest, attack: &str, container: &Container) -> Result {
    match attack {
        "exits" => {
            let status = container.exited(test.ctx.patience(20)).await?;
            ensure!(
                (0..=255).contains(&status.exit_code),
                "exit code {}",
                status.exit_code
            );
            ensure!(status.finished_at >= status.started_at, "{status:?}");
        }
        "logs" => {
            let most = test.output_lines().min(QUEUE_LINES) * RECORD_BYTES;
            poll::until("the flood", test.ctx.patience(20), || async {
                let bytes = test.output_bytes.load(Ordering::Relaxed);
                ensure!(bytes >= most, "the log had {bytes} bytes");
                Ok(())
            })
            .await?;
        }
        "stats" => {
            let mut last = 0;
            for _ in 0..3 {
                // The limit of the call is short for an emulated guest on a busy machine.
                let asked = || container.stats();
                let stats = poll::until("statistics", test.ctx.patience(10), asked).await?;
                let memory = stats.memory.unwrap_or_default();
                let bytes = memory.usage_bytes.unwrap_or_default().value;
                ensure!(bytes < 1 << 40, "{bytes} bytes of memory");
                let cpu = stats.cpu.unwrap_or_default();
                let time = cpu.usage_core_nano_seconds.unwrap_or_default().value;
                ensure!(time >= last, "CPU time fell from {last} to {time}");
                ensure!(
                    Duration::from_nanos(time) < Duration::from_secs(3600),
                    "{time} ns of CPU time"
                );
                last = time;
            }
        }
        "mounts" => {
            let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
            let volume = test.node.dir.join("volume").display().to_string();
            ensure!(!mounts.contains(&volume), "{mounts}");
        }
        _ => {
            let state = container.status().await?.state();
            same!(state, ContainerState::ContainerRunning, "the attacker");
        }
    }
    Ok(())
}

/// A pod whose guest answers no call and no request of a mount.
struct UnresponsivePod {
    pod: Pod,
    attackers: Vec<Container>,
    /// A reader of the mount on the host. It must not wait longer than the pod lives.
    reader: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl UnresponsivePod {
    async fn start(test: &AttackTest, pod: &Pod) -> Result<Self> {
        let mut attackers = Vec::new();
        for name in DELAYS {
            attackers.push(attack(test, pod, name).await?);
        }
        let hanging = test.node.dir.join("volume/hanging");
        poll::until("the mount of the guest", test.ctx.patience(10), || async {
            let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
            ensure!(mounts.contains(&hanging.display().to_string()), "{mounts}");
            Ok(())
        })
        .await?;
        let reader = tokio::task::spawn_blocking(move || std::fs::read_dir(hanging).map(drop));
        Ok(Self {
            pod: pod.clone(),
            attackers,
            reader,
        })
    }

    async fn end(self, limit: Duration) -> Result {
        // A guest that refuses or ignores a signal makes the call fail, which must not take longer.
        let stops = self.attackers.iter().map(|attacker| async move {
            let begun = Instant::now();
            drop(attacker.stop(1).await);
            (&attacker.config.log_path, begun.elapsed())
        });
        for (log, took) in futures::future::join_all(stops).await {
            ensure!(took < limit, "{log}: StopContainer took {took:?}");
        }
        let begun = Instant::now();
        self.pod.stop().await?;
        let took = begun.elapsed();
        ensure!(took < limit, "StopPodSandbox took {took:?}");
        self.pod.remove().await?;
        let read = tokio::time::timeout(STOP_TIMEOUT, self.reader).await;
        let read = read
            .map_err(std::io::Error::other)
            .during("a reader of the mount")??;
        ensure!(read.is_err(), "the mount was read");
        Ok(())
    }
}

/// Starts pods whose agents do not serve. Each fails within `limit`, and is removed.
async fn boot(test: &AttackTest, limit: Duration) -> Result {
    let rounds = test.ctx.rounds(BOOTS.len(), 1);
    for boot in &BOOTS[..rounds] {
        test.install_agent(boot)?;
        let begun = Instant::now();
        let run = async {
            let outcome = Pod::run(&test.node, boot).await;
            (outcome, begun.elapsed())
        };
        let ((outcome, took), neighbor) = tokio::join!(run, test.check_neighbor(boot));
        neighbor?;
        ensure!(outcome.is_err(), "{boot}: the pod runs");
        ensure!(took < limit + STOP_TIMEOUT, "{boot}: failed after {took:?}");
        poll::until("the failed pod is removed", STOP_TIMEOUT, || async {
            let pods = test.node.pods().await?;
            let names = pods.iter().filter_map(|pod| pod.metadata.as_ref());
            let names: Vec<_> = names.map(|metadata| &metadata.name).collect();
            ensure!(
                !names.iter().any(|name| name.starts_with(boot)),
                "{names:?}"
            );
            Ok(())
        })
        .await
        .during(boot)?;
    }
    Ok(())
}
