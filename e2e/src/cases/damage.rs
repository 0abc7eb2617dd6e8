//! Damage of the image store, as by a failing disk: noticed at the first use after the daemon's start, reported, and repaired by the
//! next pull.

use crate::case;
use crate::failure::{During, Failure, Result};
use crate::node::Node;
use crate::pod::{Pod, pull};
use crate::runner::{Case, Context};
use crate::{ensure, poll};
use std::os::unix::fs::FileExt;

pub(crate) fn cases() -> Vec<Case> {
    vec![case!(damaged_layer_is_reported_and_fetched_again, 60)]
}

/// Counter of damaged records, files and layers.
const QUARANTINED: &str = "boxlite_quarantined_records_total";

/// Flips a bit in the middle of the largest layer.
fn damage(node: &Node) -> Result {
    let directory = node.dir.join("root/images/layers/sha256");
    let entries = std::fs::read_dir(&directory).during(directory.display())?;
    let mut layers = Vec::new();
    for entry in entries {
        let entry = entry?;
        layers.push((entry.metadata()?.len(), entry.path()));
    }
    let largest = layers.into_iter().max();
    let (bytes, path) = largest.ok_or(Failure("no layers".into()))?;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, bytes / 2)?;
    byte[0] ^= 0x10;
    Ok(file.write_all_at(&byte, bytes / 2)?)
}

async fn damaged_layer_is_reported_and_fetched_again(ctx: Context) -> Result {
    let node = ctx.dedicated_node("damage", |_| {}).await?;
    pull(&node, &ctx.images.base).await?;
    let pod = Pod::run(&node, "damage").await?;
    node.terminate().await?;
    damage(&node)?;
    node.serve().await?;
    // The first container is not delayed by the verification, which may end before or after its creation.
    drop(pod.create("first", &ctx.images.base, &["true"]).await);
    poll::until("the damage is reported", ctx.patience(10), || async {
        let damaged = node.metric(QUARANTINED).await?;
        ensure!(damaged == 1, "{damaged} damaged layers");
        Ok(())
    })
    .await?;
    let log = std::fs::read_to_string(node.log())?;
    ensure!(log.contains("a layer is damaged"), "{log}");
    match pod.create("second", &ctx.images.base, &["true"]).await {
        Ok(_) => crate::bail!("a container was created from a damaged layer"),
        Err(Failure(text)) => ensure!(text.contains("NotFound"), "{text}"),
    }
    pull(&node, &ctx.images.base).await?;
    let third = pod.start("third", &ctx.images.base, &["echo", "whole"]);
    third.await?.printed("whole", ctx.patience(20)).await?;
    pod.end().await?;
    node.terminate().await
}
