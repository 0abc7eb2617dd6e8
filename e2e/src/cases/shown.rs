//! Mounts that containers make below Bidirectional volumes: on the host when the command has ended, with files that both
//! sides write, gone with umount, container, pod and a shim that is killed.

use super::volumes::{Tmpfs, home, mount, seen};
use crate::enclave::run;
use crate::outcome::Result;
use crate::pod::{Container, Pod, container_spec};
use crate::process::{family, kill, rss};
use crate::runner::{Case, Shared, case};
use crate::world::Home;
use crate::{ensure, same};
use k8s_cri::v1::*;
use nix::sys::signal::Signal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub fn cases() -> Vec<Case> {
    vec![
        case("shown::mounts_of_a_container_on_the_host", 120, mounts),
        case("shown::files_both_ways", 120, files),
        case("shown::a_killed_shim_leaves_no_mount", 120, killed),
        case("shown::a_guest_that_stops_answering", 300, stopped).not_in(
            Home::Krun,
            "a minute by its limits, and nothing of the VMM's",
        ),
    ]
}

/// Mounts of pods that the host has, by mount point.
fn shown(below: &Path) -> Result<Vec<PathBuf>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points = table
        .lines()
        .filter(|line| line.contains(" - fuse.boxlite "))
        .filter_map(|line| line.split(' ').nth(4).map(PathBuf::from));
    Ok(points.filter(|point| point.starts_with(below)).collect())
}

/// A privileged container with `dir` at /both.
async fn container(world: &Shared, pod: &Pod, name: &str, dir: &Path) -> Result<Container> {
    with_pids(world, pod, name, dir, NamespaceMode::Container).await
}

async fn with_pids(
    world: &Shared,
    pod: &Pod,
    name: &str,
    dir: &Path,
    pid: NamespaceMode,
) -> Result<Container> {
    let mut volume = mount(dir, "/both");
    volume.propagation = MountPropagation::PropagationBidirectional.into();
    let mut config = container_spec(name, &world.images.base, &["sleep", "1000"]);
    config.mounts = vec![volume];
    let linux = config.linux.get_or_insert_default();
    let security = linux.security_context.get_or_insert_default();
    security.privileged = true;
    let spaces = security.namespace_options.get_or_insert_default();
    spaces.pid = pid.into();
    pod.start_with(config).await
}

/// The host's look at a file of the guest, which a thread waits for.
async fn read(path: PathBuf) -> Result<String> {
    Ok(tokio::fs::read_to_string(path).await?)
}

async fn mounts(world: Shared) -> Result {
    let dir = home(&world, "shown")?;
    for name in ["memory", "deep/etc", "of-host", "left"] {
        std::fs::create_dir_all(dir.join(name))?;
    }
    let pod = Pod::run(&world.node, "shown").await?;
    let c = container(&world, &pod, "c", &dir).await?;
    same!(
        c.status().await?.mounts[0].propagation,
        MountPropagation::PropagationBidirectional as i32,
        "propagation in the status"
    );
    // What a command has mounted is there when the command has ended: nothing is waited for.
    let script = "mount -t tmpfs -o size=8m tmpfs /both/memory && echo guest > /both/memory/flag";
    c.out(&["sh", "-c", script]).await?;
    let memory = dir.join("memory");
    same!(read(memory.join("flag")).await?, "guest\n", "in the tmpfs");
    let script = "echo root > /etc/mark && mount --bind /etc /both/deep/etc";
    c.out(&["sh", "-c", script]).await?;
    let mark = dir.join("deep/etc/mark");
    same!(read(mark).await?, "root\n", "in the bind mount");
    same!(shown(&dir)?.len(), 2, "mounts on the host");

    // What the host mounts is seen by the container, as with HostToContainer.
    let of_host = Tmpfs::new(dir.join("of-host"), "size=1m")?;
    seen("the host's mount", || async {
        let flag = c.out(&["cat", "/both/of-host/flag"]).await?;
        same!(flag, "of the host\n", "flag");
        Ok(())
    })
    .await?;
    same!(shown(&dir)?.len(), 2, "the host's own is none of the pod's");

    // A mount that goes in the guest goes on the host, and is not busy because the host looked at it.
    c.out(&["umount", "/both/memory"]).await?;
    same!(shown(&dir)?, [dir.join("deep/etc")], "after umount");
    let left = std::fs::read_dir(&memory)?.count();
    same!(left, 0, "what the host has there");
    drop(of_host);

    // A container that goes with its mounts leaves none, and so does a pod, also where the host has a file open.
    let d = container(&world, &pod, "d", &dir).await?;
    let script = "mount -t tmpfs tmpfs /both/left && echo x > /both/left/open";
    d.out(&["sh", "-c", script]).await?;
    let open = std::fs::File::open(dir.join("left/open"))?;
    same!(shown(&dir)?.len(), 2, "mounts of two containers");
    c.stop(0).await?;
    seen("the end of a container", || async {
        same!(shown(&dir)?, [dir.join("left")], "mounts of the other one");
        Ok(())
    })
    .await?;
    pod.end().await?;
    same!(shown(&dir)?, [] as [PathBuf; 0], "after the pod");
    drop(open);
    Ok(())
}

async fn files(world: Shared) -> Result {
    let dir = home(&world, "files")?;
    let memory = dir.join("memory");
    std::fs::create_dir_all(&memory)?;
    let pod = Pod::run(&world.node, "files").await?;
    // It sees the agent: process 1 of the VM.
    let c = with_pids(&world, &pod, "c", &dir, NamespaceMode::Node).await?;
    let script = "mount -t tmpfs -o size=8m tmpfs /both/memory && echo guest > /both/memory/flag";
    c.out(&["sh", "-c", script]).await?;

    // Several messages each way.
    let big = memory.join("big");
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
    tokio::fs::write(&big, &bytes).await?;
    let back = tokio::fs::read(&big).await?;
    ensure!(back == bytes, "3 MB written by the host are read by it");
    let sum = c.out(&["sha256sum", "/both/memory/big"]).await?;
    let path = big.display().to_string();
    let expected = run("sha256sum", &[&path])?;
    same!(
        sum.split(' ').next(),
        expected.split(' ').next(),
        "3 MB written by the host, seen in the pod"
    );
    run("chown", &["7:8", &path])?;
    let link = memory.join("link").display().to_string();
    run("ln", &["-s", "flag", &link])?;
    let script = "stat -c %u:%g /both/memory/big; cat /both/memory/link";
    same!(
        c.out(&["sh", "-c", script]).await?,
        "7:8\nguest\n",
        "owner and link made on the host"
    );
    tokio::fs::remove_file(&big).await?;
    same!(
        c.out(&["ls", "/both/memory"]).await?,
        "flag\nlink\n",
        "after the host removed a file"
    );
    // What the host has looked at and does not use is forgotten, now and then: the agent has a descriptor for each file until
    // then. After a thousand the shim sees to it.
    let script = "mkdir /both/memory/many && cd /both/memory/many && seq 2000 | xargs touch";
    c.out(&["sh", "-c", script]).await?;
    let many = memory.join("many").display().to_string();
    let listed = run("ls", &["-l", &many])?;
    same!(listed.lines().count(), 2001, "lines of a long list");
    let open = c.out(&["sh", "-c", "ls /proc/1/fd | wc -l"]).await?;
    let open: usize = open.trim().parse()?;
    ensure!(open < 1700, "{open} descriptors of the agent");
    // And what the guest writes, the host sees soon.
    c.out(&["sh", "-c", "echo again > /both/memory/flag"])
        .await?;
    seen("a write of the guest", || async {
        same!(read(memory.join("flag")).await?, "again\n", "the file");
        Ok(())
    })
    .await?;
    pod.end().await
}

async fn killed(world: Shared) -> Result {
    let dir = home(&world, "killed")?;
    std::fs::create_dir_all(dir.join("memory"))?;
    let pod = Pod::run(&world.node, "killed").await?;
    let c = container(&world, &pod, "c", &dir).await?;
    c.out(&["mount", "-t", "tmpfs", "tmpfs", "/both/memory"])
        .await?;
    same!(shown(&dir)?.len(), 1, "mounts on the host");
    kill(family(&pod.id)?.0)?;
    pod.end().await?;
    same!(shown(&dir)?, [] as [PathBuf; 0], "after the pod");
    Ok(())
}

/// How long a reader of the host may wait for a guest that does not answer: the shim takes a connection for broken that has been
/// silent for a minute. And how long the shim needs to find out that the guest does not end by itself.
const SILENCE: Duration = Duration::from_secs(75);
const STOP: Duration = Duration::from_secs(90);

/// Signals the process that is the VM.
fn signal_vm(pod: &Pod, signal: Signal) -> Result {
    let below = family(&pod.id)?.1;
    let vm = below.into_iter().max_by_key(|pid| rss(*pid));
    let vm = nix::unistd::Pid::from_raw(vm.unwrap_or_default());
    Ok(nix::sys::signal::kill(vm, signal)?)
}

/// Reads a file in a process of its own, which nothing but the answer can end; answers how long it took, and what came.
async fn patient(file: &Path) -> Result<(Duration, std::process::Output)> {
    let began = Instant::now();
    let output = tokio::process::Command::new("cat").arg(file).output();
    let output = tokio::time::timeout(SILENCE + STOP, output).await;
    Ok((began.elapsed(), output??))
}

/// Two VMs that stand still use no processor: what takes its minute for both goes on at one time.
async fn stopped(world: Shared) -> Result {
    let (first, second) = (
        mounted(&world, "away").await?,
        mounted(&world, "hung").await?,
    );
    tokio::try_join!(comes_back(first), ends(second)).map(drop)
}

/// A pod with a mount on the host, and a file in it.
async fn mounted(world: &Shared, name: &str) -> Result<(Pod, PathBuf)> {
    let dir = home(world, name)?;
    std::fs::create_dir_all(dir.join("memory"))?;
    let pod = Pod::run(&world.node, name).await?;
    let c = container(world, &pod, "c", &dir).await?;
    let script = "mount -t tmpfs tmpfs /both/memory && echo here > /both/memory/flag";
    c.out(&["sh", "-c", script]).await?;
    let flag = dir.join("memory/flag");
    same!(read(flag.clone()).await?, "here\n", "before");
    Ok((pod, flag))
}

/// Who reads gets an error in time. The VM has been away, no more: connection and mount are made anew.
async fn comes_back((pod, flag): (Pod, PathBuf)) -> Result {
    signal_vm(&pod, Signal::SIGSTOP)?;
    let (waited, output) = patient(&flag).await?;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let refused = !output.status.success() && waited < SILENCE;
    ensure!(refused, "{waited:?}: {words}");
    signal_vm(&pod, Signal::SIGCONT)?;
    let again = Duration::from_secs(30);
    crate::wait::until("the mount is there again", again, || async {
        same!(read(flag.clone()).await?, "here\n", "the file");
        Ok(())
    })
    .await?;
    pod.end().await
}

/// The pod ends while somebody waits for it, and with it the waiting.
async fn ends((pod, flag): (Pod, PathBuf)) -> Result {
    signal_vm(&pod, Signal::SIGSTOP)?;
    let point = flag.parent().map(Path::to_owned).unwrap_or_default();
    let reading = tokio::spawn(async move { patient(&flag).await });
    let began = Instant::now();
    pod.end().await?;
    let took = began.elapsed();
    ensure!(took < STOP, "removed after {took:?}");
    same!(shown(&point)?, [] as [PathBuf; 0], "after the pod");
    let (_, output) = reading.await??;
    ensure!(!output.status.success(), "read {:?}", output.stdout);
    Ok(())
}
