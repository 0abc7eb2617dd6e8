//! Random images as seen by the guest's kernel, compared entry by entry with the model from which they were built.

use crate::case;
use crate::failure::{During, Result};
use crate::image::build::Image;
use crate::image::tree;
use crate::lister::Entry;
use crate::pod::{Pod, container_spec, pull};
use crate::runner::{Case, Context};
use crate::{ensure, probe, same};
use serde_json::json;

/// Environment variable with the seed of a run to repeat.
const SEED: &str = "BOXLITE_E2E_SEED";
/// Images per run, and in the emulated KVM host. They share a pod.
const IMAGES: (usize, usize) = (5, 2);

pub(crate) fn cases() -> Vec<Case> {
    vec![case!(random_image_trees_match_the_model, 120)]
}

async fn random_image_trees_match_the_model(ctx: Context) -> Result {
    let seed: u64 = match std::env::var(SEED) {
        Ok(text) => text.parse().during(SEED)?,
        Err(_) => rand::random::<u32>().into(),
    };
    println!("      random trees: {SEED}={seed}");
    let node = ctx.dedicated_node("trees", |_| {}).await?;
    let pod = Pod::run(&node, "trees").await?;
    for number in 0..ctx.rounds(IMAGES.0, IMAGES.1) {
        one_tree(&ctx, &pod, seed + number as u64)
            .await
            .map_err(|e| e.during(format!("{SEED}={seed}, tree {number}")))?;
    }
    pod.end().await
}

async fn one_tree(ctx: &Context, pod: &Pod, seed: u64) -> Result {
    let (layers, model) = tree::random(seed)?;
    let mut all = vec![ctx.images.busybox.clone()];
    all.extend(layers);
    let name = format!("tree{seed}");
    ctx.registry
        .push(&name, "1", &Image::new(all, json!({"Cmd": ["sh"]})))
        .await?;
    let reference = format!("127.0.0.1:5000/{name}:1");
    pull(&pod.node, &reference).await?;
    let top = format!("/{}", tree::TOP);
    let mut spec = container_spec(&name, &reference, &["/lister", "tree", &top]);
    spec.mounts = probe::mounts("/lister")?;
    let container = pod.start_with(spec).await?;
    let status = container.exited(ctx.patience(30)).await?;
    let output = container.output()?;
    same!(status.exit_code, 0, "the lister said {output}");
    let seen: Vec<Entry> = output
        .lines()
        .map(serde_json::from_str)
        .collect::<std::result::Result<_, _>>()?;
    ensure!(model.len() > 15, "a tree of {} entries", model.len());
    if let Err(differences) = tree::compare(&model, &seen) {
        crate::bail!("{differences}");
    }
    container.remove().await
}
