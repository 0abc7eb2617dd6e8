//! Malformed images and failing registries: the error names the object, no partial data remains, and the next pull
//! succeeds.

use crate::case;
use crate::failure::{Failure, Result};
use crate::image::build::Image;
use crate::image::digest;
use crate::image::fault_proxy::{Auth, Fault, FaultProxy};
use crate::image::layer::{Compression, LayerTar};
use crate::node::Node;
use crate::pod::{LONG_TIMEOUT, Pod, pull};
use crate::runner::{Case, Context};
use crate::{ensure, same};
use k8s_cri::v1::*;
use serde_json::json;
use std::time::Duration;
use tar::EntryType;

use super::bad_input::expect_error;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(unknown_image_is_not_found, 60),
        case!(wrong_manifest_digest_is_refused, 60),
        case!(truncated_and_corrupt_layers_are_refused, 120),
        case!(wrong_diff_id_is_refused, 60),
        case!(layer_entries_cannot_escape_the_root, 90),
        case!(full_disk_during_pull_frees_partial_data, 90),
        case!(hanging_registry_ends_with_the_call, 60),
    ]
}

async fn unknown_image_is_not_found(ctx: Context) -> Result {
    expect_error(
        &pull(&ctx.node, "127.0.0.1:5000/no/such:tag").await,
        &["127.0.0.1:5000/no/such:tag", "not found|404|unknown"],
    )?;
    expect_error(
        &pull(&ctx.node, "127.0.0.1:5000/base:none").await,
        &["base:none"],
    )?;
    expect_error(
        &pull(&ctx.node, "UPPER CASE is not a reference").await,
        &["reference"],
    )?;
    let pod = Pod::run(&ctx.node, "noimage").await?;
    let outcome = pod
        .create("c", "127.0.0.1:5000/never/pulled:1", &["true"])
        .await
        .map(drop);
    expect_error(&outcome, &["never/pulled:1"])?;
    pod.end().await
}

async fn wrong_manifest_digest_is_refused(ctx: Context) -> Result {
    let proxy = FaultProxy::start(
        &ctx.registry.host,
        Auth::Open,
        vec![("/manifests/", Fault::Corrupt)],
    )
    .await?;
    let node = ctx
        .dedicated_node("wd", |o| {
            o.registries
                .push((proxy.host.clone(), format!("http://{}", proxy.host), None))
        })
        .await?;
    let reference = format!("{}/base@{}", proxy.host, ctx.images.base_digest);
    expect_error(
        &pull(&node, &reference).await,
        &["corrupt|digest", "expected sha256:"],
    )?;
    proxy.set_faults(vec![]);
    pull(&node, &reference).await?;
    Ok(())
}

async fn truncated_and_corrupt_layers_are_refused(ctx: Context) -> Result {
    let image = super::images::bulky(&ctx.images, 1, 1 << 20)?;
    ctx.registry.push("broken", "1", &image).await?;
    let layer = image.layers[1].digest.clone();
    let proxy = FaultProxy::start(&ctx.registry.host, Auth::Open, vec![]).await?;
    let node = ctx
        .dedicated_node("br", |o| {
            o.registries
                .push((proxy.host.clone(), format!("http://{}", proxy.host), None))
        })
        .await?;
    let reference = format!("{}/broken:1", proxy.host);
    proxy.set_faults(vec![(&layer, Fault::Corrupt)]);
    expect_error(
        &pull(&node, &reference).await,
        &["digest|corrupt", &layer[7..19]],
    )?;
    // Part of the layer, then nothing, however often the rest is requested.
    let nothing = Fault::Cut {
        after: 0,
        times: usize::MAX,
    };
    proxy.set_faults(vec![
        (
            &layer,
            Fault::Cut {
                after: 100_000,
                times: 1,
            },
        ),
        (&layer, nothing),
    ]);
    expect_error(
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
    proxy.set_faults(vec![]);
    pull(&node, &reference).await?;
    Ok(())
}

async fn wrong_diff_id_is_refused(ctx: Context) -> Result {
    let mut tar = LayerTar::default();
    tar.file("x", 0o644, b"x")?;
    let mut layer = tar.finish(Compression::Gzip)?;
    layer.diff_id = digest(b"something else");
    let claimed = layer.diff_id.clone();
    let image = Image::new(
        vec![ctx.images.busybox.clone(), layer],
        json!({"Cmd": ["sh"]}),
    );
    ctx.registry.push("liar", "1", &image).await?;
    expect_error(
        &pull(&ctx.node, "127.0.0.1:5000/liar:1").await,
        &["diff", &claimed[7..19]],
    )
}

async fn layer_entries_cannot_escape_the_root(ctx: Context) -> Result {
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
    let pod = Pod::run(&ctx.node, "escape").await?;
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
            vec![ctx.images.busybox.clone(), tar.finish(Compression::Plain)?],
            json!({"Cmd": ["sh"], "Env": ["PATH=/bin"]}),
        );
        ctx.registry
            .push(&format!("escape/{name}"), "1", &image)
            .await?;
        let reference = format!("127.0.0.1:5000/escape/{name}:1");
        // Refused with an error, or confined to the image's root. Both are safe; the host must be unchanged.
        match pull(&ctx.node, &reference).await {
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

async fn full_disk_during_pull_frees_partial_data(ctx: Context) -> Result {
    let options = crate::context::options("full", ctx.backend.vmm(), &ctx.registry);
    let node = Node::prepare(&ctx.scratch, &ctx.install, &options)?;
    let root = node.dir.join("root");
    std::fs::create_dir_all(&root)?;
    let at = root.display().to_string();
    crate::namespaces::run("mount", &["-t", "tmpfs", "-o", "size=8m", "tmpfs", &at])?;
    let outcome = async {
        node.serve().await?;
        let image = super::images::bulky(&ctx.images, 3, 4 << 20)?;
        ctx.registry.push("fat", "1", &image).await?;
        expect_error(
            &pull(&node, "127.0.0.1:5000/fat:1").await,
            &["space|storage full|disk"],
        )?;
        // The failed pull has freed its partial data before it answers.
        pull(&node, &ctx.images.base).await?;
        node.cri
            .runtime()
            .version(VersionRequest::default())
            .await?;
        Ok::<_, Failure>(())
    }
    .await;
    node.kill().await?;
    crate::namespaces::run("umount", &["-l", &at])?;
    outcome
}

async fn hanging_registry_ends_with_the_call(ctx: Context) -> Result {
    let proxy = FaultProxy::start(
        &ctx.registry.host,
        Auth::Open,
        vec![("/blobs/", Fault::Hang)],
    )
    .await?;
    let node = ctx
        .dedicated_node("hang", |o| {
            o.registries
                .push((proxy.host.clone(), format!("http://{}", proxy.host), None))
        })
        .await?;
    let request = PullImageRequest {
        image: Some(ImageSpec {
            image: format!("{}/base:1", proxy.host),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut client = node.cri.image();
    let call = client.pull_image(crate::client::within(Duration::from_secs(3), request));
    let outcome = tokio::time::timeout(LONG_TIMEOUT, call).await?;
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
    proxy.set_faults(vec![]);
    pull(&node, &format!("{}/base:1", proxy.host)).await?;
    Ok(())
}
