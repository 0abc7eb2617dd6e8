//! Host block devices in pods (`volumeDevices`): data in both directions, flushes, read-only devices, any path in the
//! container, and release of the device however the pod ends.

use super::bad_input::expect_error;
use super::volumes::volume_dir;
use crate::case;
use crate::disk::{DISK_BYTES, Disk};
use crate::failure::Result;
use crate::pod::{Container, Pod, container_spec};
use crate::process::{family, kill};
use crate::runner::{Case, Context};
use crate::{ensure, poll, same};
use k8s_cri::v1::*;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(host_disk_is_shared_with_containers, 90),
        case!(killed_shim_releases_the_disk, 60),
        case!(invalid_devices_are_refused_by_name, 60),
    ]
}

/// Limit for the VM to release a loop device: its last user may be an exiting process.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

fn device(host: &Path, container: &str, permissions: &str) -> Device {
    Device {
        host_path: host.display().to_string(),
        container_path: container.into(),
        permissions: permissions.into(),
    }
}

async fn with(ctx: &Context, pod: &Pod, name: &str, devices: Vec<Device>) -> Result<Container> {
    let mut config = container_spec(name, &ctx.images.base, &["sleep", "1000"]);
    config.devices = devices;
    pod.start_with(config).await
}

async fn host_disk_is_shared_with_containers(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "blocks")?;
    let disk = Disk::new(&dir)?;
    // As the kubelet passes it: a symbolic link in the pod's directory.
    let link = dir.join("pv");
    symlink(&disk.node, &link)?;
    disk.write(0, b"of the host")?;
    let pod = Pod::run(&ctx.node, "blocks").await?;
    let a = with(&ctx, &pod, "a", vec![device(&link, "/dev/xvda", "mrw")]).await?;
    let script = "test -b /dev/xvda && head -c 11 /dev/xvda && echo && blockdev --getsize64 /dev/xvda && \
        printf 'from the pod' | dd of=/dev/xvda bs=1 seek=1048577 conv=notrunc,fsync 2>/dev/null && \
        yes 0123456 | head -c 2000000 | dd of=/dev/xvda bs=64k seek=64 conv=notrunc,fsync 2>/dev/null && echo done";
    same!(
        a.out(&["sh", "-c", script]).await?,
        format!("of the host\n{DISK_BYTES}\ndone\n"),
        "read and written in the pod"
    );
    same!(disk.read(1_048_577, 12)?, b"from the pod", "on the host");
    let big = disk.read(4 << 20, 2_000_000)?;
    let expected = b"0123456\n".repeat(250_000);
    ensure!(big == expected, "2 MB written by the pod, on the host");
    // Writes past the end of the device fail.
    let past = a.exec(&[
        "dd",
        "if=/dev/zero",
        "of=/dev/xvda",
        "bs=512",
        "seek=16384",
        "count=1",
    ]);
    ensure!(past.await?.exit_code != 0, "written past the end");

    // The next container reads data written by the host, at another path and read-only.
    disk.write(0, b"again, host")?;
    let devices = vec![device(&disk.node, "/vol/block0", "r")];
    let b = with(&ctx, &pod, "b", devices).await?;
    let script = "head -c 11 /vol/block0; echo; echo x > /vol/block0 || echo refused; ls -l /vol/block0 | cut -c1";
    let said = b.out(&["sh", "-c", script]).await?;
    same!(said, "again, host\nrefused\nb\n", "in a second container");
    let said = a.out(&["head", "-c", "11", "/dev/xvda"]).await?;
    same!(said, "again, host", "in the first one, opened again");
    // The VM's own disks are not accessible through device nodes made in the container.
    let script = "mknod /x b 254 0 && cat /x || echo refused";
    same!(
        b.out(&["sh", "-c", script]).await?,
        "refused\n",
        "a disk of the VM"
    );

    b.stop(0).await?;
    b.remove().await?;
    // The VM has only the other container's device left.
    let mut config = container_spec("look", &ctx.images.base, &["sleep", "1000"]);
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let look = pod.start_with(config).await?;
    let script = "grep -l . /sys/block/loop*/loop/backing_file; cat /sys/block/loop*/loop/dio";
    poll::until("loop devices of the VM", SETTLE_TIMEOUT, || async {
        let said = look.out(&["sh", "-c", script]).await?;
        same!(
            said,
            "/sys/block/loop0/loop/backing_file\n1\n",
            "one, with direct I/O"
        );
        Ok(())
    })
    .await?;
    a.stop(0).await?;
    a.remove().await?;
    // The pod keeps running and no longer holds the disk.
    disk.detached().await?;
    pod.end().await
}

async fn killed_shim_releases_the_disk(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "blocks-killed")?;
    let disk = Disk::new(&dir)?;
    let pod = Pod::run(&ctx.node, "blkill").await?;
    let c = with(&ctx, &pod, "c", vec![device(&disk.node, "/dev/xvda", "")]).await?;
    let endless = "while :; do dd if=/dev/zero of=/dev/xvda bs=64k conv=notrunc,fsync; done > /dev/null 2>&1 &";
    c.out(&["sh", "-c", endless]).await?;
    kill(family(&pod.id)?.0)?;
    pod.end().await?;
    disk.detached().await
}

async fn invalid_devices_are_refused_by_name(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "blocks-refused")?;
    let file = dir.join("file");
    std::fs::write(&file, "x")?;
    let missing = dir.join("missing");
    let disk = Disk::new(&dir)?;
    let pod = Pod::run(&ctx.node, "blref").await?;
    for (request, words) in [
        (
            device(&file, "/dev/x", ""),
            ["config.devices.host_path", "file"],
        ),
        (
            device(&missing, "/dev/x", ""),
            ["config.devices.host_path", "missing"],
        ),
        (
            device(&disk.node, "x", ""),
            ["config.devices.container_path", "\"x\""],
        ),
        (
            device(&disk.node, "/a/../x", ""),
            ["config.devices.container_path", "/a/../x"],
        ),
    ] {
        let mut config = container_spec("c", &ctx.images.base, &["true"]);
        config.devices = vec![request];
        expect_error(&pod.create_with(config).await.map(drop), &words)?;
    }
    // A detached disk: its node and number still exist.
    let gone = disk.node.clone();
    disk.detached().await?;
    let mut config = container_spec("c", &ctx.images.base, &["true"]);
    config.devices = vec![device(&gone, "/dev/x", "")];
    let node = gone.display().to_string();
    expect_error(
        &pod.create_with(config).await.map(drop),
        &["linux.devices", &node],
    )?;
    pod.end().await
}
