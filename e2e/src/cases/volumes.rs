//! Volumes: later host mounts, read-only trees, image volumes, memory volumes, ConfigMap updates, and refusals.

use super::bad_input::expect_error;
use crate::case;
use crate::failure::Result;
use crate::namespaces::run;
use crate::pod::{Container, Pod, container_spec, pull};
use crate::runner::{Case, Context};
use crate::{ensure, same};
use k8s_cri::v1::*;
use prost::Message;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(later_host_mounts_propagate, 90),
        case!(read_only_mounts_are_recursive, 60),
        case!(images_are_mounted_as_volumes, 90),
        case!(config_map_update_is_seen_within_five_seconds, 90),
        case!(memory_volume_is_a_tmpfs, 60),
        case!(kubelet_memory_volume_is_of_the_guest, 60),
        case!(mount_flags_of_the_host_are_kept, 60),
        case!(unsupported_mounts_are_refused_by_name, 60),
    ]
}

/// Time within which a change on the host must be visible in a pod.
const PROPAGATION_TIMEOUT: Duration = Duration::from_secs(5);

/// Repeats `look` until it succeeds. A look later than [`PROPAGATION_TIMEOUT`] after the change must succeed.
pub(super) async fn eventually<F, Fut>(what: &str, look: F) -> Result
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result>,
{
    eventually_within(PROPAGATION_TIMEOUT, what, look).await
}

/// Repeats `look` until it succeeds. A look later than `limit` after the change must succeed.
pub(super) async fn eventually_within<F, Fut>(limit: Duration, what: &str, mut look: F) -> Result
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result>,
{
    let changed = Instant::now();
    loop {
        let asked = changed.elapsed();
        match look().await {
            Ok(()) => return Ok(()),
            Err(instead) if asked > limit => {
                crate::bail!("{what}: after {asked:?}: {instead}")
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

pub(super) fn mount(host: &Path, container: &str) -> Mount {
    Mount {
        host_path: host.display().to_string(),
        container_path: container.into(),
        ..Default::default()
    }
}

/// Creates a directory for the case's volumes.
pub(super) fn volume_dir(ctx: &Context, name: &str) -> Result<PathBuf> {
    let dir = ctx.node.dir.join("volumes").join(name);
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}

async fn sleeper(ctx: &Context, pod: &Pod, name: &str, mounts: Vec<Mount>) -> Result<Container> {
    let mut config = container_spec(name, &ctx.images.base, &["sleep", "1000"]);
    config.mounts = mounts;
    pod.start_with(config).await
}

/// A tmpfs on the host with one file, unmounted on drop.
pub(super) struct Tmpfs(pub(super) PathBuf);

impl Tmpfs {
    pub(super) fn new(path: PathBuf, options: &str) -> Result<Self> {
        std::fs::create_dir_all(&path)?;
        let at = path.display().to_string();
        run("mount", &["-t", "tmpfs", "-o", options, "tmpfs", &at])?;
        std::fs::write(path.join("flag"), "of the host\n")?;
        Ok(Self(path))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // A lazy unmount: the VM may still use it.
        let _ = run("umount", &["-l", &self.0.display().to_string()]);
    }
}

async fn later_host_mounts_propagate(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "late")?;
    for name in ["slave/later", "private/later"] {
        std::fs::create_dir_all(dir.join(name))?;
    }
    std::os::unix::fs::symlink(dir.join("slave"), dir.join("link"))?;
    let pod = Pod::run(&ctx.node, "late").await?;
    let mut slave = mount(&dir.join("link"), "/slave");
    slave.propagation = MountPropagation::PropagationHostToContainer.into();
    let private = mount(&dir.join("private"), "/private");
    let c = sleeper(&ctx, &pod, "c", vec![slave.clone(), private]).await?;
    let status = c.status().await?;
    same!(
        (&status.mounts[0].host_path, status.mounts[0].propagation),
        (&slave.host_path, slave.propagation),
        "the mount in the status is the one that was asked for"
    );
    let later = Tmpfs::new(dir.join("slave/later"), "size=1m")?;
    let hidden = Tmpfs::new(dir.join("private/later"), "size=1m")?;
    eventually("the host's mount", || async {
        same!(
            c.out(&["cat", "/slave/later/flag"]).await?,
            "of the host\n",
            "flag"
        );
        Ok(())
    })
    .await?;
    c.out(&["sh", "-c", "echo back > /slave/later/new"]).await?;
    same!(
        std::fs::read_to_string(later.0.join("new"))?,
        "back\n",
        "written in the pod, on the host's later mount"
    );
    same!(
        c.out(&["ls", "/private/later"]).await?,
        "",
        "a private volume"
    );
    // A file that is open when the container ends: the guest's kernel must handle it.
    c.out(&[
        "sh",
        "-c",
        "exec 3< /slave/later/flag; sleep 1000 3<&3 & exit 0",
    ])
    .await?;
    drop(later);
    eventually("the host's unmount", || async {
        same!(c.out(&["ls", "/slave/later"]).await?, "", "remaining files");
        Ok(())
    })
    .await?;
    let again = Tmpfs::new(dir.join("slave/later"), "size=1m")?;
    eventually("a second mount", || async {
        same!(c.out(&["ls", "/slave/later"]).await?, "flag\n", "files");
        Ok(())
    })
    .await?;
    c.stop(0).await?;
    c.remove().await?;
    drop((again, hidden));
    let d = sleeper(&ctx, &pod, "d", vec![slave]).await?;
    same!(
        d.out(&["ls", "/slave"]).await?,
        "later\n",
        "the next container"
    );
    pod.end().await
}

async fn read_only_mounts_are_recursive(ctx: Context) -> Result {
    let status = ctx
        .node
        .cri
        .runtime()
        .status(StatusRequest { verbose: false })
        .await?
        .into_inner();
    let features = status.runtime_handlers.first().and_then(|h| h.features);
    ensure!(
        features.is_some_and(|f| f.recursive_read_only_mounts),
        "the feature is not reported: {features:?}"
    );
    let dir = volume_dir(&ctx, "ro")?;
    let _deep = Tmpfs::new(dir.join("deep"), "size=1m")?;
    let pod = ctx.shared_pod().await;
    let mut plain = mount(&dir, "/plain");
    plain.readonly = true;
    let mut tree = mount(&dir, "/tree");
    (tree.readonly, tree.recursive_read_only) = (true, true);
    let c = sleeper(
        &ctx,
        &pod,
        "c",
        vec![plain, tree.clone(), mount(&dir, "/rw")],
    )
    .await?;
    for (path, writable) in [
        ("/plain/x", false),
        ("/plain/deep/x", true),
        ("/tree/x", false),
        ("/tree/deep/x", false),
        ("/rw/x", true),
        ("/rw/deep/x", true),
    ] {
        let response = c.exec(&["sh", "-c", &format!("echo x > {path}")]).await?;
        let error = String::from_utf8_lossy(&response.stderr).into_owned();
        same!(response.exit_code == 0, writable, "{path}: {error}");
        ensure!(writable || error.contains("Read-only"), "{path}: {error}");
    }
    // The host prevents writes, regardless of the flags that a privileged container sets on its mounts.
    let mut config = container_spec("root", &ctx.images.base, &["sleep", "1000"]);
    config.mounts = vec![tree.clone()];
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let root = pod.start_with(config).await?;
    root.out(&["mount", "-o", "remount,rw,bind", "/tree"])
        .await?;
    let write = root.exec(&["touch", "/tree/by-root"]).await?;
    ensure!(
        String::from_utf8_lossy(&write.stderr).contains("Read-only"),
        "root in the guest wrote to a read-only volume: {write:?}"
    );
    tree.propagation = MountPropagation::PropagationHostToContainer.into();
    let mut config = container_spec("bad", &ctx.images.base, &["true"]);
    config.mounts = vec![tree];
    expect_error(
        &pod.create_with(config).await.map(drop),
        &["InvalidArgument", "recursive_read_only"],
    )?;
    pod.end().await
}

/// Sends CreateContainer with a mount whose `image_sub_path` k8s-cri does not define: the field is appended to the
/// message, and decoders merge repeated occurrences of a message field.
pub(super) async fn create_with_sub_path(
    pod: &Pod,
    config: ContainerConfig,
    volume: &Mount,
    sub_path: &str,
) -> Result<Container> {
    let mut bytes = volume.encode_to_vec();
    field(&mut bytes, 10, sub_path.as_bytes());
    let mut more = Vec::new();
    field(&mut more, 7, &bytes);
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: Some(config.clone()),
        sandbox_config: Some(pod.config.clone()),
    };
    let mut message = request.encode_to_vec();
    field(&mut message, 2, &more);
    let answer = pod.node.cri.raw_bytes("CreateContainer", message).await?;
    let id = CreateContainerResponse::decode(answer.as_slice())?.container_id;
    Ok(Container {
        pod: pod.clone(),
        id,
        config,
    })
}

/// Appends a length-delimited protobuf field.
fn field(bytes: &mut Vec<u8>, number: u64, content: &[u8]) {
    prost::encoding::encode_varint(number << 3 | 2, bytes);
    prost::encoding::encode_varint(content.len() as u64, bytes);
    bytes.extend(content);
}

async fn images_are_mounted_as_volumes(ctx: Context) -> Result {
    let node = &ctx.node;
    let id = pull(node, &ctx.images.layers).await?;
    let pod = Pod::run(node, "imagevol").await?;
    let volume = |readonly| Mount {
        container_path: "/vol".into(),
        readonly,
        image: Some(ImageSpec {
            image: ctx.images.layers.clone(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let c = sleeper(&ctx, &pod, "whole", vec![volume(true)]).await?;
    same!(
        c.out(&[
            "sh",
            "-c",
            "ls /vol/data /vol/opaque; cat /vol/dir-to-file; /vol/bin/echo runs"
        ])
        .await?,
        "/vol/data:\nstays\n\n/vol/opaque:\nnew\nnow a file\nruns\n",
        "the image's layers as one tree"
    );
    let write = c.exec(&["touch", "/vol/x"]).await?;
    ensure!(
        String::from_utf8_lossy(&write.stderr).contains("Read-only"),
        "a write into an image: {write:?}"
    );
    let asked = ContainerStatusRequest {
        container_id: c.id.clone(),
        verbose: false,
    };
    let raw = node
        .cri
        .raw_bytes("ContainerStatus", asked.encode_to_vec())
        .await?;
    let mut reference = Vec::new();
    field(&mut reference, 20, id.as_bytes());
    ensure!(
        raw.windows(reference.len()).any(|part| part == reference),
        "the status has no image_ref {id} in its mount"
    );
    // The image is in use by a volume only.
    let request = RemoveImageRequest {
        image: Some(ImageSpec {
            image: id.clone(),
            ..Default::default()
        }),
    };
    let removed = node.cri.image().remove_image(request).await;
    ensure!(removed.is_err(), "an image that is mounted was removed");

    let base = |name: &str| container_spec(name, &ctx.images.base, &["sleep", "1000"]);
    let part = create_with_sub_path(&pod, base("part"), &volume(true), "links").await?;
    part.start().await?;
    same!(
        part.out(&["cat", "/vol/b"]).await?,
        "linked\n",
        "a part of the image"
    );
    let file = create_with_sub_path(&pod, base("file"), &volume(true), "links/absolute").await?;
    file.start().await?;
    same!(
        file.out(&["cat", "/vol"]).await?,
        "one\n",
        "a file of it, by a link that is absolute in the image"
    );
    for (sub_path, words) in [
        ("no/such/part", ["no/such/part", "imagevolumemountfailed:"]),
        ("../../etc", ["image_sub_path", "image_sub_path"]),
    ] {
        let refused = create_with_sub_path(&pod, base("bad"), &volume(true), sub_path).await;
        expect_error(&refused.map(drop), &words)?;
    }
    let mut config = base("writable");
    config.mounts = vec![volume(false)];
    expect_error(&pod.create_with(config).await.map(drop), &["readonly"])?;
    for container in [c, part, file] {
        container.remove().await?;
    }
    pod.end().await
}

/// Updates the volume as the kubelet's AtomicWriter does: a new directory, then one rename of the link to it.
fn update_config_map(dir: &Path, number: u32) -> Result {
    let content = dir.join(format!("..{number}"));
    std::fs::create_dir(&content)?;
    std::fs::write(content.join("key"), format!("{number}\n"))?;
    std::os::unix::fs::symlink(format!("..{number}"), dir.join("..data_tmp"))?;
    std::fs::rename(dir.join("..data_tmp"), dir.join("..data"))?;
    if number > 0 {
        std::fs::remove_dir_all(dir.join(format!("..{}", number - 1)))?;
    }
    Ok(())
}

async fn config_map_update_is_seen_within_five_seconds(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "map")?;
    update_config_map(&dir, 0)?;
    std::os::unix::fs::symlink("..data/key", dir.join("key"))?;
    let pod = ctx.shared_pod().await;
    let mut volume = mount(&dir, "/map");
    volume.readonly = true;
    let c = sleeper(&ctx, &pod, "c", vec![volume]).await?;
    same!(c.out(&["cat", "/map/key"]).await?, "0\n", "at the start");
    for number in 1..4 {
        update_config_map(&dir, number)?;
        eventually("the new content", || async {
            let output = c.exec(&["cat", "/map/key"]).await?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            same!(text, format!("{number}\n"), "content");
            Ok(())
        })
        .await?;
    }
    pod.end().await
}

async fn memory_volume_is_a_tmpfs(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "memory")?;
    let volume = Tmpfs::new(dir.join("v"), "size=2m")?;
    let shm = Tmpfs::new(dir.join("shm"), "size=100m")?;
    let pod = Pod::run(&ctx.node, "memory").await?;
    let mounts = vec![mount(&volume.0, "/cache"), mount(&shm.0, "/dev/shm")];
    let a = sleeper(&ctx, &pod, "a", mounts.clone()).await?;
    let b = sleeper(&ctx, &pod, "b", mounts).await?;
    // Not df, which finds the mount in /proc/mounts by its device number, and all volumes share one.
    same!(
        a.out(&["stat", "-f", "-c", "%b*%S", "/cache", "/dev/shm"])
            .await?,
        "512*4096\n25600*4096\n",
        "sizes"
    );
    a.out(&["sh", "-c", "echo 1 > /cache/x; echo 2 > /dev/shm/x"])
        .await?;
    same!(
        b.out(&["cat", "/cache/x", "/dev/shm/x"]).await?,
        "1\n2\n",
        "shared by containers"
    );
    same!(
        std::fs::read_to_string(volume.0.join("x"))?,
        "1\n",
        "on the host"
    );
    let full = b
        .exec(&["dd", "if=/dev/zero", "of=/cache/big", "bs=64k"])
        .await?;
    ensure!(
        full.exit_code != 0 && String::from_utf8_lossy(&full.stderr).contains("No space"),
        "the limit of an emptyDir in memory: {full:?}"
    );
    let plain = pod.sh(&ctx.images.base, "stat -f -c '%b*%S' /dev/shm; ls /dev/shm");
    same!(plain.await?, "16384*4096\n", "default /dev/shm");
    pod.end().await
}

async fn kubelet_memory_volume_is_of_the_guest(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "pods")?.join("volumes/kubernetes.io~empty-dir");
    let volume = Tmpfs::new(dir.join("cache"), "size=2m,mode=0777")?;
    let sub = volume.0.join("sub");
    std::fs::create_dir(&sub)?;
    std::os::unix::fs::chown(&sub, Some(1000), Some(2000))?;
    let pod = Pod::run(&ctx.node, "memory-kubelet").await?;
    let mut read_only = mount(&volume.0, "/dev/shm");
    read_only.readonly = true;
    let mounts = vec![mount(&volume.0, "/cache"), mount(&sub, "/sub"), read_only];
    let a = sleeper(&ctx, &pod, "a", mounts).await?;
    let shm = vec![mount(&volume.0, "/dev/shm")];
    let b = sleeper(&ctx, &pod, "b", shm).await?;
    let stat = ["stat", "-f", "-c", "%T %b*%S", "/cache", "/sub"];
    same!(
        a.out(&stat).await?,
        "tmpfs 512*4096\ntmpfs 512*4096\n",
        "type and size"
    );
    same!(
        a.out(&["stat", "-c", "%a %u %g", "/cache", "/sub"]).await?,
        "777 0 0\n755 1000 2000\n",
        "owners"
    );
    let script = "cp /bin/busybox /cache/true && /cache/true && echo x > /cache/sub/x && echo x > /dev/shm/y";
    let written = a.exec(&["sh", "-c", script]).await?;
    let stderr = String::from_utf8_lossy(&written.stderr);
    ensure!(
        stderr.contains("Read-only"),
        "read-only at /dev/shm: {written:?}"
    );
    same!(
        b.out(&["sh", "-c", "/dev/shm/true && cat /dev/shm/sub/x"])
            .await?,
        "x\n",
        "shared"
    );
    same!(a.out(&["cat", "/sub/x"]).await?, "x\n", "the sub path");
    ensure!(
        !volume.0.join("true").exists(),
        "nothing is written on the host"
    );
    pod.end().await
}

async fn mount_flags_of_the_host_are_kept(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "flags")?;
    let strict = Tmpfs::new(dir.join("strict"), "size=2m,noexec,nosuid,nodev,mode=0777")?;
    let fixed = Tmpfs::new(dir.join("fixed"), "size=2m")?;
    run(
        "mount",
        &["-o", "remount,ro", &fixed.0.display().to_string()],
    )?;
    let pod = ctx.shared_pod().await;
    let mounts = vec![mount(&strict.0, "/strict"), mount(&fixed.0, "/fixed")];
    let c = sleeper(&ctx, &pod, "c", mounts).await?;
    let ran = c
        .exec(&["sh", "-c", "cp /bin/busybox /strict/true && /strict/true"])
        .await?;
    let stderr = String::from_utf8_lossy(&ran.stderr);
    ensure!(
        stderr.contains("denied"),
        "a program on a noexec volume: {ran:?}"
    );
    let table = c.out(&["cat", "/proc/mounts"]).await?;
    let options = |point: &str| {
        let line = table
            .lines()
            .find(|line| line.split(' ').nth(1) == Some(point));
        line.and_then(|line| line.split(' ').nth(3))
            .unwrap_or_default()
    };
    for flag in ["noexec", "nosuid", "nodev"] {
        ensure!(
            options("/strict").split(',').any(|o| o == flag),
            "no {flag}: {table}"
        );
    }
    ensure!(
        options("/fixed").starts_with("ro"),
        "not read-only: {table}"
    );
    pod.end().await
}

async fn unsupported_mounts_are_refused_by_name(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "refused")?;
    let pod = ctx.shared_pod().await;
    let alone = Tmpfs::new(dir.join("alone"), "size=1m")?;
    run("mount", &["--make-private", &alone.0.display().to_string()])?;
    let mut both = mount(&alone.0, "/both");
    both.propagation = MountPropagation::PropagationBidirectional.into();
    let mut config = container_spec("c", &ctx.images.base, &["true"]);
    config.mounts = vec![both];
    expect_error(
        &pod.create_with(config).await.map(drop),
        &[
            "not a shared mount",
            "/both",
            &alone.0.display().to_string(),
        ],
    )?;
    let mut follower = mount(&alone.0, "/alone");
    follower.propagation = MountPropagation::PropagationHostToContainer.into();
    let mut config = container_spec("c", &ctx.images.base, &["true"]);
    config.mounts = vec![follower];
    expect_error(
        &pod.create_with(config).await.map(drop),
        &["private", &alone.0.display().to_string()],
    )?;
    pod.end().await
}
