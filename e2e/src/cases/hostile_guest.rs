//! A guest whose kernel is hostile: it sends raw requests to the file server of its share and invalid queues to its VMM
//! ([`crate::attack`]). It reaches no file of the host, the other pods and the daemon do not notice it, and it is removed as any pod.

use super::security_context;
use crate::attack::MARK;
use crate::case;
use crate::context::Backend;
use crate::failure::{During, Result};
use crate::pod::{Pod, container_spec};
use crate::process::{family, rss};
use crate::runner::{Case, Context};
use crate::{ensure, poll, probe, same};
use boxlite_sys::sync::Mutex;
use k8s_cri::v1::*;
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(requests_for_files_outside_of_the_share_reach_nothing, 180),
        case!(random_requests_stay_in_their_vm, 180),
        case!(invalid_queues_stay_in_their_vm, 180),
    ]
}

/// Most pods for the queues: an attempt may end the VMM, and the next pod continues after it.
const QUEUE_PODS: usize = 3;
/// Time without a new attempt after which the VM is taken to have stopped.
const SILENCE: Duration = Duration::from_secs(8);
/// Most memory of the shim while its guest attacks.
const SHIM_BYTES: u64 = 128 << 20;

async fn requests_for_files_outside_of_the_share_reach_nothing(ctx: Context) -> Result {
    let secret = ctx.node.dir.join("secret");
    std::fs::write(&secret, "a secret of the host\n")?;
    let secret = secret.display().to_string();
    let targets = [
        secret.as_str(),
        "/etc/passwd",
        "/etc/shadow",
        "/proc/self/environ",
    ];
    let output = attack(&ctx, "files", &targets).await?;
    ensure!(
        output.contains("\"done\""),
        "the attack did not end: {output}"
    );
    judge(&ctx, &output, &targets)
}

async fn random_requests_stay_in_their_vm(ctx: Context) -> Result {
    let output = attack(&ctx, "requests", &[]).await?;
    ensure!(
        output.contains("\"operation\""),
        "nothing was tried: {output}"
    );
    Ok(())
}

async fn invalid_queues_stay_in_their_vm(ctx: Context) -> Result {
    let mut first = 0;
    for _ in 0..QUEUE_PODS {
        let output = attack(&ctx, "queues", &[&first.to_string()]).await?;
        let tried = output.lines().rfind(|line| line.contains("\"number\""));
        let Some(last) = tried else {
            ensure!(first > 0, "nothing was tried: {output}");
            break;
        };
        let last: Value = serde_json::from_str(last)?;
        first = last["number"].as_u64().unwrap_or_default() + 1;
        if output.contains("\"done\"") {
            break;
        }
    }
    Ok(())
}

/// Runs an attack in a dedicated pod to its end, or to the end of the VM. Returns its output once the pod is removed.
async fn attack(ctx: &Context, aim: &str, targets: &[&str]) -> Result<String> {
    let neighbor = ctx.shared_pod().await;
    let beside = neighbor
        .start("beside", &ctx.images.base, &["sleep", "1000"])
        .await?;
    let pod = Pod::run(&ctx.node, "hostile").await?;
    let mut config = container_spec("attack", &ctx.images.base, &["/attack", "attack", aim]);
    config
        .command
        .extend(targets.iter().map(|&target| target.to_owned()));
    config.mounts = probe::mounts("/attack")?;
    security_context(&mut config).privileged = true;
    let attacker = pod.start_with(config).await?;
    attacker.printed("\"taken\"", ctx.patience(20)).await?;
    same!(
        beside.out(&["echo", "fine"]).await?,
        "fine\n",
        "a neighbor during the attack"
    );
    // A file server in an endless loop stops the VM: the attack has ended, too, when it makes no new attempt.
    let seen = Mutex::new((0, Instant::now()));
    poll::until("the end of the attack", ctx.patience(60), || async {
        let dead = pod.status().await?.state() == PodSandboxState::SandboxNotready;
        let output = attacker.output()?;
        let mut seen = seen.lock();
        if output.len() > seen.0 {
            *seen = (output.len(), Instant::now());
        }
        let silent = seen.1.elapsed() > SILENCE;
        ensure!(dead || silent || output.contains("\"done\""), "it goes on");
        Ok(())
    })
    .await?;
    if let Ok((shim, _)) = family(&pod.id) {
        let bytes = rss(shim) * 4096;
        ensure!(bytes < SHIM_BYTES, "the shim has {} MiB", bytes >> 20);
    }
    let output = attacker.output()?;
    pod.end().await?;
    same!(
        beside.out(&["echo", "fine"]).await?,
        "fine\n",
        "a neighbor after the attack"
    );
    neighbor.empty().await?;
    Ok(output)
}

/// Checks that nothing of the host was read or made.
fn judge(ctx: &Context, output: &str, targets: &[&str]) -> Result {
    let mut reached = Vec::new();
    for line in output.lines() {
        let attempt: Value = serde_json::from_str(line).during(line)?;
        let Some(path) = attempt["path"].as_str() else {
            continue;
        };
        if attempt["mode"].is_number() && !path.starts_with(MARK) {
            reached.push(path.to_owned());
        }
        let content = attempt["content"].as_str().unwrap_or_default();
        for target in targets {
            let own = std::fs::read(target).unwrap_or_default();
            let own = String::from_utf8_lossy(&own);
            let first = own.lines().next().unwrap_or_default();
            ensure!(
                first.is_empty() || !content.contains(first),
                "{path} is the host's {target}"
            );
        }
    }
    ensure!(output.contains("\"path\""), "nothing was tried: {output}");
    if ctx.backend == Backend::Qemu {
        ensure!(reached.is_empty(), "virtiofsd followed {reached:?}");
    }
    for dir in [Path::new("/"), Path::new("/tmp"), &ctx.node.dir] {
        for entry in std::fs::read_dir(dir)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            ensure!(
                !name.contains(MARK),
                "{} was made by the guest",
                entry.path().display()
            );
        }
    }
    Ok(())
}
