//! Mounts made by containers below Bidirectional volumes: they are on the host when the command has ended, both sides
//! can write files, and they are removed by umount and with the container, the pod and a killed shim.

use super::volumes::{Tmpfs, eventually, mount, volume_dir};
use crate::case;
use crate::context::Backend;
use crate::failure::Result;
use crate::namespaces::run;
use crate::pod::{Container, Pod, container_spec};
use crate::process::{family, kill, rss};
use crate::runner::{Case, Context};
use crate::{ensure, same};
use k8s_cri::v1::*;
use nix::sys::signal::Signal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(container_mounts_appear_on_the_host, 120),
        case!(files_are_shared_both_ways, 120),
        case!(killed_shim_leaves_no_mount, 120),
        case!(unresponsive_guest_does_not_block_readers, 300).not_on(
            Backend::Krun,
            "its limits take a minute, and it does not depend on the VMM",
        ),
    ]
}

/// Returns the mount points of exported mounts on the host.
fn exported_mounts(below: &Path) -> Result<Vec<PathBuf>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points = boxlite_sys::mountinfo::mounts(&table)
        .filter(|mount| mount.kind == "fuse.boxlite")
        .map(|mount| mount.point);
    Ok(points.filter(|point| point.starts_with(below)).collect())
}

/// Starts a privileged container with `dir` at /both.
async fn container(ctx: &Context, pod: &Pod, name: &str, dir: &Path) -> Result<Container> {
    with_pids(ctx, pod, name, dir, NamespaceMode::Container).await
}

async fn with_pids(
    ctx: &Context,
    pod: &Pod,
    name: &str,
    dir: &Path,
    pid: NamespaceMode,
) -> Result<Container> {
    let mut volume = mount(dir, "/both");
    volume.propagation = MountPropagation::PropagationBidirectional.into();
    let mut config = container_spec(name, &ctx.images.base, &["sleep", "1000"]);
    config.mounts = vec![volume];
    let linux = config.linux.get_or_insert_default();
    let security = linux.security_context.get_or_insert_default();
    security.privileged = true;
    let spaces = security.namespace_options.get_or_insert_default();
    spaces.pid = pid.into();
    pod.start_with(config).await
}

/// Reads a guest file on the host, in a blocking thread.
async fn read(path: PathBuf) -> Result<String> {
    Ok(tokio::fs::read_to_string(path).await?)
}

async fn container_mounts_appear_on_the_host(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "exported")?;
    for name in ["memory", "deep/etc", "of-host", "left"] {
        std::fs::create_dir_all(dir.join(name))?;
    }
    let pod = Pod::run(&ctx.node, "exported").await?;
    let c = container(&ctx, &pod, "c", &dir).await?;
    same!(
        c.status().await?.mounts[0].propagation,
        MountPropagation::PropagationBidirectional as i32,
        "propagation in the status"
    );
    // A command's mounts are on the host when the command has ended, without waiting.
    let script = "mount -t tmpfs -o size=8m tmpfs /both/memory && echo guest > /both/memory/flag";
    c.out(&["sh", "-c", script]).await?;
    let memory = dir.join("memory");
    same!(read(memory.join("flag")).await?, "guest\n", "in the tmpfs");
    let script = "echo root > /etc/mark && mount --bind /etc /both/deep/etc";
    c.out(&["sh", "-c", script]).await?;
    let mark = dir.join("deep/etc/mark");
    same!(read(mark).await?, "root\n", "in the bind mount");
    same!(exported_mounts(&dir)?.len(), 2, "mounts on the host");

    // Mounts made by the host are seen in the container, as with HostToContainer.
    let of_host = Tmpfs::new(dir.join("of-host"), "size=1m")?;
    eventually("the host's mount", || async {
        let flag = c.out(&["cat", "/both/of-host/flag"]).await?;
        same!(flag, "of the host\n", "flag");
        Ok(())
    })
    .await?;
    same!(
        exported_mounts(&dir)?.len(),
        2,
        "the host's own mount is not exported"
    );

    // A mount removed in the guest is removed on the host, and is not busy because the host read from it.
    c.out(&["umount", "/both/memory"]).await?;
    same!(
        exported_mounts(&dir)?,
        [dir.join("deep/etc")],
        "after umount"
    );
    let left = std::fs::read_dir(&memory)?.count();
    same!(left, 0, "files on the host");
    drop(of_host);

    // A container with mounts leaves none behind, nor does a pod, even while the host has a file open.
    let d = container(&ctx, &pod, "d", &dir).await?;
    let script = "mount -t tmpfs tmpfs /both/left && echo x > /both/left/open";
    d.out(&["sh", "-c", script]).await?;
    let open = std::fs::File::open(dir.join("left/open"))?;
    same!(exported_mounts(&dir)?.len(), 2, "mounts of two containers");
    c.stop(0).await?;
    eventually("the end of a container", || async {
        same!(
            exported_mounts(&dir)?,
            [dir.join("left")],
            "mounts of the other one"
        );
        Ok(())
    })
    .await?;
    pod.end().await?;
    same!(exported_mounts(&dir)?, [] as [PathBuf; 0], "after the pod");
    drop(open);
    Ok(())
}

async fn files_are_shared_both_ways(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "files")?;
    let memory = dir.join("memory");
    std::fs::create_dir_all(&memory)?;
    let pod = Pod::run(&ctx.node, "files").await?;
    // The container sees the agent, process 1 of the VM.
    let c = with_pids(&ctx, &pod, "c", &dir, NamespaceMode::Node).await?;
    let script = "mount -t tmpfs -o size=8m tmpfs /both/memory && echo guest > /both/memory/flag";
    c.out(&["sh", "-c", script]).await?;

    // Larger than one message in each direction.
    let big = memory.join("big");
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
    tokio::fs::write(&big, &bytes).await?;
    let back = tokio::fs::read(&big).await?;
    ensure!(
        back == bytes,
        "3 MB written by the host are read back on the host"
    );
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
    // Files that the host has accessed and no longer uses are forgotten from time to time, since the agent holds a
    // descriptor for each. The shim does so after a thousand.
    let script = "mkdir /both/memory/many && cd /both/memory/many && seq 2000 | xargs touch";
    c.out(&["sh", "-c", script]).await?;
    let many = memory.join("many").display().to_string();
    let listed = run("ls", &["-l", &many])?;
    same!(listed.lines().count(), 2001, "lines of a long list");
    let open = c.out(&["sh", "-c", "ls /proc/1/fd | wc -l"]).await?;
    let open: usize = open.trim().parse()?;
    ensure!(open < 1700, "{open} descriptors of the agent");
    // The host soon sees changes made by the guest.
    c.out(&["sh", "-c", "echo again > /both/memory/flag"])
        .await?;
    eventually("a write of the guest", || async {
        same!(read(memory.join("flag")).await?, "again\n", "the file");
        Ok(())
    })
    .await?;
    pod.end().await
}

async fn killed_shim_leaves_no_mount(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "killed")?;
    std::fs::create_dir_all(dir.join("memory"))?;
    let pod = Pod::run(&ctx.node, "killed").await?;
    let c = container(&ctx, &pod, "c", &dir).await?;
    c.out(&["mount", "-t", "tmpfs", "tmpfs", "/both/memory"])
        .await?;
    same!(exported_mounts(&dir)?.len(), 1, "mounts on the host");
    kill(family(&pod.id)?.0)?;
    pod.end().await?;
    same!(exported_mounts(&dir)?, [] as [PathBuf; 0], "after the pod");
    Ok(())
}

/// Limit for a reader on the host when the guest does not answer: the shim treats a connection as broken after a minute
/// of silence, and needs some time to notice that the guest does not end by itself.
const READ_TIMEOUT: Duration = Duration::from_secs(75);
const STOP_TIMEOUT: Duration = Duration::from_secs(90);

/// Sends a signal to the VM's process.
fn signal_vm(pod: &Pod, signal: Signal) -> Result {
    let below = family(&pod.id)?.1;
    let vm = below.into_iter().max_by_key(|pid| rss(*pid));
    let vm = nix::unistd::Pid::from_raw(vm.unwrap_or_default());
    Ok(nix::sys::signal::kill(vm, signal)?)
}

/// Reads a file in a separate process, which only the answer can unblock. Returns the duration and the output.
async fn timed_read(file: &Path) -> Result<(Duration, std::process::Output)> {
    let began = Instant::now();
    let output = tokio::process::Command::new("cat").arg(file).output();
    let output = tokio::time::timeout(READ_TIMEOUT + STOP_TIMEOUT, output).await;
    Ok((began.elapsed(), output??))
}

/// Two stopped VMs use no CPU, so both waits of a minute run at the same time.
async fn unresponsive_guest_does_not_block_readers(ctx: Context) -> Result {
    let (first, second) = (mounted(&ctx, "away").await?, mounted(&ctx, "hung").await?);
    tokio::try_join!(
        recovers_after_stop(first),
        returns_when_the_pod_ends(second)
    )
    .map(drop)
}

/// Runs a pod with an exported mount and a file in it.
async fn mounted(ctx: &Context, name: &str) -> Result<(Pod, PathBuf)> {
    let dir = volume_dir(ctx, name)?;
    std::fs::create_dir_all(dir.join("memory"))?;
    let pod = Pod::run(&ctx.node, name).await?;
    let c = container(ctx, &pod, "c", &dir).await?;
    let script = "mount -t tmpfs tmpfs /both/memory && echo here > /both/memory/flag";
    c.out(&["sh", "-c", script]).await?;
    let flag = dir.join("memory/flag");
    same!(read(flag.clone()).await?, "here\n", "before");
    Ok((pod, flag))
}

/// Expects readers to get an error in time. The VM was only stopped: connection and mount are re-established.
async fn recovers_after_stop((pod, flag): (Pod, PathBuf)) -> Result {
    signal_vm(&pod, Signal::SIGSTOP)?;
    let (waited, output) = timed_read(&flag).await?;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let refused = !output.status.success() && waited < READ_TIMEOUT;
    ensure!(refused, "{waited:?}: {words}");
    signal_vm(&pod, Signal::SIGCONT)?;
    let again = Duration::from_secs(30);
    crate::poll::until("the mount is available again", again, || async {
        same!(read(flag.clone()).await?, "here\n", "the file");
        Ok(())
    })
    .await?;
    pod.end().await
}

/// Expects a blocked reader to return when the pod ends.
async fn returns_when_the_pod_ends((pod, flag): (Pod, PathBuf)) -> Result {
    signal_vm(&pod, Signal::SIGSTOP)?;
    let point = flag.parent().map(Path::to_owned).unwrap_or_default();
    let reading = tokio::spawn(async move { timed_read(&flag).await });
    let began = Instant::now();
    pod.end().await?;
    let took = began.elapsed();
    ensure!(took < STOP_TIMEOUT, "removed after {took:?}");
    same!(
        exported_mounts(&point)?,
        [] as [PathBuf; 0],
        "after the pod"
    );
    let (_, output) = reading.await??;
    ensure!(!output.status.success(), "read {:?}", output.stdout);
    Ok(())
}
