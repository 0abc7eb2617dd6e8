//! Bad images and registries: the error names the thing, nothing half-pulled is left, the next pull succeeds.

use crate::image::build::Image;
use crate::image::digest;
use crate::image::front::{Fault, Front, Guard};
use crate::image::layer::{Compression, LayerTar};
use crate::node::Node;
use crate::outcome::{Failure, Result};
use crate::pod::{LONG, Pod, pull};
use crate::runner::{Case, Shared, case};
use crate::{ensure, same};
use k8s_cri::v1::*;
use serde_json::json;
use std::time::Duration;
use tar::EntryType;

use super::bad_input::says;

pub fn cases() -> Vec<Case> {
    vec![
        case("bad::unknown_image", 60, unknown_image),
        case("bad::wrong_digest", 60, wrong_digest),
        case("bad::truncated_and_corrupt_layer", 120, broken_layers),
        case("bad::diff_id_that_lies", 60, wrong_diff_id),
        case("bad::layer_that_leaves_the_tree", 90, escaping_layer),
        case("bad::full_disk_during_pull", 90, full_disk),
        case("bad::registry_that_hangs", 60, hanging_registry),
    ]
}

async fn unknown_image(world: Shared) -> Result {
    says(
        &pull(&world.node, "127.0.0.1:5000/no/such:tag").await,
        &["127.0.0.1:5000/no/such:tag", "not found|404|unknown"],
    )?;
    says(
        &pull(&world.node, "127.0.0.1:5000/base:none").await,
        &["base:none"],
    )?;
    says(
        &pull(&world.node, "UPPER CASE is no reference").await,
        &["reference"],
    )?;
    let pod = Pod::run(&world.node, "noimage").await?;
    let outcome = pod
        .create("c", "127.0.0.1:5000/never/pulled:1", &["true"])
        .await
        .map(drop);
    says(&outcome, &["never/pulled:1"])?;
    pod.end().await
}

async fn wrong_digest(world: Shared) -> Result {
    let front = Front::start(
        &world.registry.host,
        Guard::Open,
        vec![("/manifests/", Fault::Corrupt)],
    )
    .await?;
    let node = world
        .own_node("wd", |o| {
            o.registries
                .push((front.host.clone(), format!("http://{}", front.host), None))
        })
        .await?;
    let reference = format!("{}/base@{}", front.host, world.images.base_digest);
    says(
        &pull(&node, &reference).await,
        &["corrupt|digest", "expected sha256:"],
    )?;
    front.set_faults(vec![]);
    pull(&node, &reference).await?;
    Ok(())
}

async fn broken_layers(world: Shared) -> Result {
    let image = super::images::bulky(&world.images, 1, 1 << 20)?;
    world.registry.push("broken", "1", &image).await?;
    let layer = image.layers[1].digest.clone();
    let front = Front::start(&world.registry.host, Guard::Open, vec![]).await?;
    let node = world
        .own_node("br", |o| {
            o.registries
                .push((front.host.clone(), format!("http://{}", front.host), None))
        })
        .await?;
    let reference = format!("{}/broken:1", front.host);
    front.set_faults(vec![(&layer, Fault::Corrupt)]);
    says(
        &pull(&node, &reference).await,
        &["digest|corrupt", &layer[7..19]],
    )?;
    // One part of it, and then never a byte more, however often the rest is asked for.
    let nothing = Fault::Cut {
        after: 0,
        times: usize::MAX,
    };
    front.set_faults(vec![
        (
            &layer,
            Fault::Cut {
                after: 100_000,
                times: 1,
            },
        ),
        (&layer, nothing),
    ]);
    says(
        &pull(&node, &reference).await,
        &[
            "end|short|closed|truncated|incomplete|body|bytes",
            &layer[7..19],
        ],
    )?;
    let status = node
        .cri
        .image()
        .list_images(ListImagesRequest::default())
        .await?
        .into_inner();
    same!(status.images.len(), 0, "images after broken pulls");
    front.set_faults(vec![]);
    pull(&node, &reference).await?;
    Ok(())
}

async fn wrong_diff_id(world: Shared) -> Result {
    let mut tar = LayerTar::default();
    tar.file("x", 0o644, b"x")?;
    let mut layer = tar.finish(Compression::Gzip)?;
    layer.diff_id = digest(b"something else");
    let claimed = layer.diff_id.clone();
    let image = Image::new(
        vec![world.images.busybox.clone(), layer],
        json!({"Cmd": ["sh"]}),
    );
    world.registry.push("liar", "1", &image).await?;
    says(
        &pull(&world.node, "127.0.0.1:5000/liar:1").await,
        &["diff", &claimed[7..19]],
    )
}

async fn escaping_layer(world: Shared) -> Result {
    let bad: [(&str, EntryType, &str, &str); 5] = [
        (
            "dotdot",
            EntryType::Regular,
            "a/../../escaped-by-dotdot",
            "",
        ),
        ("absolute", EntryType::Regular, "/escaped-by-absolute", ""),
        (
            "hardlink",
            EntryType::Link,
            "stolen",
            "../../../../etc/shadow",
        ),
        ("symlink", EntryType::Symlink, "evil", "/"),
        ("opaque", EntryType::Regular, "../.wh..wh..opq", ""),
    ];
    let pod = Pod::run(&world.node, "escape").await?;
    for (name, kind, path, target) in bad {
        let mut tar = LayerTar::default();
        let content: &[u8] = if kind == EntryType::Regular {
            b"escaped\n"
        } else {
            b""
        };
        tar.raw(kind, path, target, content)?;
        if kind == EntryType::Symlink {
            tar.raw(
                EntryType::Regular,
                "evil/escaped-by-symlink",
                "",
                b"escaped\n",
            )?;
        }
        let image = Image::new(
            vec![
                world.images.busybox.clone(),
                tar.finish(Compression::Plain)?,
            ],
            json!({"Cmd": ["sh"], "Env": ["PATH=/bin"]}),
        );
        world
            .registry
            .push(&format!("escape/{name}"), "1", &image)
            .await?;
        let reference = format!("127.0.0.1:5000/escape/{name}:1");
        // Refused in words, or kept inside the image's own root: both are safe, silence on the host is what counts.
        match pull(&world.node, &reference).await {
            Err(failure) => ensure!(!failure.0.contains("Internal: \n"), "{name}: {failure}"),
            Ok(_) => {
                let text = pod.sh(&reference, "ls -a / | tr '\\n' ' '; true").await?;
                ensure!(
                    text.contains("bin"),
                    "{name}: the image's root is gone: {text}"
                );
            }
        }
        for place in [
            "/escaped-by-dotdot",
            "/escaped-by-absolute",
            "/escaped-by-symlink",
            "/stolen",
        ] {
            ensure!(
                !std::path::Path::new(place).exists(),
                "{name}: {place} exists on the host"
            );
        }
    }
    pod.end().await
}

async fn full_disk(world: Shared) -> Result {
    let options = crate::world::options("full", world.home.vmm(), &world.registry);
    let node = Node::prepare(&world.scratch, &world.install, &options)?;
    let root = node.dir.join("root");
    std::fs::create_dir_all(&root)?;
    let at = root.display().to_string();
    crate::enclave::run("mount", &["-t", "tmpfs", "-o", "size=8m", "tmpfs", &at])?;
    let outcome = async {
        node.serve().await?;
        let image = super::images::bulky(&world.images, 3, 4 << 20)?;
        world.registry.push("fat", "1", &image).await?;
        says(
            &pull(&node, "127.0.0.1:5000/fat:1").await,
            &["space|storage full|disk"],
        )?;
        // What the failed pull had written is free by the time it answers.
        pull(&node, &world.images.base).await?;
        node.cri
            .runtime()
            .version(VersionRequest::default())
            .await?;
        Ok::<_, Failure>(())
    }
    .await;
    node.kill().await?;
    crate::enclave::run("umount", &["-l", &at])?;
    outcome
}

async fn hanging_registry(world: Shared) -> Result {
    let front = Front::start(
        &world.registry.host,
        Guard::Open,
        vec![("/blobs/", Fault::Hang)],
    )
    .await?;
    let node = world
        .own_node("hang", |o| {
            o.registries
                .push((front.host.clone(), format!("http://{}", front.host), None))
        })
        .await?;
    let request = PullImageRequest {
        image: Some(ImageSpec {
            image: format!("{}/base:1", front.host),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut client = node.cri.image();
    let call = client.pull_image(crate::client::within(Duration::from_secs(3), request));
    let outcome = tokio::time::timeout(LONG, call).await?;
    ensure!(
        outcome.is_err(),
        "a pull from a registry that hangs succeeded"
    );
    let list = tokio::time::timeout(
        Duration::from_secs(5),
        node.cri.image().list_images(ListImagesRequest::default()),
    )
    .await?;
    same!(list?.into_inner().images.len(), 0, "images");
    front.set_faults(vec![]);
    pull(&node, &format!("{}/base:1", front.host)).await?;
    Ok(())
}
