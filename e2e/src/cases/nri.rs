//! NRI plugins: order and content of events, refusals, adjustments, hanging plugins, and plugins launched by the daemon.

use crate::case;
use crate::failure::{During, Failure, Result};
use crate::nri::{
    Adjust, Hook, Hooks, Linux, Memory, Mount, NOISE, Number, Pair, Plugin, Reply, Resources,
    Rlimit, install,
};
use crate::pod::{Pod, pull};
use crate::process::kill;
use crate::runner::{Case, Context};
use crate::{ensure, poll, same};
use k8s_cri::v1::PodSandboxFilter;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Maximum size of a message of NRI.
const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Time in which a plugin has to register, by default.
const REGISTRATION_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(events_arrive_in_order_and_adjustments_apply, 60),
        case!(network_namespace_is_passed_to_plugins, 60),
        case!(refusals_leave_nothing_behind, 90),
        case!(hostile_plugins_are_disconnected, 60),
        case!(launched_plugins_are_synchronized_and_reaped, 120),
    ]
}

fn socket(ctx: &Context) -> PathBuf {
    ctx.node.dir.join("nri.sock")
}

/// Fails unless the call failed with an error that contains all of these words.
fn refused<T>(outcome: Result<T>, words: &[&str]) -> Result {
    match outcome {
        Ok(_) => Err(Failure(format!(
            "the call succeeded, expected an error with {words:?}"
        ))),
        Err(Failure(text)) => {
            let missing: Vec<_> = words.iter().filter(|word| !text.contains(*word)).collect();
            ensure!(missing.is_empty(), "{missing:?} not found in: {text}");
            Ok(())
        }
    }
}

async fn events_arrive_in_order_and_adjustments_apply(ctx: Context) -> Result {
    let adjust = Adjust {
        env: vec![Pair {
            key: "FROM_NRI".into(),
            value: "yes".into(),
        }],
        mounts: vec![Mount {
            destination: "/from-nri".into(),
            kind: "tmpfs".into(),
            source: "tmpfs".into(),
            options: vec!["size=1m".into()],
        }],
        rlimits: vec![Rlimit {
            kind: "RLIMIT_NOFILE".into(),
            hard: 777,
            soft: 777,
        }],
        ..Default::default()
    };
    let plugin = Plugin::join(&socket(&ctx), "10", "e2e", move |event| match event {
        "CreateContainer" => Reply::Adjust(adjust.clone()),
        _ => Reply::Fine,
    })
    .await?;
    let pod = Pod::run(&ctx.node, "nri").await?;
    let script =
        "echo env=$FROM_NRI files=$(ulimit -n) type=$(grep -c ' /from-nri tmpfs' /proc/mounts)";
    let short = pod
        .start("short", &ctx.images.base, &["sh", "-c", script])
        .await?;
    short
        .printed("env=yes files=777 type=1", ctx.patience(20))
        .await?;
    // The container exits by itself; the plugin is notified without a CRI call.
    let until_stop = [
        "CreateContainer",
        "ValidateContainerAdjustment",
        "PostCreateContainer",
        "StartContainer",
        "PostStartContainer",
        "StopContainer",
    ];
    poll::until("StopContainer", ctx.patience(20), || async {
        let recorded = plugin.events(&[&short.id]);
        ensure!(recorded.len() >= until_stop.len(), "{recorded:?}");
        Ok(())
    })
    .await?;
    same!(
        plugin.events(&[&short.id]),
        until_stop,
        "events of a short container"
    );
    let long = pod
        .start("long", &ctx.images.base, &["sleep", "1000"])
        .await?;
    // A second plugin receives the running pods and containers.
    let late = Plugin::join(&socket(&ctx), "20", "late", |_| Reply::Fine).await?;
    let common = ctx.shared_pod().await.id;
    let present = late.present().into_iter().filter(|id| *id != common);
    same!(
        present.collect::<Vec<_>>(),
        [pod.id.clone(), long.id.clone()],
        "synchronization of a late plugin"
    );
    short.remove().await?;
    pod.stop().await?;
    pod.stop().await?;
    pod.remove().await?;
    same!(
        plugin.events(&[&short.id])[until_stop.len()..],
        ["RemoveContainer"],
        "the short container's end"
    );
    same!(
        late.events(&[&pod.id, &long.id]),
        [
            "StopContainer",
            "StopPodSandbox",
            "RemoveContainer",
            "RemovePodSandbox"
        ],
        "the pod's end"
    );
    same!(
        plugin.events(&[&pod.id]),
        ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"],
        "events of the pod"
    );
    Ok(())
}

/// Plugins that add interfaces to a pod enter its network namespace by this path.
async fn network_namespace_is_passed_to_plugins(ctx: Context) -> Result {
    let first = Plugin::join(&socket(&ctx), "10", "first", |_| Reply::Fine).await?;
    let pod = Pod::run(&ctx.node, "nri").await?;
    let late = Plugin::join(&socket(&ctx), "20", "late", |_| Reply::Fine).await?;
    let started = first.networks(&pod.id);
    let path = started
        .first()
        .and_then(|e| e.strip_prefix("RunPodSandbox "));
    let Some(path) = path.map(str::to_owned) else {
        crate::bail!("no network namespace at RunPodSandbox: {started:?}");
    };
    ensure!(Path::new(&path).exists(), "{path} does not exist");
    pod.end().await?;
    same!(
        first.networks(&pod.id)[1..],
        [format!("StopPodSandbox {path}"), "RemovePodSandbox".into()],
        "the pod's end"
    );
    same!(
        late.networks(&pod.id)[..1],
        [format!("Synchronize {path}")],
        "synchronization of a late plugin"
    );
    Ok(())
}

async fn refusals_leave_nothing_behind(ctx: Context) -> Result {
    {
        let _no = Plugin::join(&socket(&ctx), "10", "no", |event| match event {
            "RunPodSandbox" => Reply::Refuse("not on this node"),
            _ => Reply::Fine,
        })
        .await?;
        let outcome = Pod::run(&ctx.node, "refused").await;
        refused(outcome, &["10-no", "RunPodSandbox", "not on this node"])?;
        let left = ctx.pods(PodSandboxFilter::default()).await?;
        same!(left.len(), 0, "remaining pods");
    }
    let pod = Pod::run(&ctx.node, "nri").await?;
    {
        let _hooks = Plugin::join(&socket(&ctx), "10", "hooks", |event| match event {
            "CreateContainer" => Reply::Adjust(Adjust {
                hooks: Some(Hooks {
                    prestart: vec![Hook {
                        path: "/bin/hook".into(),
                    }],
                }),
                ..Default::default()
            }),
            _ => Reply::Fine,
        })
        .await?;
        let outcome = pod.create("hooked", &ctx.images.base, &["true"]).await;
        refused(outcome, &["10-hooks", "hooks", "/bin/hook"])?;
    }
    {
        let _greedy = Plugin::join(&socket(&ctx), "10", "greedy", |event| match event {
            "CreateContainer" => Reply::Adjust(Adjust {
                linux: Some(Linux {
                    resources: Some(Resources {
                        memory: Some(Memory {
                            limit: Some(Number { value: 1 << 40 }),
                        }),
                    }),
                }),
                ..Default::default()
            }),
            _ => Reply::Fine,
        })
        .await?;
        let outcome = pod.create("hooked", &ctx.images.base, &["true"]).await;
        let words = ["10-greedy", "linux.resources", "1048576 MiB", "overhead"];
        refused(outcome, &words)?;
    }
    let _hung = Plugin::join(&socket(&ctx), "10", "hung", |event| match event {
        "CreateContainer" => Reply::Hang,
        _ => Reply::Fine,
    })
    .await?;
    let begun = Instant::now();
    // The same name is free again after the refusal.
    let container = pod.start("hooked", &ctx.images.base, &["true"]).await?;
    let limit = Duration::from_secs(2) + ctx.patience(15);
    ensure!(begun.elapsed() < limit, "{:?}", begun.elapsed());
    same!(
        container.exited(ctx.patience(20)).await?.exit_code,
        0,
        "exit code"
    );
    pod.end().await
}

/// Fails unless the daemon closes the connection in time.
async fn closed(mut stream: UnixStream, limit: Duration) -> Result {
    let mut received = Vec::new();
    let read = tokio::time::timeout(limit, stream.read_to_end(&mut received)).await;
    // A reset, if the daemon has not read everything.
    drop(read.during("the connection is closed")?);
    Ok(())
}

async fn hostile_plugins_are_disconnected(ctx: Context) -> Result {
    let socket = socket(&ctx);
    let silent = UnixStream::connect(&socket).await?;
    let mut noise = UnixStream::connect(&socket).await?;
    noise.write_all(&NOISE).await?;
    let pod = Pod::run(&ctx.node, "nri").await?;
    let huge = Adjust {
        env: vec![Pair {
            key: "HUGE".into(),
            value: "x".repeat(MAX_MESSAGE_BYTES),
        }],
        ..Default::default()
    };
    let replies = [
        ("noise", Reply::Noise),
        ("vanish", Reply::Vanish),
        ("huge", Reply::Adjust(huge)),
    ];
    for (name, reply) in replies {
        let plugin = Plugin::join(&socket, "10", name, move |event| match event {
            "CreateContainer" => reply.clone(),
            _ => Reply::Fine,
        })
        .await?;
        let begun = Instant::now();
        let argv = ["sh", "-c", "echo env=$HUGE"];
        let container = pod.start(name, &ctx.images.base, &argv).await;
        let container = container.during(name)?;
        let took = begun.elapsed();
        ensure!(took < ctx.patience(10), "{name}: {took:?}");
        container.printed("env=", ctx.patience(20)).await?;
        same!(
            plugin.events(&[&container.id]),
            ["CreateContainer"],
            "{name}: events of a disconnected plugin"
        );
    }
    closed(noise, ctx.patience(5)).await?;
    closed(silent, REGISTRATION_TIMEOUT + ctx.patience(5)).await?;
    pod.end().await
}

/// Returns the pid of a launched plugin that is running.
fn running(notes: &Path) -> Result<i32> {
    let pid = std::fs::read_to_string(notes.join("pid"))?.parse()?;
    ensure!(Path::new(&format!("/proc/{pid}")).exists(), "{pid} is gone");
    Ok(pid)
}

/// Fails while the process exists, zombies included.
fn gone(pid: i32) -> Result {
    let left = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    ensure!(left.is_empty(), "{left}");
    Ok(())
}

async fn launched_plugins_are_synchronized_and_reaped(ctx: Context) -> Result {
    let dir = ctx.scratch.join("nril");
    let (plugins, configs) = (dir.join("nri/plugins"), dir.join("nri/conf.d"));
    let (good, mortal) = (dir.join("good"), dir.join("mortal"));
    install(&plugins, "10-good", &good)?;
    install(&plugins, "20-mortal", &mortal)?;
    // A file that is not a program and a program that is not a plugin do not affect the others.
    std::fs::write(plugins.join("README"), "x")?;
    std::os::unix::fs::symlink("/bin/false", plugins.join("30-false"))?;
    std::fs::create_dir_all(&configs)?;
    std::fs::write(configs.join("10-good.conf"), "of 10-good")?;
    std::fs::write(configs.join("good.conf"), "of good")?;
    std::fs::write(configs.join("mortal.conf"), "of mortal")?;
    let node = ctx.dedicated_node("nril", |_| {}).await?;
    // The plugins are registered before the first call is served.
    let first = running(&good)?;
    let dies = running(&mortal)?;
    pull(&node, &ctx.images.base).await?;
    let pod = Pod::run(&node, "nril").await?;
    let script = "echo $GOOD, $MORTAL.; sleep 1000";
    let argv = ["sh", "-c", script];
    let a = pod.start("a", &ctx.images.base, &argv).await?;
    let limit = ctx.patience(20);
    a.printed("of 10-good, of mortal.", limit).await?;

    // A plugin that dies does not affect the daemon and is reaped.
    kill(dies)?;
    poll::until("the plugin's end", limit, || async { gone(dies) }).await?;
    let b = pod.start("b", &ctx.images.base, &argv).await?;
    b.printed("of 10-good, .", limit).await?;
    let recorded = std::fs::read_to_string(good.join("events"))?;
    let expected = format!(
        "RunPodSandbox {pod}\nCreateContainer {a}\nValidateContainerAdjustment {a}\nPostCreateContainer {a}\n\
         StartContainer {a}\nPostStartContainer {a}\nCreateContainer {b}",
        pod = pod.id,
        a = a.id,
        b = b.id
    );
    ensure!(recorded.starts_with(&expected), "{recorded}");

    // The plugins end with the daemon, and the next daemon launches them again.
    node.terminate().await?;
    poll::until("the plugin's end", limit, || async { gone(first) }).await?;
    node.serve().await?;
    let second = running(&good)?;
    ensure!(second != first, "the same process");
    running(&mortal)?;
    let present = std::fs::read_to_string(good.join("present"))?;
    for id in [&pod.id, &a.id, &b.id] {
        ensure!(present.contains(id.as_str()), "{id} not in {present}");
    }
    node.kill().await?;
    poll::until("the plugin's end", limit, || async { gone(second) }).await?;
    node.serve().await?;
    pod.end().await
}
