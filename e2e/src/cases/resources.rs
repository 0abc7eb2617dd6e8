//! Limits of pods whose host cgroup is exactly as large as the containers' limits, as a kubelet without RuntimeClass overhead
//! makes it. The guest's limit must act first: a container is OOM-killed, its neighbor and the VM survive. Also the limit of
//! processes, memory that the guest frees, and a full disk of the node below the writable layers.

use crate::context::Backend;
use crate::failure::Result;
use crate::pod::{Container, Pod, container_spec, pod_spec, pull};
use crate::process::{family, guest_ram, pss};
use crate::runner::{Case, Context};
use crate::{case, ensure, poll, same};
use k8s_cri::v1::*;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(limit_of_32_mib_acts_in_the_guest, 90),
        case!(limit_of_64_mib_acts_in_the_guest, 90),
        case!(limit_of_256_mib_acts_in_the_guest, 120),
        case!(limit_of_1_gib_acts_in_the_guest, 180),
        case!(pod_without_limit_has_2_gib, 90),
        case!(process_limit_acts_in_the_guest, 90),
        case!(small_cpu_limit_acts_in_the_guest, 60),
        case!(freed_memory_returns_to_the_host, 120)
            .not_on(Backend::Krun, "not yet seen to pass under nested emulation"),
        case!(idle_pod_of_2_gib_costs_little_more, 120),
        case!(full_disk_of_the_node_fails_fsync_only, 120),
    ]
}

/// Limit of the container that must survive.
const NEIGHBOR_MIB: i64 = 8;

/// Most data written to the scratch disk.
const MAX_WRITTEN_MIB: i64 = 128;

/// podPidsLimit of a pod; the VM's processes count to the same cgroup.
const MAX_PROCESSES: usize = 256;
/// RAM of a VM that has freed its memory, in bytes.
const MAX_IDLE_BYTES: u64 = 150 << 20;
/// Maximum difference in cost of idle pods of 2 GiB and 256 MiB, in MiB. Page structures are 28 of them (1/64).
const MAX_SIZE_COST_MIB: u64 = 48;
/// Time after which an idle guest has reported its free pages.
const SETTLE_TIME: Duration = Duration::from_secs(10);
/// Time in which freed memory returns to the host, in seconds.
const RETURN_SECONDS: u64 = 30;

/// Cgroup of a QoS class with one pod, removed at the end.
struct HostCgroup {
    /// Directory of the class in the hierarchy of the limited resource.
    class: PathBuf,
    /// Name of the pod's cgroup, as a kubelet passes it.
    name: String,
}

impl HostCgroup {
    fn with_memory(name: &str, limit_mib: i64) -> Result<Self> {
        let limit = (limit_mib << 20).to_string();
        Self::create(name, "memory", memory_file(), &limit)
    }

    fn create(name: &str, controller: &str, file: &str, limit: &str) -> Result<Self> {
        let v2 = cgroup_v2();
        let mount = match v2 {
            true => PathBuf::from("/sys/fs/cgroup"),
            false => Path::new("/sys/fs/cgroup").join(controller),
        };
        let class = format!("boxlite-e2e-{}-{name}", std::process::id());
        let cgroup = Self {
            class: mount.join(&class),
            name: format!("/{class}/podx"),
        };
        let pod = cgroup.class.join("podx");
        std::fs::create_dir_all(&pod)?;
        if v2 {
            for parent in [&mount, &cgroup.class] {
                std::fs::write(
                    parent.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                )?;
            }
        }
        std::fs::write(pod.join(file), limit)?;
        Ok(cgroup)
    }

    /// Expects every process of the VM in the cgroup `name` beside the pod's in the hierarchy of `controller`.
    fn expect_vm_in(&self, name: &str, controller: &str, pod: &Pod) -> Result {
        let end = format!(
            "/{}/{name}",
            self.class.file_name().unwrap_or_default().display()
        );
        let (shim, below) = family(&pod.id)?;
        for pid in below.into_iter().chain([shim]) {
            let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
            let line = text.lines().find(|line| match cgroup_v2() {
                true => line.starts_with("0::"),
                false => line
                    .split(':')
                    .nth(1)
                    .is_some_and(|names| names.split(',').any(|name| name == controller)),
            });
            ensure!(
                line.is_some_and(|line| line.ends_with(&end)),
                "process {pid}: {text}"
            );
        }
        Ok(())
    }

    /// Returns the content of a file of the cgroup `name` beside the pod's, or of the pod's, `podx`.
    fn read(&self, name: &str, file: &str) -> Result<String> {
        let text = std::fs::read_to_string(self.class.join(name).join(file))?;
        Ok(text.trim().to_owned())
    }

    /// Returns the names of the cgroups beside the pod's.
    fn beside(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.class)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_dir() && name != "podx" {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Returns the name of the VM's cgroup, the only one beside the pod's.
    fn vm_beside(&self) -> Result<String> {
        let beside = self.beside()?;
        ensure!(
            beside.len() == 1 && beside[0].starts_with("boxlite-"),
            "cgroups beside the pod's: {beside:?}"
        );
        Ok(beside[0].clone())
    }
}

fn cgroup_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// Returns the file with a cgroup's memory limit.
fn memory_file() -> &'static str {
    match cgroup_v2() {
        true => "memory.max",
        false => "memory.limit_in_bytes",
    }
}

impl Drop for HostCgroup {
    fn drop(&mut self) {
        // The shim may have created the class in the other hierarchies of v1; it removes those itself.
        let _ = std::fs::remove_dir(self.class.join("podx"));
        let _ = std::fs::remove_dir(&self.class);
    }
}

fn limit(mib: i64) -> Option<LinuxContainerResources> {
    Some(LinuxContainerResources {
        memory_limit_in_bytes: mib << 20,
        ..Default::default()
    })
}

async fn limit_of_32_mib_acts_in_the_guest(ctx: Context) -> Result {
    limit_acts_in_the_guest(ctx, 32).await
}

async fn limit_of_64_mib_acts_in_the_guest(ctx: Context) -> Result {
    limit_acts_in_the_guest(ctx, 64).await
}

async fn limit_of_256_mib_acts_in_the_guest(ctx: Context) -> Result {
    limit_acts_in_the_guest(ctx, 256).await
}

async fn limit_of_1_gib_acts_in_the_guest(ctx: Context) -> Result {
    limit_acts_in_the_guest(ctx, 1024).await
}

async fn limit_acts_in_the_guest(ctx: Context, mib: i64) -> Result {
    let name = format!("limit{mib}");
    let host = HostCgroup::with_memory(&name, mib)?;
    let mut config = pod_spec(&ctx.node, &name);
    let linux = config.linux.get_or_insert_default();
    linux.cgroup_parent.clone_from(&host.name);
    linux.resources = limit(mib);
    linux.security_context = Some(LinuxSandboxSecurityContext {
        privileged: true,
        ..Default::default()
    });
    let pod = Pod::run_with(&ctx.node, config).await?;
    let beside = host.vm_beside()?;
    host.expect_vm_in(&beside, "memory", &pod)?;
    let read = |name: &str| -> Result<i64> { Ok(host.read(name, memory_file())?.parse()?) };
    let (of_vm, of_pod) = (read(&beside)?, read("podx")?);
    ensure!(
        of_vm > of_pod + (128 << 20),
        "limits: VM {of_vm}, pod {of_pod}"
    );
    // As with a kubelet, the containers' limits add up to the pod's.
    let mut calm = container_spec("calm", &ctx.images.base, &["sleep", "1000"]);
    calm.linux.get_or_insert_default().resources = limit(NEIGHBOR_MIB);
    let neighbor = pod.start_with(calm).await?;
    let mib = mib - NEIGHBOR_MIB;

    // Page cache is reclaimed: twice a small limit is written without a kill. Not more: the suite's scratch disks are on tmpfs,
    // whose pages, unlike those of a disk, count to the VM's cgroup until the file is removed.
    let script = format!(
        "dd if=/dev/zero of=/file bs=1M count={} && rm /file",
        (2 * mib).min(MAX_WRITTEN_MIB)
    );
    let mut writer = container_spec("writer", &ctx.images.base, &["sh", "-c", &script]);
    writer.linux.get_or_insert_default().resources = limit(mib);
    let status = pod.start_with(writer).await?;
    let status = status.exited(ctx.patience(90)).await?;
    same!(
        (status.exit_code, status.reason.as_str()),
        (0, "Completed"),
        "writer"
    );

    // Anonymous memory and tmpfs are not.
    let tmpfs = format!(
        "mkdir /m && mount -t tmpfs -o size={}m t /m && cat /dev/zero > /m/file",
        2 * mib
    );
    for (name, script) in [("anonymous", "tail /dev/zero"), ("tmpfs", tmpfs.as_str())] {
        let mut greedy = container_spec(name, &ctx.images.base, &["sh", "-c", script]);
        let linux = greedy.linux.get_or_insert_default();
        linux.resources = limit(mib);
        linux.security_context = Some(LinuxContainerSecurityContext {
            privileged: name == "tmpfs",
            ..Default::default()
        });
        let status = pod.start_with(greedy).await?;
        let status = status.exited(ctx.patience(120)).await?;
        same!(status.reason.as_str(), "OOMKilled", "{name}");
        same!(status.exit_code, 137, "{name}");
    }
    same!(
        neighbor.status().await?.state(),
        ContainerState::ContainerRunning,
        "the neighbor"
    );
    same!(neighbor.out(&["echo", "alive"]).await?, "alive\n", "the VM");
    pod.end().await?;
    same!(host.beside()?, Vec::<String>::new(), "cgroups left beside");
    Ok(())
}

async fn pod_without_limit_has_2_gib(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "unlimited").await?;
    let script =
        "dd if=/dev/zero of=/dev/null bs=1500M count=1 2>&1 | tail -n 1 | cut -d \" \" -f 1";
    let text = pod.sh(&ctx.images.base, script).await?;
    same!(text.trim(), "1+0", "blocks of 1500 MiB held in memory");
    pod.end().await
}

/// A fork bomb ends at podPidsLimit; the neighbor and the VM survive.
async fn process_limit_acts_in_the_guest(ctx: Context) -> Result {
    let host = HostCgroup::create("pids", "pids", "pids.max", &MAX_PROCESSES.to_string())?;
    let mut config = pod_spec(&ctx.node, "pids");
    config
        .linux
        .get_or_insert_default()
        .cgroup_parent
        .clone_from(&host.name);
    let pod = Pod::run_with(&ctx.node, config).await?;
    let neighbor = pod
        .start("calm", &ctx.images.base, &["sleep", "1000"])
        .await?;
    // A shell that cannot fork exits.
    let script = "n=0; while true; do sleep 1000 & n=$((n+1)); echo $n; done";
    let bomb = pod
        .start("bomb", &ctx.images.base, &["sh", "-c", script])
        .await?;
    let status = bomb.exited(ctx.patience(60)).await?;
    ensure!(
        status.exit_code != 0,
        "the shell was never refused a process"
    );
    let output = bomb.output()?;
    let started = output
        .lines()
        .filter_map(|line| line.parse::<usize>().ok())
        .max();
    ensure!(
        started.is_some_and(|n| n > MAX_PROCESSES / 2 && n < MAX_PROCESSES),
        "processes started with a limit of {MAX_PROCESSES}: {started:?}"
    );
    same!(neighbor.out(&["echo", "alive"]).await?, "alive\n", "the VM");
    pod.end().await
}

/// A VM boots in its usual time although the pod's CPU limit is that of its containers, a tenth of a CPU.
async fn small_cpu_limit_acts_in_the_guest(ctx: Context) -> Result {
    let (file, limit, of_vm) = match cgroup_v2() {
        true => ("cpu.max", "10000 100000", "100000 100000"),
        false => ("cpu.cfs_quota_us", "10000", "100000"),
    };
    let host = HostCgroup::create("cpu", "cpu", file, limit)?;
    let resources = Some(LinuxContainerResources {
        cpu_shares: 102,
        cpu_quota: 10_000,
        cpu_period: 100_000,
        ..Default::default()
    });
    let mut config = pod_spec(&ctx.node, "cpu");
    let linux = config.linux.get_or_insert_default();
    linux.cgroup_parent.clone_from(&host.name);
    linux.resources.clone_from(&resources);
    let pod = Pod::run_with(&ctx.node, config).await?;
    let beside = host.vm_beside()?;
    host.expect_vm_in(&beside, "cpu", &pod)?;
    same!(host.read(&beside, file)?, of_vm, "limit of the VM");
    let mut spec = container_spec("limited", &ctx.images.base, &["sleep", "1000"]);
    spec.linux.get_or_insert_default().resources = resources;
    let limited = pod.start_with(spec).await?;
    let text = limited.out(&["cat", "/sys/fs/cgroup/cpu.max"]).await?;
    same!(text, "10000 100000\n", "limit of the container");
    pod.end().await?;
    same!(host.beside()?, Vec::<String>::new(), "cgroups left beside");
    Ok(())
}

/// A pod that touched 1 GiB and freed it occupies little of the host's memory again.
async fn freed_memory_returns_to_the_host(ctx: Context) -> Result {
    // The guest reports at most 64 MiB/s, its untouched memory after the boot included.
    let mut config = pod_spec(&ctx.node, "freed");
    config.linux.get_or_insert_default().resources = limit(1200);
    let pod = Pod::run_with(&ctx.node, config).await?;
    let (shim, below) = family(&pod.id)?;
    let ram = || {
        below
            .iter()
            .map(|pid| guest_ram(*pid))
            .max()
            .unwrap_or_default()
    };
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    let before = ram();
    // busybox's dd fills one buffer of this size and frees it at its end.
    // Touching memory takes long under nested emulation.
    let mib = ctx.rounds(1024, 192);
    let fill =
        format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1 && echo full >&2 && sleep 1");
    let touched = tokio::spawn({
        let c = c.clone();
        async move { c.out(&["sh", "-c", &fill]).await }
    });
    let limit = ctx.patience(60);
    poll::until("the RAM is touched", limit, || async {
        ensure!(
            ram() > before + ((mib as u64 * 7 / 8) << 20),
            "{} MiB",
            ram() >> 20
        );
        Ok(())
    })
    .await?;
    touched.await??;
    let since = std::time::Instant::now();
    poll::until(
        "the memory has returned",
        ctx.patience(RETURN_SECONDS),
        || async {
            ensure!(
                ram() < MAX_IDLE_BYTES,
                "{} MiB, idle {} MiB",
                ram() >> 20,
                before >> 20
            );
            Ok(())
        },
    )
    .await?;
    println!(
        "    RAM of the VM (shim {shim}): {} MiB idle, {} MiB {:?} after {mib} MiB were freed",
        before >> 20,
        ram() >> 20,
        since.elapsed()
    );
    pod.end().await
}

/// Cost of an idle pod with one container, in MiB.
#[derive(Debug)]
struct IdleCost {
    /// Proportional set size of all processes of the VM.
    pss: u64,
    /// Memory charged to the VM's cgroup.
    charged: u64,
    /// Resident RAM of the guest.
    ram: u64,
}

async fn idle_cost(ctx: &Context, name: &str, limit_mib: Option<i64>) -> Result<IdleCost> {
    // A limit that holds any VM, so that all is charged to the pod's cgroup.
    let host = HostCgroup::with_memory(name, 8192)?;
    let mut config = pod_spec(&ctx.node, name);
    let linux = config.linux.get_or_insert_default();
    linux.cgroup_parent.clone_from(&host.name);
    linux.resources = limit_mib.and_then(limit);
    let pod = Pod::run_with(&ctx.node, config).await?;
    pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    tokio::time::sleep(SETTLE_TIME).await;
    let (shim, below) = family(&pod.id)?;
    let usage = match cgroup_v2() {
        true => "memory.current",
        false => "memory.usage_in_bytes",
    };
    let charged = std::fs::read_to_string(host.class.join("podx").join(usage))?;
    let charged: u64 = charged.trim().parse()?;
    let cost = IdleCost {
        pss: below
            .iter()
            .chain([&shim])
            .map(|pid| pss(*pid))
            .sum::<u64>()
            >> 10,
        charged: charged >> 20,
        ram: below
            .iter()
            .map(|pid| guest_ram(*pid))
            .max()
            .unwrap_or_default()
            >> 20,
    };
    pod.end().await?;
    Ok(cost)
}

async fn idle_pod_of_2_gib_costs_little_more(ctx: Context) -> Result {
    let small = idle_cost(&ctx, "idle256", Some(256)).await?;
    let large = idle_cost(&ctx, "idle2048", None).await?;
    println!("    idle pods in MiB: limit 256: {small:?}, without limit: {large:?}");
    for (name, small, large) in [
        ("Pss", small.pss, large.pss),
        ("charged memory", small.charged, large.charged),
        ("RAM", small.ram, large.ram),
    ] {
        ensure!(
            large <= small + MAX_SIZE_COST_MIB,
            "{name} of an idle pod: {large} MiB without limit, {small} MiB with 256"
        );
    }
    Ok(())
}

/// Writes and syncs a file of `mib` MiB in a container's root; returns the exit code and the errors.
async fn fill(container: &Container, mib: u32) -> Result<(i32, String)> {
    let script = format!("dd if=/dev/zero of=/root/big bs=1M count={mib} conv=fsync");
    let done = container.exec(&["sh", "-c", &script]).await?;
    let errors = String::from_utf8_lossy(&done.stderr).into_owned();
    Ok((done.exit_code, errors))
}

async fn full_disk_of_the_node_fails_fsync_only(ctx: Context) -> Result {
    let node = ctx.dedicated_node("fulldisk", |_| {}).await?;
    pull(&node, &ctx.images.base).await?;
    let scratch = node.dir.join("root/scratch").display().to_string();
    crate::namespaces::run(
        "mount",
        &["-t", "tmpfs", "-o", "size=64m", "tmpfs", &scratch],
    )?;
    let pod = Pod::run(&node, "fulldisk").await?;
    let writer = pod
        .start("writer", &ctx.images.base, &["sleep", "1000"])
        .await?;
    let other = pod
        .start("other", &ctx.images.base, &["sleep", "1000"])
        .await?;
    let (code, errors) = fill(&writer, 150).await?;
    ensure!(
        code != 0 && (errors.contains("Input/output error") || errors.contains("No space")),
        "150 MiB on a disk of 64 MiB: exit code {code}, {errors}"
    );
    same!(other.out(&["echo", "alive"]).await?, "alive\n", "output");
    crate::namespaces::run("mount", &["-o", "remount,size=512m", &scratch])?;
    for container in [&writer, &other] {
        // The kernel reports an earlier failed write-back by the next fsync of the file, once.
        crate::poll::until("writing after room was made", ctx.patience(20), || async {
            let (code, errors) = fill(container, 100).await?;
            same!(code, 0, "writing after room was made: {errors}");
            Ok(())
        })
        .await?;
    }
    let new = pod
        .start("new", &ctx.images.base, &["sleep", "1000"])
        .await?;
    same!(fill(&new, 50).await?.0, 0, "writing in a new container");
    pod.end().await?;
    crate::namespaces::run("umount", &["-l", &scratch]).map(drop)
}
