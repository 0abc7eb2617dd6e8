//! Warm VMs: a claimed one is the pod's in every respect, none serves twice, and none remains after the daemon, whether it
//! stopped or was killed. Each case has a dedicated node.

use crate::case;
use crate::failure::{During, Result};
use crate::namespaces::run;
use crate::node::Node;
use crate::pod::{Pod, pod_spec, pull};
use crate::process::{family, kill, pids};
use crate::runner::{Case, Context};
use crate::{ensure, poll, same};
use k8s_cri::v1::*;
use serde_json::json;
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(claimed_vms_become_ordinary_pods, 120),
        case!(killed_daemon_and_vms_leave_no_warm_vm, 120),
        case!(warm_vms_are_removed_under_memory_pressure, 120),
        case!(pods_that_no_warm_vm_fits_boot_cold, 120),
    ]
}

/// Number of VMs in most cases.
const POOL_SIZE: usize = 2;
/// Maximum distance of the available memory to the limit of a case that causes pressure. The libkrun suite beside this one takes
/// and frees up to 2 GiB within seconds (`resources::pod_without_limit_has_2_gib`).
const MAX_DISTANCE_BYTES: u64 = 2560 << 20;
/// Minimum of that distance: a waiting VM and the noise of the machine.
const MIN_DISTANCE_BYTES: u64 = 512 << 20;
/// Maximum difference between the clocks of a pod and the host.
const MAX_CLOCK_DIFFERENCE: Duration = Duration::from_secs(2);

async fn node(ctx: &Context, name: &str, pool: &str) -> Result<Arc<Node>> {
    let pool = format!("idle_seconds = 1\n{pool}");
    let node = ctx.dedicated_node(name, |o| o.pool = Some(pool)).await?;
    pull(&node, &ctx.images.base).await?;
    Ok(node)
}

/// Returns the ids of the bundles of VMs without a pod.
fn marked(node: &Node) -> Result<BTreeSet<String>> {
    let mut ids = BTreeSet::new();
    for entry in std::fs::read_dir(node.dir.join("state/s"))? {
        let entry = entry?;
        if entry.path().join("warm").exists() {
            ids.insert(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(ids)
}

/// Waits until `count` VMs wait and no other is being made or removed. Returns their ids.
pub(super) async fn waiting(ctx: &Context, node: &Node, count: usize) -> Result<BTreeSet<String>> {
    poll::until("warm VMs wait", ctx.patience(60), || async {
        let warm = node.metric("boxlite_pool_warm_vms").await?;
        ensure!(warm == count as u64, "{warm} instead of {count}");
        let ids = marked(node)?;
        same!(ids.len(), count, "marked bundles");
        Ok(ids)
    })
    .await
}

fn netns(node: &Node, id: &str) -> PathBuf {
    node.dir.join("state/netns").join(id)
}

/// Runs a command in a network namespace of the node.
fn inside(node: &Node, id: &str, args: &[&str]) -> Result<String> {
    let enter = format!("--net={}", netns(node, id).display());
    run("nsenter", &[&[enter.as_str()], args].concat())
}

/// Returns the cgroups of a process, one line per hierarchy.
fn cgroups(pid: i32) -> Result<String> {
    Ok(std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?)
}

async fn claimed_vms_become_ordinary_pods(ctx: Context) -> Result {
    let node = node(&ctx, "pool", &format!("size = {POOL_SIZE}")).await?;
    let first = waiting(&ctx, &node, POOL_SIZE).await?;
    for id in &first {
        let links = inside(&node, id, &["cat", "/proc/self/net/dev"])?;
        let mut names: Vec<_> = links
            .lines()
            .skip(2)
            .filter_map(|l| l.split_once(':'))
            .collect();
        names.retain(|(name, _)| name.trim() != "lo");
        same!(names.len(), 1, "interfaces of a waiting VM: {links}");
        same!(names[0].0.trim(), "tap0", "its interface");
        same!(
            inside(&node, id, &["ip", "route", "show", "table", "all"])?.contains("default"),
            false,
            "a route"
        );
        let shim = family(id)?.0;
        ensure!(!cgroups(shim)?.contains(&id[..12]), "in a pod's cgroup");
    }

    let mut pods = Vec::new();
    for name in ["warm-one", "warm-two"] {
        let mut config = pod_spec(&node, name);
        let linux = config.linux.get_or_insert_default();
        // One per pod: the shim that creates it removes it.
        linux.cgroup_parent = format!("/boxlite-e2e-{}-{name}", std::process::id());
        linux
            .sysctls
            .insert("net.ipv4.ip_default_ttl".into(), "77".into());
        pods.push(Pod::run_with(&node, config).await?);
    }
    let taken: BTreeSet<String> = pods.iter().map(|pod| pod.id.clone()).collect();
    same!(taken, first, "ids of the pods and of the VMs that waited");
    same!(
        node.metric("boxlite_pool_claims_total{result=\"hit\"}")
            .await?,
        2,
        "hits"
    );

    let mut random = BTreeSet::new();
    for pod in &pods {
        random.extend(check_pod(&ctx, pod).await?);
    }
    same!(random.len(), 6, "random numbers of two pods: {random:?}");

    let second = waiting(&ctx, &node, POOL_SIZE).await?;
    ensure!(second.is_disjoint(&first), "served twice: {second:?}");
    for pod in pods {
        pod.end().await?;
        ensure!(!netns(&node, &pod.id).exists(), "its namespace remains");
    }
    let third = Pod::run(&node, "third").await?;
    ensure!(
        second.contains(&third.id),
        "not from the pool: {}",
        third.id
    );
    third.end().await?;
    node.terminate().await?;
    same!(
        std::fs::read_dir(node.dir.join("state/s"))?.count(),
        0,
        "bundles after the daemon has stopped"
    );
    same!(
        std::fs::read_dir(node.dir.join("state/netns"))?.count(),
        0,
        "namespaces after the daemon has stopped"
    );
    Ok(())
}

/// Checks the settings of a claim, and returns three random values of the guest.
async fn check_pod(ctx: &Context, pod: &Pod) -> Result<Vec<String>> {
    let node = &pod.node;
    ensure!(
        !node.dir.join("state/s").join(&pod.id).join("warm").exists(),
        "the marker remains"
    );
    let c = pod
        .start(
            "c",
            &ctx.images.base,
            &["httpd", "-f", "-p", "80", "-h", "/var/www"],
        )
        .await?;
    let hostname = c.out(&["hostname"]).await?;
    same!(hostname.trim(), pod.config.hostname, "hostname");
    let ttl = c.out(&["cat", "/proc/sys/net/ipv4/ip_default_ttl"]).await?;
    same!(ttl.trim(), "77", "sysctl");
    let link = inside(node, &pod.id, &["ip", "-o", "link", "show", "eth0"])?;
    let mac = c.out(&["cat", "/sys/class/net/eth0/address"]).await?;
    ensure!(
        link.contains(mac.trim()),
        "MAC {mac:?} is not that of {link}"
    );
    let mtu = c.out(&["cat", "/sys/class/net/eth0/mtu"]).await?;
    ensure!(
        link.contains(&format!("mtu {} ", mtu.trim())),
        "MTU {mtu:?}: {link}"
    );
    super::network::served(&format!("{}:80", pod.ip().await?), ctx.patience(10)).await?;

    let before = SystemTime::now();
    let seconds: u64 = c.out(&["date", "+%s"]).await?.trim().parse()?;
    let guest = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let difference = guest
        .duration_since(before)
        .or_else(|_| before.duration_since(guest))?;
    ensure!(
        difference < MAX_CLOCK_DIFFERENCE + before.elapsed()?,
        "clocks differ by {difference:?}"
    );

    let (shim, below) = family(&pod.id)?;
    let linux = pod.config.linux.clone().unwrap_or_default();
    let end = format!("{}/boxlite-{}", linux.cgroup_parent, &pod.id[..12]);
    ensure!(!below.is_empty(), "no process below the shim");
    for pid in below.into_iter().chain([shim]) {
        let text = cgroups(pid)?;
        ensure!(
            text.lines().any(|line| line.ends_with(&end)),
            "process {pid} is not in {end}: {text}"
        );
    }
    let random = [
        c.out(&["cat", "/proc/sys/kernel/random/boot_id"]).await?,
        c.out(&["cat", "/proc/sys/kernel/random/uuid"]).await?,
        c.out(&["sh", "-c", "head -c 16 /dev/urandom | md5sum"])
            .await?,
    ];
    Ok(random.into())
}

async fn killed_daemon_and_vms_leave_no_warm_vm(ctx: Context) -> Result {
    let node = node(&ctx, "pkill", &format!("size = {POOL_SIZE}")).await?;
    let first = waiting(&ctx, &node, POOL_SIZE).await?;
    // A VM that dies while it waits is replaced.
    let victim = first.first().cloned().unwrap_or_default();
    for pid in family(&victim)?.1 {
        // The first one takes the others with it.
        let _ = kill(pid);
    }
    poll::until("the dead VM is removed", ctx.patience(30), || async {
        same!(
            node.metric("boxlite_pool_removals_total{reason=\"died\"}")
                .await?,
            1,
            "removals"
        );
        ensure!(!netns(&node, &victim).exists(), "its namespace remains");
        Ok(())
    })
    .await?;
    let second = waiting(&ctx, &node, POOL_SIZE).await?;
    ensure!(!second.contains(&victim), "the dead VM waits");

    node.kill().await?;
    for id in &second {
        ensure!(
            !pids(&["containerd-shim", id])?.is_empty(),
            "a shim ended with its daemon"
        );
    }
    node.serve().await?;
    for id in &second {
        same!(
            pids(&["containerd-shim", id])?,
            Vec::<i32>::new(),
            "VMs of the killed daemon"
        );
        ensure!(!netns(&node, id).exists(), "the namespace of {id} remains");
    }
    let third = waiting(&ctx, &node, POOL_SIZE).await?;
    ensure!(third.is_disjoint(&second), "adopted: {third:?}");
    let pod = Pod::run(&node, "pod").await?;
    ensure!(third.contains(&pod.id), "not from the pool: {}", pod.id);

    // The pod's VM is not the pool's any more: it survives the daemon.
    node.kill().await?;
    node.serve().await?;
    same!(
        pod.status().await?.state(),
        PodSandboxState::SandboxReady,
        "the pod"
    );
    same!(
        pod.sh(&ctx.images.base, "echo here").await?,
        "here\n",
        "a container"
    );
    pod.end().await?;
    node.terminate().await
}

async fn warm_vms_are_removed_under_memory_pressure(ctx: Context) -> Result {
    let available = boxlite_sys::proc_memory::meminfo("MemAvailable").unwrap_or_default();
    let distance = (available / 8).min(MAX_DISTANCE_BYTES);
    ensure!(
        distance >= MIN_DISTANCE_BYTES,
        "{available} bytes available"
    );
    let minimum = (available - distance) >> 20;
    let node = node(
        &ctx,
        "ppress",
        &format!("size = 1\nmin_available_mib = {minimum}"),
    )
    .await?;
    let id = waiting(&ctx, &node, 1).await?;
    // Of ones, so that every page exists.
    let memory = vec![1u8; usize::try_from(distance / 5 * 8)?];
    waiting(&ctx, &node, 0).await?;
    same!(
        node.metric("boxlite_pool_removals_total{reason=\"pressure\"}")
            .await?,
        1,
        "removals"
    );
    let config = node.dir.join("config.toml");
    let program = ctx.install.daemon.display().to_string();
    let text = run(
        &program,
        &["status", "--config", &config.display().to_string()],
    )?;
    ensure!(text.contains("not filled: memory pressure"), "{text}");
    same!(memory.last(), Some(&1), "the memory is in use");
    drop(memory);
    let again = waiting(&ctx, &node, 1).await?;
    ensure!(again.is_disjoint(&id), "removed and waiting: {id:?}");
    node.terminate().await
}

/// Adds a second interface beside that of the bridge plugin.
const SECOND: &str = "#!/bin/sh\n[ $CNI_COMMAND = ADD ] || exit 0\nenter=\"nsenter --net=$CNI_NETNS\"\n\
    $enter ip link add second type veth peer name other >&2 && $enter ip link set second up >&2\n";

async fn pods_that_no_warm_vm_fits_boot_cold(ctx: Context) -> Result {
    let dir = ctx.scratch.join("pool-bin");
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join("second"), SECOND)?;
    std::fs::set_permissions(dir.join("second"), std::fs::Permissions::from_mode(0o755))?;
    let leases = ctx.scratch.join("pool-ipam");
    let node = ctx
        .dedicated_node("pcold", |o| {
            o.pool = Some("size = 1\nidle_seconds = 1\nshapes = [\"1x2048\"]".into());
            o.vcpus = Some(1);
            o.cni_bin = Some(dir.clone());
            o.cni_plugins = Some(json!([
                {"type": "bridge", "bridge": "bxpool", "isGateway": true,
                 "ipam": {"type": "host-local", "dataDir": leases, "ranges": [[{"subnet": "10.89.78.0/24"}]]}},
                {"type": "second"}
            ]));
        })
        .await?;
    pull(&node, &ctx.images.base).await?;
    let waits = waiting(&ctx, &node, 1).await?;

    // Another size.
    let mut config = pod_spec(&node, "small");
    config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: 96 << 20,
        ..Default::default()
    });
    let small = Pod::run_with(&node, config).await?;
    ensure!(!waits.contains(&small.id), "a VM of another size");
    small.end().await?;
    same!(
        node.metric("boxlite_pool_claims_total{result=\"miss\"}")
            .await?,
        1,
        "misses"
    );

    // The number of interfaces is known after CNI's ADD, so this VM is lost.
    let waits = waiting(&ctx, &node, 1).await?;
    let pod = Pod::run(&node, "two").await?;
    ensure!(waits.contains(&pod.id), "not claimed: {}", pod.id);
    same!(
        node.metric("boxlite_pool_claims_total{result=\"failed\"}")
            .await?,
        1,
        "failed claims"
    );
    let links = pod.sh(&ctx.images.base, "ls /sys/class/net").await?;
    ensure!(
        links.contains("eth0") && links.contains("second"),
        "interfaces: {links}"
    );
    pod.end().await?;
    node.terminate().await.during("after a failed claim")
}
