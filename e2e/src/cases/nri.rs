//! NRI plugins: what they are told and in which order, what they may refuse, what they may adjust, and what becomes of those that hang.

use crate::nri::{
    Adjust, Hook, Hooks, Linux, Memory, Mount, Number, Pair, Plugin, Reply, Resources, Rlimit,
    install,
};
use crate::outcome::{Failure, Result};
use crate::pod::{Pod, pull};
use crate::process::kill;
use crate::runner::{Case, Shared, case};
use crate::{ensure, same, wait};
use k8s_cri::v1::PodSandboxFilter;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub fn cases() -> Vec<Case> {
    vec![
        case("nri::events_in_order_and_adjustments", 60, events),
        case("nri::refusals_leave_nothing", 90, refusals),
        case("nri::launched_plugins", 120, launched),
    ]
}

fn socket(world: &Shared) -> PathBuf {
    world.node.dir.join("nri.sock")
}

/// Fails unless the call failed with all of these words.
fn refused<T>(outcome: Result<T>, words: &[&str]) -> Result {
    match outcome {
        Ok(_) => Err(Failure(format!("it went well, without {words:?}"))),
        Err(Failure(text)) => {
            let missing: Vec<_> = words.iter().filter(|word| !text.contains(*word)).collect();
            ensure!(missing.is_empty(), "{missing:?} not in: {text}");
            Ok(())
        }
    }
}

async fn events(world: Shared) -> Result {
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
    let plugin = Plugin::join(&socket(&world), "10", "e2e", move |event| match event {
        "CreateContainer" => Reply::Adjust(adjust.clone()),
        _ => Reply::Fine,
    })
    .await?;
    let pod = Pod::run(&world.node, "nri").await?;
    let script =
        "echo env=$FROM_NRI files=$(ulimit -n) type=$(grep -c ' /from-nri tmpfs' /proc/mounts)";
    let short = pod
        .start("short", &world.images.base, &["sh", "-c", script])
        .await?;
    short
        .printed("env=yes files=777 type=1", world.patience(20))
        .await?;
    // It ends by itself, and the plugin hears of it without anybody's call.
    let until_stop = [
        "CreateContainer",
        "ValidateContainerAdjustment",
        "PostCreateContainer",
        "StartContainer",
        "PostStartContainer",
        "StopContainer",
    ];
    wait::until("StopContainer", world.patience(20), || async {
        let told = plugin.events(&[&short.id]);
        ensure!(told.len() >= until_stop.len(), "{told:?}");
        Ok(())
    })
    .await?;
    same!(
        plugin.events(&[&short.id]),
        until_stop,
        "events of a short container"
    );
    let long = pod
        .start("long", &world.images.base, &["sleep", "1000"])
        .await?;
    // A second plugin finds what runs.
    let late = Plugin::join(&socket(&world), "20", "late", |_| Reply::Fine).await?;
    let common = world.pod().await.id;
    let present = late.present().into_iter().filter(|id| *id != common);
    same!(
        present.collect::<Vec<_>>(),
        [pod.id.clone(), long.id.clone()],
        "what a late plugin is synchronized with"
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

async fn refusals(world: Shared) -> Result {
    {
        let _no = Plugin::join(&socket(&world), "10", "no", |event| match event {
            "RunPodSandbox" => Reply::Refuse("not on this node"),
            _ => Reply::Fine,
        })
        .await?;
        let outcome = Pod::run(&world.node, "refused").await;
        refused(outcome, &["10-no", "RunPodSandbox", "not on this node"])?;
        let left = world.pods(PodSandboxFilter::default()).await?;
        same!(left.len(), 0, "pods left");
    }
    let pod = Pod::run(&world.node, "nri").await?;
    {
        let _hooks = Plugin::join(&socket(&world), "10", "hooks", |event| match event {
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
        let outcome = pod.create("hooked", &world.images.base, &["true"]).await;
        refused(outcome, &["10-hooks", "hooks", "/bin/hook"])?;
    }
    {
        let _greedy = Plugin::join(&socket(&world), "10", "greedy", |event| match event {
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
        let outcome = pod.create("hooked", &world.images.base, &["true"]).await;
        let words = ["10-greedy", "linux.resources", "1048576 MiB", "overhead"];
        refused(outcome, &words)?;
    }
    let _hung = Plugin::join(&socket(&world), "10", "hung", |event| match event {
        "CreateContainer" => Reply::Hang,
        _ => Reply::Fine,
    })
    .await?;
    let begun = Instant::now();
    // Of the same name: the refused one has left nothing.
    let container = pod.start("hooked", &world.images.base, &["true"]).await?;
    let limit = Duration::from_secs(2) + world.patience(15);
    ensure!(begun.elapsed() < limit, "{:?}", begun.elapsed());
    same!(
        container.exited(world.patience(20)).await?.exit_code,
        0,
        "exit code"
    );
    pod.end().await
}

/// The pid of a launched plugin, which runs.
fn running(notes: &Path) -> Result<i32> {
    let pid = std::fs::read_to_string(notes.join("pid"))?.parse()?;
    ensure!(Path::new(&format!("/proc/{pid}")).exists(), "{pid} is gone");
    Ok(pid)
}

/// Fails as long as there is such a process, also one that nobody has waited for.
fn gone(pid: i32) -> Result {
    let left = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    ensure!(left.is_empty(), "{left}");
    Ok(())
}

async fn launched(world: Shared) -> Result {
    let dir = world.scratch.join("nril");
    let (plugins, configs) = (dir.join("nri/plugins"), dir.join("nri/conf.d"));
    let (good, mortal) = (dir.join("good"), dir.join("mortal"));
    install(&plugins, "10-good", &good)?;
    install(&plugins, "20-mortal", &mortal)?;
    // No program, and one that is no plugin: the others are in all the same.
    std::fs::write(plugins.join("README"), "x")?;
    std::os::unix::fs::symlink("/bin/false", plugins.join("30-false"))?;
    std::fs::create_dir_all(&configs)?;
    std::fs::write(configs.join("10-good.conf"), "of 10-good")?;
    std::fs::write(configs.join("good.conf"), "of good")?;
    std::fs::write(configs.join("mortal.conf"), "of mortal")?;
    let node = world.own_node("nril", |_| {}).await?;
    // They are in before the first call is served.
    let first = running(&good)?;
    let dies = running(&mortal)?;
    pull(&node, &world.images.base).await?;
    let pod = Pod::run(&node, "nril").await?;
    let script = "echo $GOOD, $MORTAL.; sleep 1000";
    let argv = ["sh", "-c", script];
    let a = pod.start("a", &world.images.base, &argv).await?;
    let limit = world.patience(20);
    a.printed("of 10-good, of mortal.", limit).await?;

    // One that dies is nobody's trouble, and is no zombie.
    kill(dies)?;
    wait::until("the plugin's end", limit, || async { gone(dies) }).await?;
    let b = pod.start("b", &world.images.base, &argv).await?;
    b.printed("of 10-good, .", limit).await?;
    let told = std::fs::read_to_string(good.join("events"))?;
    let expected = format!(
        "RunPodSandbox {pod}\nCreateContainer {a}\nValidateContainerAdjustment {a}\nPostCreateContainer {a}\n\
         StartContainer {a}\nPostStartContainer {a}\nCreateContainer {b}",
        pod = pod.id,
        a = a.id,
        b = b.id
    );
    ensure!(told.starts_with(&expected), "{told}");

    // They end with the daemon, and the next one launches them again.
    node.terminate().await?;
    wait::until("the plugin's end", limit, || async { gone(first) }).await?;
    node.serve().await?;
    let second = running(&good)?;
    ensure!(second != first, "the same process");
    running(&mortal)?;
    let present = std::fs::read_to_string(good.join("present"))?;
    for id in [&pod.id, &a.id, &b.id] {
        ensure!(present.contains(id.as_str()), "{id} not in {present}");
    }
    node.kill().await?;
    wait::until("the plugin's end", limit, || async { gone(second) }).await?;
    node.serve().await?;
    pod.end().await
}
