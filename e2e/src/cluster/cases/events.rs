//! Honest events: `kubectl describe` of a pod that cannot start names the cause.

use crate::cluster::context::{ClusterContext, POD_TIMEOUT, container};
use crate::cluster::pods::{IDLE, script};
use crate::cluster::until;
use crate::failure::{During, Result};
use crate::namespaces::run;
use crate::runner::Case;
use crate::{case, ensure};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;

type Context = Arc<ClusterContext>;

pub(super) fn cases() -> Vec<Case<ClusterContext>> {
    vec![
        case!(missing_image_is_an_event, 120),
        case!(failed_network_is_an_event, 240),
        case!(failed_boot_is_an_event, 240),
        case!(node_without_kvm_is_an_event, 240),
        case!(too_little_memory_is_an_event, 240),
    ]
}

/// Device of KVM.
const KVM: &str = "/dev/kvm";

async fn missing_image_is_an_event(ctx: Context) -> Result {
    let missing = "127.0.0.1:5000/missing:1";
    let mut object = script("missing", "true");
    object["spec"]["containers"][0]["image"] = json!(missing);
    ctx.kubectl.apply(&object).await?;
    ctx.wait("missing", "waits for its image", |pod| {
        let reason = &container(pod, "main")["state"]["waiting"]["reason"];
        reason == "ErrImagePull" || reason == "ImagePullBackOff"
    })
    .await?;
    let text = ctx.kubectl.run(&["describe", "pod", "missing"]).await?;
    ensure!(
        text.contains(missing) && text.contains("not found"),
        "{text}"
    );
    Ok(())
}

/// Creates a pod that cannot start and waits until its description contains all of these texts. Removes the pod.
async fn described(ctx: &Context, name: &str, texts: &[&str]) -> Result {
    ctx.kubectl.apply(&script(name, IDLE)).await?;
    until(
        "the cause in the pod's description",
        POD_TIMEOUT,
        || async {
            let text = ctx.kubectl.run(&["describe", "pod", name]).await?;
            ensure!(texts.iter().all(|part| text.contains(part)), "{text}");
            Ok(())
        },
    )
    .await?;
    ctx.kubectl.run(&["delete", "pod", name]).await.map(drop)
}

/// Replaces a text in a file of the node while `act` runs, with the runtime restarted before and after.
async fn with_change(
    ctx: &Context,
    file: &Path,
    from: &str,
    to: &str,
    act: impl Future<Output = Result>,
) -> Result {
    let node = &ctx.cluster.worker.node;
    let original = std::fs::read_to_string(file).during(file.display())?;
    ensure!(original.contains(from), "{from} is not in {original}");
    node.terminate().await?;
    std::fs::write(file, original.replace(from, to))?;
    node.serve().await?;
    let done = act.await;
    node.terminate().await?;
    std::fs::write(file, original)?;
    node.serve().await?;
    done
}

/// The bridge plugin refuses a name that is too long for an interface.
async fn failed_network_is_an_event(ctx: Context) -> Result {
    let file = ctx.cluster.worker.node.dir.join("cni/10-e2e.conflist");
    let texts = [
        "FailedCreatePodSandBox",
        "bridge",
        "bx-much-too-long-a-name",
    ];
    let act = described(&ctx, "unconnected", &texts);
    with_change(
        &ctx,
        &file,
        "\"bridge\": \"bx",
        "\"bridge\": \"bx-much-too-long-a-name",
        act,
    )
    .await
}

/// The agent is a program that ends: the guest's kernel panics.
async fn failed_boot_is_an_event(ctx: Context) -> Result {
    let config = ctx.cluster.worker.node.dir.join("config.toml");
    let broken = ctx.cluster.dir.join("broken-agent");
    std::fs::copy("/bin/true", &broken)?;
    let text = std::fs::read_to_string(&config)?;
    let line = text
        .lines()
        .find(|line| line.starts_with("guest = "))
        .unwrap_or_default();
    let other = format!("guest = \"{}\"", broken.display());
    let act = described(&ctx, "unbootable", &["FailedCreatePodSandBox", "console"]);
    with_change(&ctx, &config, line, &other, act).await
}

/// The node's configuration demands libkrun, and its /dev/kvm is missing or another device.
async fn node_without_kvm_is_an_event(ctx: Context) -> Result {
    let config = ctx.cluster.worker.node.dir.join("config.toml");
    let exists = Path::new(KVM).exists();
    if exists {
        run("mount", &["--bind", "/dev/null", KVM])?;
    }
    let act = described(&ctx, "accelerated", &["FailedCreatePodSandBox", KVM]);
    let done = with_change(&ctx, &config, "vmm = \"auto\"", "vmm = \"krun\"", act).await;
    if exists {
        run("umount", &[KVM])?;
    }
    done
}

/// A container that cannot even start within its limit.
async fn too_little_memory_is_an_event(ctx: Context) -> Result {
    let mut object = script("starved", IDLE);
    object["spec"]["containers"][0]["resources"] = json!({"limits": {"memory": "64Ki"}});
    ctx.kubectl.apply(&object).await?;
    until(
        "the cause in the pod's description",
        POD_TIMEOUT,
        || async {
            let text = ctx.kubectl.run(&["describe", "pod", "starved"]).await?;
            // The text before the events has the limit itself.
            let events = text
                .split_once("\nEvents:")
                .map_or("", |(_, events)| events);
            ensure!(events.contains("memory"), "{text}");
            Ok(())
        },
    )
    .await
}
