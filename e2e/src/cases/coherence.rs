//! Changes that the host makes in a volume, as a pod sees them, within the times of docs/coherence.md.

use super::volumes::{eventually_within, mount, volume_dir};
use crate::case;
use crate::context::Backend;
use crate::failure::Result;
use crate::pod::{Container, Pod, container_spec, pull};
use crate::runner::{Case, Context};
use crate::{ensure, poll, probe, same};
use k8s_cri::v1::*;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(config_map_exchange_raises_an_event, 90),
        case!(projected_files_keep_owner_mode_and_content, 60),
        case!(host_changes_are_seen_within_documented_time, 120),
        case!(sendfile_after_stat_sees_appended_bytes, 60),
        case!(mapping_follows_the_host_after_a_stat, 60),
        case!(mapped_writes_reach_the_host, 60),
        case!(events_and_locks_of_the_host_do_not_reach_a_pod, 60),
        case!(writable_volume_of_two_pods_is_warned_of, 90),
        case!(second_writer_is_refused_if_configured, 120),
    ]
}

/// Time after which a change of names, attributes or content is visible: how long the guest's kernel caches them.
fn cache_time(ctx: &Context) -> Duration {
    Duration::from_secs(match ctx.backend {
        Backend::Qemu => 1,
        Backend::Krun => 5,
    })
}

/// Starts this program in a container, with its libraries as volumes.
async fn start_probe(
    ctx: &Context,
    pod: &Pod,
    arguments: &[&str],
    volume: Mount,
) -> Result<Container> {
    let mut argv = vec!["/probe"];
    argv.extend(arguments);
    let mut config = container_spec(arguments[0], &ctx.images.base, &argv);
    config.mounts = probe::mounts("/probe")?;
    config.mounts.push(volume);
    pod.start_with(config).await
}

/// Writes a version of a volume with one file, as the kubelet does.
fn write_version(dir: &Path, number: u32) -> Result {
    let content = dir.join(format!("..v{number}"));
    std::fs::create_dir(&content)?;
    std::fs::write(content.join("key"), format!("{number}\n"))?;
    symlink(format!("..v{number}"), dir.join("..data_tmp"))?;
    std::fs::rename(dir.join("..data_tmp"), dir.join("..data"))?;
    if number == 0 {
        symlink("..data/key", dir.join("key"))?;
    } else {
        std::fs::remove_dir_all(dir.join(format!("..v{}", number - 1)))?;
    }
    Ok(())
}

fn read_only(dir: &Path, at: &str) -> Mount {
    let mut volume = mount(dir, at);
    volume.readonly = true;
    volume
}

async fn config_map_exchange_raises_an_event(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "exchanged")?;
    write_version(&dir, 0)?;
    let pod = ctx.shared_pod().await;
    let watcher = start_probe(&ctx, &pod, &["events", "/map"], read_only(&dir, "/map")).await?;
    poll::until("the watcher", ctx.patience(20), || async {
        ensure!(watcher.output()?.contains("watching"), "no output");
        Ok(())
    })
    .await?;
    for number in 1..3 {
        write_version(&dir, number)?;
        let changed = Instant::now();
        poll::until("an event", ctx.patience(20), || async {
            let output = watcher.output()?;
            let events = output.matches("(MOVED_TO) ..data\n").count();
            ensure!(events >= number as usize, "events: {output}");
            Ok(())
        })
        .await?;
        ensure!(
            changed.elapsed() < Duration::from_secs(5),
            "the event came {:?} after the exchange",
            changed.elapsed()
        );
        let name = format!("reader{number}");
        let mut config = container_spec(&name, &ctx.images.base, &["cat", "/map/key"]);
        config.mounts = vec![read_only(&dir, "/map")];
        let reader = pod.start_with(config).await?;
        reader.exited(ctx.patience(20)).await?;
        same!(
            reader.output()?,
            format!("{number}\n"),
            "content in a new container"
        );
        reader.remove().await?;
    }
    // A new file: the kubelet links it after the exchange.
    std::fs::write(dir.join("..v2/more"), "more\n")?;
    std::fs::create_dir(dir.join("..v3"))?;
    for name in ["key", "more"] {
        std::fs::write(dir.join("..v3").join(name), "3\n")?;
    }
    symlink("..v3", dir.join("..data_tmp"))?;
    std::fs::rename(dir.join("..data_tmp"), dir.join("..data"))?;
    symlink("..data/more", dir.join("more"))?;
    poll::until("the event of a new file", ctx.patience(20), || async {
        let output = watcher.output()?;
        ensure!(output.contains("(MOVED_TO) more\n"), "events: {output}");
        Ok(())
    })
    .await?;
    pod.end().await
}

async fn projected_files_keep_owner_mode_and_content(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "projected")?;
    let version = dir.join("..v0");
    std::fs::create_dir_all(version.join("sub/deep"))?;
    let bytes: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(version.join("sub/deep/binary"), &bytes)?;
    std::fs::write(version.join("token"), "secret")?;
    std::os::unix::fs::chown(version.join("token"), Some(1000), Some(2000))?;
    std::fs::set_permissions(version.join("token"), PermissionsExt::from_mode(0o440))?;
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o1777))?;
    symlink("..v0", dir.join("..data"))?;
    symlink("..data/token", dir.join("token"))?;
    symlink("..data/sub", dir.join("sub"))?;
    let pod = ctx.shared_pod().await;
    let mut config = container_spec("c", &ctx.images.base, &["sleep", "1000"]);
    config.mounts = vec![read_only(&dir, "/p")];
    let c = pod.start_with(config).await?;
    let script = "stat -L -c '%u:%g %a %s' /p/token; stat -c %a /p; wc -c < /p/sub/deep/binary; \
        readlink /p/token; readlink /p/..data; touch /p/new 2>&1; ls /p";
    same!(
        c.out(&["sh", "-c", script]).await?,
        "1000:2000 440 6\n1777\n400000\n..data/token\n..v0\n\
         touch: /p/new: Read-only file system\nsub\ntoken\n",
        "the volume in the pod"
    );
    let sum = c.out(&["sha256sum", "/p/sub/deep/binary"]).await?;
    let expected = hex::encode(<sha2::Sha256 as sha2::Digest>::digest(&bytes));
    ensure!(sum.starts_with(&expected), "checksum {sum}, not {expected}");
    pod.end().await
}

async fn host_changes_are_seen_within_documented_time(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "changing")?;
    let write = |name: &str, content: &str| std::fs::write(dir.join(name), content);
    for name in [
        "appended",
        "shortened",
        "same",
        "renamed",
        "removed",
        "mode",
    ] {
        write(name, "before\n")?;
    }
    let pod = ctx.shared_pod().await;
    let mut config = container_spec("c", &ctx.images.base, &["sleep", "1000"]);
    config.mounts = vec![mount(&dir, "/v")];
    let c = pod.start_with(config).await?;
    let look = "cd /v; cat appended shortened same renamed; ls; stat -c %a mode";
    let before = "before\nbefore\nbefore\nbefore\n";
    same!(
        c.out(&["sh", "-c", look]).await?,
        format!("{before}appended\nmode\nremoved\nrenamed\nsame\nshortened\n644\n"),
        "before the changes"
    );
    write("appended", "before\nafter\n")?;
    write("shortened", "x\n")?;
    write("same", "behind\n")?;
    write("new", "")?;
    std::fs::rename(dir.join("new"), dir.join("created"))?;
    write("next", "next\n")?;
    std::fs::rename(dir.join("next"), dir.join("renamed"))?;
    std::fs::remove_file(dir.join("removed"))?;
    std::fs::set_permissions(dir.join("mode"), PermissionsExt::from_mode(0o600))?;
    let after =
        "before\nafter\nx\nbehind\nnext\nappended\ncreated\nmode\nrenamed\nsame\nshortened\n600\n";
    eventually_within(cache_time(&ctx), "the host's changes", || async {
        same!(
            c.out(&["sh", "-c", look]).await?,
            after,
            "after the changes"
        );
        Ok(())
    })
    .await?;
    // In the other direction there is no delay.
    c.out(&["sh", "-c", "echo guest > /v/guest; mv /v/created /v/moved"])
        .await?;
    same!(
        std::fs::read_to_string(dir.join("guest"))?,
        "guest\n",
        "on the host"
    );
    ensure!(dir.join("moved").exists(), "renaming in the guest");
    pod.end().await
}

async fn sendfile_after_stat_sees_appended_bytes(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "spliced")?;
    let file = dir.join("log");
    std::fs::write(&file, "one\n")?;
    let pod = ctx.shared_pod().await;
    let follower = start_probe(&ctx, &pod, &["splice", "/v/log"], mount(&dir, "/v")).await?;
    let seen = async |expected: &str, limit| {
        poll::until("the bytes", limit, || async {
            same!(follower.output()?, expected, "output of sendfile");
            Ok(())
        })
        .await
    };
    seen("one\n", ctx.patience(20)).await?;
    use std::io::Write;
    let mut log = std::fs::File::options().append(true).open(&file)?;
    log.write_all(b"two\n")?;
    seen("one\ntwo\n", cache_time(&ctx) + Duration::from_secs(3)).await?;
    pod.end().await
}

async fn mapping_follows_the_host_after_a_stat(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "mapped")?;
    let file = dir.join("file");
    std::fs::write(&file, "a\n")?;
    let pod = ctx.shared_pod().await;
    let reader = start_probe(&ctx, &pod, &["map-read", "/v/file"], mount(&dir, "/v")).await?;
    let seen = async |expected: &str| {
        poll::until("the mapped byte", ctx.patience(20), || async {
            same!(reader.output()?, expected, "mapped bytes");
            Ok(())
        })
        .await
    };
    seen("maps a\n").await?;
    // In place: a mapping of an empty file would raise SIGBUS.
    std::fs::File::options()
        .write(true)
        .open(&file)?
        .write_at(b"b", 0)?;
    tokio::time::sleep(cache_time(&ctx)).await;
    same!(reader.output()?, "maps a\n", "without a call that looks");
    reader.out(&["stat", "/v/file"]).await?;
    seen("maps a\nmaps b\n").await?;
    pod.end().await
}

async fn mapped_writes_reach_the_host(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "map-written")?;
    let file = dir.join("file");
    std::fs::write(&file, "a\n")?;
    let pod = ctx.shared_pod().await;
    let writer = start_probe(&ctx, &pod, &["map-write", "/v/file"], mount(&dir, "/v")).await?;
    let printed = async |line: &str| {
        poll::until(line, ctx.patience(20), || async {
            ensure!(writer.output()?.ends_with(line), "{}", writer.output()?);
            Ok(())
        })
        .await
    };
    for (step, next, expected) in [
        ("sync", "next: unmap\n", "s\n"),
        ("unmap", "unmapped\n", "u\n"),
    ] {
        printed(&format!("next: {step}\n")).await?;
        std::fs::write(file.with_added_extension(step), "")?;
        printed(next).await?;
        same!(std::fs::read_to_string(&file)?, expected, "after {step}");
    }
    pod.end().await
}

async fn events_and_locks_of_the_host_do_not_reach_a_pod(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "unwatched")?;
    let lock = std::fs::File::create(dir.join("lock"))?;
    lock.lock()?;
    let pod = ctx.shared_pod().await;
    let watcher = start_probe(&ctx, &pod, &["events", "/v"], mount(&dir, "/v")).await?;
    poll::until("the watcher", ctx.patience(20), || async {
        same!(watcher.output()?, "watching\n", "output");
        Ok(())
    })
    .await?;
    std::fs::write(dir.join("host"), "")?;
    tokio::time::sleep(cache_time(&ctx)).await;
    // The pod sees the file and gets the lock that the host holds; its own file raises the first event.
    let script = "cat /v/host && /probe try-lock /v/lock && touch /v/guest";
    watcher.out(&["sh", "-c", script]).await?;
    poll::until("the event", ctx.patience(20), || async {
        same!(
            watcher.output()?,
            "watching\nReadFlags(CREATE) guest\n",
            "events"
        );
        Ok(())
    })
    .await?;
    drop(lock);
    pod.end().await
}

async fn writable_volume_of_two_pods_is_warned_of(ctx: Context) -> Result {
    let (shared, unshared) = (volume_dir(&ctx, "rwx")?, volume_dir(&ctx, "rox")?);
    let config = |name: &str| {
        let mut config = container_spec(name, &ctx.images.base, &["sleep", "1000"]);
        config.mounts = vec![mount(&shared, "/v"), read_only(&unshared, "/r")];
        config
    };
    let logged = || -> Result<String> { Ok(std::fs::read_to_string(ctx.node.log())?) };
    let start = logged()?.len();
    let a = Pod::run(&ctx.node, "rwx-a").await?;
    let first = a.start_with(config("c")).await?;
    a.start_with(config("d")).await?;
    let warned = |text: &str| {
        let lines = text.lines();
        lines
            .filter(|line| line.contains("file locks do not reach"))
            .count()
    };
    same!(warned(&logged()?[start..]), 0, "warnings about one pod");
    let b = Pod::run(&ctx.node, "rwx-b").await?;
    let second = b.start_with(config("c")).await?;
    poll::until("the warning", ctx.patience(10), || async {
        let text = logged()?;
        same!(
            warned(&text[start..]),
            1,
            "warnings about two pods:\n{text}"
        );
        Ok(())
    })
    .await?;
    let shared_now = async || ctx.node.metric("boxlite_shared_volume_writers").await;
    same!(shared_now().await?, 1, "shared directories in the metrics");
    let text = logged()?;
    let text = &text[start..];
    ensure!(
        text.contains(&shared.display().to_string())
            && text.contains(&a.id)
            && text.contains(&b.id),
        "the warning does not name the volume and the pods:\n{text}"
    );
    // Files without locks are shared as ever.
    first.out(&["sh", "-c", "echo a > /v/x"]).await?;
    same!(second.out(&["cat", "/v/x"]).await?, "a\n", "content");
    b.end().await?;
    same!(shared_now().await?, 0, "shared directories after the pod");
    a.end().await
}

async fn second_writer_is_refused_if_configured(ctx: Context) -> Result {
    let shared = volume_dir(&ctx, "second-writer")?;
    let node = ctx
        .dedicated_node("single", |options| {
            options.shared_volume_writers = Some("refuse")
        })
        .await?;
    pull(&node, &ctx.images.base).await?;
    let config = |name: &str, mount: Mount| {
        let mut config = container_spec(name, &ctx.images.base, &["sleep", "1000"]);
        config.mounts = vec![mount];
        config
    };
    let a = Pod::run(&node, "single-a").await?;
    let first = a.start_with(config("c", mount(&shared, "/v"))).await?;
    a.start_with(config("d", mount(&shared, "/v"))).await?;
    let b = Pod::run(&node, "single-b").await?;
    let Err(refusal) = b.start_with(config("w", mount(&shared, "/v"))).await else {
        crate::bail!("a second pod writes to {}", shared.display())
    };
    ensure!(
        refusal.0.contains(&shared.display().to_string()) && refusal.0.contains(&a.id),
        "the refusal does not name the volume and the pod: {}",
        refusal.0
    );
    // The shims know of each other without the daemon.
    node.kill().await?;
    node.serve().await?;
    let again = b.start_with(config("x", mount(&shared, "/v"))).await;
    ensure!(again.is_err(), "allowed after a restart of the daemon");
    first.out(&["sh", "-c", "echo a > /v/x"]).await?;
    let reader = b.start_with(config("r", read_only(&shared, "/v"))).await?;
    same!(
        reader.out(&["cat", "/v/x"]).await?,
        "a\n",
        "read-only mount"
    );
    // A stopped pod that still exists does not hold its volumes.
    a.stop().await?;
    b.start_with(config("y", mount(&shared, "/v"))).await?;
    a.remove().await?;
    b.end().await
}
