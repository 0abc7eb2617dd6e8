//! A guest whose agent is hostile: `boxlite-hostile-agent` instead of the real one, under the real shim and daemon. The memory of
//! both stays bounded, a neighbor's commands are not slowed down, and the pod is removed in time.

use crate::case;
use crate::failure::{During, Result};
use crate::node::Node;
use crate::pod::{Container, Pod, container_spec, pod_spec, pull};
use crate::process::{peak, shims};
use crate::runner::{Case, Context};
use crate::{ensure, poll, same};
use boxlite_sys::sync::Mutex;
use k8s_cri::v1::*;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(agents_that_do_not_serve_fail_their_pods_in_time, 150),
        case!(floods_and_lies_of_an_agent_stay_in_its_pod, 180),
        case!(silent_mounts_and_calls_end_with_their_pod, 120),
    ]
}

/// Most memory of daemon and shim, each.
const MAX_BYTES: u64 = 128 << 20;
/// Factor by which an attack may slow down a neighbor's commands.
const MAX_SLOWDOWN: u32 = 2;
/// Duration of a command, on an idle or busy machine, which is not taken for a slowdown.
const USUAL_LATENCY: Duration = Duration::from_secs(3);
/// Number of commands whose median is the latency.
const COMMANDS: usize = 5;
/// Most time in which StopContainer and StopPodSandbox end after the grace period.
const STOP_TIME: Duration = Duration::from_secs(10);
/// Size of a log that has the whole flood: 5 MiB of empty lines, each a record of 41 bytes.
const FLOOD_BYTES: u64 = 41 * (5 << 20);
/// Interval at which the memory is read.
const MEMORY_INTERVAL: Duration = Duration::from_millis(100);

/// A node whose first pod has the real agent.
struct Siege {
    ctx: Context,
    node: Arc<Node>,
    agent: PathBuf,
    neighbor: Pod,
    beside: Container,
    /// Duration of the neighbor's start.
    boot: Duration,
    quiet: Duration,
    /// Largest memory of daemon and shims so far, by process name.
    seen: Mutex<(u64, u64)>,
}

impl Siege {
    async fn begin(ctx: Context, name: &str) -> Result<Self> {
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
        let mut siege = Self {
            ctx,
            node,
            agent,
            neighbor,
            beside,
            boot,
            quiet: Duration::ZERO,
            seen: Mutex::default(),
        };
        siege.quiet = siege.latency().await?;
        Ok(siege)
    }

    /// Gives the following pods the hostile agent.
    fn arm(&self, boot: &str) -> Result {
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

    /// Fails if an attack slows the neighbor down.
    async fn check_neighbor(&self, attack: &str) -> Result {
        let took = self.latency().await.during(attack)?;
        let limit = (self.quiet * MAX_SLOWDOWN)
            .max(self.ctx.patience(1) * 2)
            .max(USUAL_LATENCY);
        ensure!(
            took <= limit,
            "{attack}: a neighbor's command took {took:?}, {:?} before",
            self.quiet
        );
        Ok(())
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
        ensure!(daemon < MAX_BYTES, "the daemon had {} MiB", daemon >> 20);
        ensure!(shim < MAX_BYTES, "the shim had {} MiB", shim >> 20);
        same!(self.node.pods().await?.len(), 0, "pods");
        self.node.terminate().await
    }
}

async fn agents_that_do_not_serve_fail_their_pods_in_time(ctx: Context) -> Result {
    let siege = Siege::begin(ctx, "wallboot").await?;
    // Long enough for a boot like the neighbor's, so that each agent is reached.
    let limit = siege.boot.mul_f64(1.5).as_secs() + 1;
    siege.limit_starts(limit).await?;
    let boots = ["noise", "pings", "mute", "silent"];
    for boot in &boots[..siege.ctx.rounds(boots.len(), 2)] {
        siege.arm(boot)?;
        let begun = Instant::now();
        let outcome = siege.measured(Pod::run(&siege.node, boot)).await?;
        let took = begun.elapsed();
        ensure!(outcome.is_err(), "{boot}: the pod runs");
        let most = Duration::from_secs(limit) + STOP_TIME;
        ensure!(took < most, "{boot}: failed after {took:?}");
        siege.check_neighbor(boot).await?;
        poll::until("the failed pod is removed", STOP_TIME, || async {
            same!(siege.node.pods().await?.len(), 1, "pods");
            Ok(())
        })
        .await
        .during(boot)?;
    }
    siege.end().await
}

/// Starts a container that makes the agent attack.
async fn attack(siege: &Siege, pod: &Pod, attack: &str) -> Result<Container> {
    let command = ["attack", attack, &siege.beside.id];
    let mut config = container_spec(attack, &siege.ctx.images.base, &command);
    let volume = siege.node.dir.join("volume");
    std::fs::create_dir_all(volume.join("trap"))?;
    config.mounts = vec![Mount {
        host_path: volume.display().to_string(),
        container_path: "/volume".into(),
        propagation: MountPropagation::PropagationBidirectional.into(),
        ..Default::default()
    }];
    super::security_context(&mut config).privileged = true;
    pod.start_with(config).await.during(attack)
}

async fn floods_and_lies_of_an_agent_stay_in_its_pod(ctx: Context) -> Result {
    let siege = Siege::begin(ctx, "wallflood").await?;
    siege.arm("serve")?;
    let mut spec = pod_spec(&siege.node, "floods");
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
    let pod = Pod::run_with(&siege.node, spec).await?;
    for name in ["events", "exits", "logs", "mounts", "ports", "stats"] {
        let container = attack(&siege, &pod, name).await?;
        siege.measured(siege.check_neighbor(name)).await??;
        siege
            .measured(judge(&siege, name, &container))
            .await?
            .during(name)?;
        same!(
            siege.beside.status().await?.state(),
            ContainerState::ContainerRunning,
            "the neighbor"
        );
        let begun = Instant::now();
        container.stop(0).await?;
        let took = begun.elapsed();
        ensure!(took < STOP_TIME, "{name}: StopContainer took {took:?}");
        container.remove().await?;
        std::fs::remove_file(container.log())?;
    }
    let begun = Instant::now();
    pod.stop().await?;
    let took = begun.elapsed();
    ensure!(took < STOP_TIME, "StopPodSandbox took {took:?}");
    pod.remove().await?;
    siege.end().await
}

/// Checks what the host reports of an attacker.
async fn judge(siege: &Siege, attack: &str, container: &Container) -> Result {
    match attack {
        "exits" => {
            let status = container.exited(siege.ctx.patience(20)).await?;
            ensure!(
                (0..=255).contains(&status.exit_code),
                "exit code {}",
                status.exit_code
            );
            ensure!(status.finished_at >= status.started_at, "{status:?}");
        }
        "logs" => {
            poll::until("the flood", siege.ctx.patience(20), || async {
                let bytes = std::fs::metadata(container.log())?.len();
                ensure!(bytes >= FLOOD_BYTES, "the log has {bytes} bytes");
                Ok(())
            })
            .await?;
        }
        "stats" => {
            let mut last = 0;
            for _ in 0..3 {
                // The limit of the call is short for an emulated guest on a busy machine.
                let asked = || container.stats();
                let stats = poll::until("statistics", siege.ctx.patience(10), asked).await?;
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
        _ => {
            let state = container.status().await?.state();
            same!(state, ContainerState::ContainerRunning, "the attacker");
        }
    }
    Ok(())
}

async fn silent_mounts_and_calls_end_with_their_pod(ctx: Context) -> Result {
    let siege = Siege::begin(ctx, "wallhang").await?;
    siege.arm("serve")?;
    let pod = Pod::run(&siege.node, "hangs").await?;
    let mut attackers = Vec::new();
    // The mount is last: from then on this program would wait for it, too.
    for name in ["errors", "hang", "fuse"] {
        attackers.push(attack(&siege, &pod, name).await?);
    }
    let trap = siege.node.dir.join("volume/trap");
    poll::until("the mount of the guest", siege.ctx.patience(10), || async {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        ensure!(mounts.contains(&trap.display().to_string()), "{mounts}");
        Ok(())
    })
    .await?;
    // A reader on the host waits for the guest. It must not wait longer than the pod lives.
    let reader = tokio::task::spawn_blocking(move || std::fs::read_dir(trap).map(drop));
    siege.measured(siege.check_neighbor("hang")).await??;
    // A guest that refuses or ignores a signal makes the call fail, which must not take longer.
    let stops = attackers.iter().map(|attacker| async move {
        let begun = Instant::now();
        drop(attacker.stop(1).await);
        (&attacker.config.log_path, begun.elapsed())
    });
    for (log, took) in siege.measured(futures::future::join_all(stops)).await? {
        let limit = STOP_TIME + Duration::from_secs(1);
        ensure!(took < limit, "{log}: StopContainer took {took:?}");
    }
    let begun = Instant::now();
    pod.stop().await?;
    let took = begun.elapsed();
    ensure!(took < STOP_TIME, "StopPodSandbox took {took:?}");
    pod.remove().await?;
    let read = tokio::time::timeout(STOP_TIME, reader).await;
    let read = read
        .map_err(std::io::Error::other)
        .during("a reader of the mount")??;
    ensure!(read.is_err(), "the mount was read");
    siege.end().await
}
