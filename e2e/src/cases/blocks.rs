//! Block devices of the host in pods (`volumeDevices`): bytes both ways, flushed; read-only; any place in the container; and
//! nothing left of them, however the pod ends.

use super::bad_input::says;
use super::volumes::home;
use crate::disk::{Disk, SIZE};
use crate::outcome::Result;
use crate::pod::{Container, Pod, container_spec};
use crate::process::{family, kill};
use crate::runner::{Case, Shared, case};
use crate::{ensure, same, wait};
use k8s_cri::v1::*;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

pub fn cases() -> Vec<Case> {
    vec![
        case("blocks::a_disk_of_the_host", 90, disk),
        case("blocks::a_killed_shim_gives_the_disk_up", 60, killed),
        case("blocks::refused_by_name", 60, refused),
    ]
}

/// How long the VM may take to give a loop device up: its last user may be a process in exit.
const SETTLE: Duration = Duration::from_secs(10);

fn device(host: &Path, container: &str, permissions: &str) -> Device {
    Device {
        host_path: host.display().to_string(),
        container_path: container.into(),
        permissions: permissions.into(),
    }
}

async fn with(world: &Shared, pod: &Pod, name: &str, devices: Vec<Device>) -> Result<Container> {
    let mut config = container_spec(name, &world.images.base, &["sleep", "1000"]);
    config.devices = devices;
    pod.start_with(config).await
}

async fn disk(world: Shared) -> Result {
    let dir = home(&world, "blocks")?;
    let disk = Disk::new(&dir)?;
    // As the kubelet has it: a link in the pod's directory.
    let link = dir.join("pv");
    symlink(&disk.node, &link)?;
    disk.write(0, b"of the host")?;
    let pod = Pod::run(&world.node, "blocks").await?;
    let a = with(&world, &pod, "a", vec![device(&link, "/dev/xvda", "mrw")]).await?;
    let script = "test -b /dev/xvda && head -c 11 /dev/xvda && echo && blockdev --getsize64 /dev/xvda && \
        printf 'from the pod' | dd of=/dev/xvda bs=1 seek=1048577 conv=notrunc,fsync 2>/dev/null && \
        yes 0123456 | head -c 2000000 | dd of=/dev/xvda bs=64k seek=64 conv=notrunc,fsync 2>/dev/null && echo done";
    same!(
        a.out(&["sh", "-c", script]).await?,
        format!("of the host\n{SIZE}\ndone\n"),
        "read and written in the pod"
    );
    same!(disk.read(1_048_577, 12)?, b"from the pod", "on the host");
    let big = disk.read(4 << 20, 2_000_000)?;
    let expected = b"0123456\n".repeat(250_000);
    ensure!(big == expected, "2 MB written by the pod, on the host");
    // The end of the device is the end.
    let past = a.exec(&[
        "dd",
        "if=/dev/zero",
        "of=/dev/xvda",
        "bs=512",
        "seek=16384",
        "count=1",
    ]);
    ensure!(past.await?.exit_code != 0, "written past the end");

    // What the host writes, the next container reads: anywhere, and without writing.
    disk.write(0, b"again, host")?;
    let devices = vec![device(&disk.node, "/vol/block0", "r")];
    let b = with(&world, &pod, "b", devices).await?;
    let script = "head -c 11 /vol/block0; echo; echo x > /vol/block0 || echo refused; ls -l /vol/block0 | cut -c1";
    let said = b.out(&["sh", "-c", script]).await?;
    same!(said, "again, host\nrefused\nb\n", "in a second container");
    let said = a.out(&["head", "-c", "11", "/dev/xvda"]).await?;
    same!(said, "again, host", "in the first one, opened anew");
    // The disks of the VM itself stay out of reach for who makes nodes.
    let script = "mknod /x b 254 0 && cat /x || echo refused";
    same!(
        b.out(&["sh", "-c", script]).await?,
        "refused\n",
        "a disk of the VM"
    );

    b.stop(0).await?;
    b.remove().await?;
    // In the VM only what the other container has is left.
    let mut config = container_spec("look", &world.images.base, &["sleep", "1000"]);
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let look = pod.start_with(config).await?;
    let script = "grep -l . /sys/block/loop*/loop/backing_file; cat /sys/block/loop*/loop/dio";
    wait::until("loop devices of the VM", SETTLE, || async {
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
    // The pod lives, and has nothing of the disk any more.
    disk.given_up().await?;
    pod.end().await
}

async fn killed(world: Shared) -> Result {
    let dir = home(&world, "blocks-killed")?;
    let disk = Disk::new(&dir)?;
    let pod = Pod::run(&world.node, "blkill").await?;
    let c = with(&world, &pod, "c", vec![device(&disk.node, "/dev/xvda", "")]).await?;
    let endless = "while :; do dd if=/dev/zero of=/dev/xvda bs=64k conv=notrunc,fsync; done > /dev/null 2>&1 &";
    c.out(&["sh", "-c", endless]).await?;
    kill(family(&pod.id)?.0)?;
    pod.end().await?;
    disk.given_up().await
}

async fn refused(world: Shared) -> Result {
    let dir = home(&world, "blocks-refused")?;
    let file = dir.join("file");
    std::fs::write(&file, "x")?;
    let missing = dir.join("missing");
    let disk = Disk::new(&dir)?;
    let pod = Pod::run(&world.node, "blref").await?;
    for (wish, words) in [
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
        let mut config = container_spec("c", &world.images.base, &["true"]);
        config.devices = vec![wish];
        says(&pod.create_with(config).await.map(drop), &words)?;
    }
    // A disk that is there no more: its name and number are.
    let gone = disk.node.clone();
    disk.given_up().await?;
    let mut config = container_spec("c", &world.images.base, &["true"]);
    config.devices = vec![device(&gone, "/dev/x", "")];
    let node = gone.display().to_string();
    says(
        &pod.create_with(config).await.map(drop),
        &["linux.devices", &node],
    )?;
    pod.end().await
}
