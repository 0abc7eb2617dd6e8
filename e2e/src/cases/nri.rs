//! NRI plugins: what they are told and in which order, what they may refuse, what they may adjust, and what becomes of those that hang.

use crate::client::answer;
use crate::nri::{Adjust, Hook, Hooks, Mount, Pair, Plugin, Reply, Rlimit};
use crate::outcome::{Failure, Result};
use crate::pod::Pod;
use crate::runner::{Case, Shared, case};
use crate::{ensure, same, wait};
use k8s_cri::v1::ListPodSandboxRequest;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub fn cases() -> Vec<Case> {
    vec![
        case("nri::events_in_order_and_adjustments", 60, events),
        case("nri::refusals_leave_nothing", 90, refusals),
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
    same!(
        late.present(),
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
        let mut client = world.node.cri.runtime();
        let list = client
            .list_pod_sandbox(ListPodSandboxRequest { filter: None })
            .await;
        same!(answer("ListPodSandbox", list)?.items.len(), 0, "pods left");
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
