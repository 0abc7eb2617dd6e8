//! Corpus of odd images: fields that other tools omit, set to null or write wrongly. Images that run under containerd run
//! here; the others are refused with an error that names the reason, and are not listed.
//!
//! Documents that a registry does not store are covered by the table in `runtime/src/images/manifest/oddities.json`.

use super::bad_input::expect_error;
use crate::case;
use crate::failure::Result;
use crate::image::build::{Blob, Image};
use crate::image::digest;
use crate::image::layer::{Compression, LayerTar};
use crate::pod::{Pod, container_spec, pull};
use crate::runner::{Case, Context};
use crate::{ensure, same};
use k8s_cri::v1::*;
use serde_json::{Value, json};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Content of a blob that is not a layer.
const STATEMENT: &[u8] = b"{\"_type\":\"https://in-toto.io/Statement/v0.1\"}";

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(images_with_odd_configs_run, 120),
        case!(images_with_odd_manifests_run, 120),
        case!(images_that_cannot_run_are_refused, 90),
        case!(undescribed_directories_keep_attributes, 60),
    ]
}

/// Pushes an image whose config and manifest were changed. Returns its manifest.
async fn push(
    ctx: &Context,
    name: &str,
    config: impl FnOnce(&mut Value),
    manifest: impl FnOnce(&mut Value),
) -> Result<Blob> {
    let image = Image::new(
        vec![ctx.images.busybox.clone()],
        json!({"Cmd": ["/bin/sh", "-c", "echo odd $A"], "Env": ["PATH=/bin", "A=b"]}),
    );
    let mut document: Value = serde_json::from_slice(&image.config_blob()?.bytes)?;
    config(&mut document);
    let bytes = document.to_string().into_bytes();
    let mut outer: Value = serde_json::from_slice(&image.manifest()?.bytes)?;
    outer["config"]["digest"] = json!(digest(&bytes));
    outer["config"]["size"] = json!(bytes.len());
    manifest(&mut outer);
    ctx.registry.put_blob(name, &image.layers[0].blob).await?;
    ctx.registry.put_blob(name, &bytes).await?;
    ctx.registry.put_blob(name, STATEMENT).await?;
    let blob = Blob {
        kind: MANIFEST.into(),
        bytes: outer.to_string().into_bytes(),
    };
    ctx.registry.put_manifest(name, "1", &blob).await?;
    let digest = digest(&blob.bytes);
    ctx.registry.put_manifest(name, &digest, &blob).await?;
    Ok(blob)
}

fn entry(blob: &Blob, platform: Value) -> Value {
    let mut entry =
        json!({"mediaType": blob.kind, "digest": digest(&blob.bytes), "size": blob.bytes.len()});
    if !platform.is_null() {
        entry["platform"] = platform;
    }
    entry
}

async fn push_index(ctx: &Context, name: &str, tag: &str, entries: Value) -> Result<Blob> {
    let document = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
    let blob = Blob {
        kind: INDEX.into(),
        bytes: document.to_string().into_bytes(),
    };
    ctx.registry.put_manifest(name, tag, &blob).await?;
    Ok(blob)
}

fn statement() -> Value {
    json!({"mediaType": "application/vnd.in-toto+json", "digest": digest(STATEMENT), "size": STATEMENT.len()})
}

/// Pulls the image and runs the command of its config in the container `container`.
async fn runs(ctx: &Context, pod: &Pod, name: &str, container: &str, expected: &str) -> Result {
    let reference = format!("{}/{name}:1", ctx.registry.host);
    pull(&ctx.node, &reference).await?;
    let run = pod
        .start_with(container_spec(container, &reference, &[]))
        .await?;
    let status = run.exited(ctx.patience(30)).await?;
    same!(run.output()?, expected, "{name} {container}");
    same!(status.exit_code, 0, "{name} {container}");
    run.remove().await
}

async fn images_with_odd_configs_run(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    type Change = fn(&mut Value);
    let changes: [(&str, &str, Change); 14] = [
        ("nulls", "odd b\n", |c| {
            for field in [
                "Entrypoint",
                "Volumes",
                "Labels",
                "ExposedPorts",
                "OnBuild",
                "WorkingDir",
                "User",
                "StopSignal",
                "Healthcheck",
            ] {
                c["config"][field] = Value::Null;
            }
            c["history"] = Value::Null;
            c["created"] = Value::Null;
        }),
        ("null-values", "odd b\n", |c| {
            c["config"]["Labels"] = json!({"a": null});
            c["config"]["ExposedPorts"] = json!({"80": null, "": {}});
        }),
        ("empty-entrypoint", "odd b\n", |c| {
            c["config"]["Entrypoint"] = json!([""])
        }),
        ("env-without-value", "odd\n", |c| {
            c["config"]["Env"] = json!(["A=b", "A", "", "NONE", "=x"]);
        }),
        ("lower-case", "odd l\n", |c| {
            let command = c["config"]["Cmd"].clone();
            c["config"] = json!({"cmd": command, "env": ["PATH=/bin", "A=l"], "user": "0:0"});
        }),
        ("uname-platform", "odd b\n", |c| {
            c["architecture"] = json!("x86_64");
            c["os"] = json!("Linux");
            c["variant"] = json!("v1");
        }),
        ("no-platform", "odd b\n", |c| {
            if let Some(map) = c.as_object_mut() {
                map.retain(|field, _| !matches!(field.as_str(), "os" | "architecture"));
            }
        }),
        ("no-created", "odd b\n", |c| {
            c["created"] = json!("");
        }),
        ("history", "odd b\n", |c| {
            c["history"] = json!([{}, {"created_by": "x", "empty_layer": true}, null]);
        }),
        ("rootfs-without-type", "odd b\n", |c| {
            c["rootfs"] = json!({"diff_ids": c["rootfs"]["diff_ids"]});
        }),
        ("stop-signal", "odd b\n", |c| {
            c["config"]["StopSignal"] = json!("SIGNOPE")
        }),
        ("group-only", "odd b\n", |c| {
            c["config"]["User"] = json!("root:")
        }),
        ("huge-label", "odd b\n", |c| {
            c["config"]["Labels"] = json!({"a": "x".repeat(500_000)});
        }),
        ("unknown-fields", "odd b\n", |c| {
            c["moby.buildkit.cache.v0"] = json!("eyJ9");
            c["container_config"] = json!({"Env": "text", "Cmd": null});
            c["config"]["ArgsEscaped"] = json!(true);
        }),
    ];
    for (name, expected, change) in changes {
        let image = format!("odd/{name}");
        push(&ctx, &image, change, |_| ()).await?;
        runs(&ctx, &pod, &image, name, expected).await?;
    }
    pod.end().await
}

async fn images_with_odd_manifests_run(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let same = |_: &mut Value| ();
    // An attestation in the manifest itself, which is not a layer and has no diff ID.
    push(&ctx, "odd/attested", same, |m| {
        if let Some(layers) = m["layers"].as_array_mut() {
            layers.insert(0, statement());
            layers.push(statement());
        }
    })
    .await?;
    runs(&ctx, &pod, "odd/attested", "attested", "odd b\n").await?;
    push(&ctx, "odd/annotated", same, |m| {
        m["annotations"] = json!({"a": "x".repeat(500_000), "b": ""});
        m["artifactType"] = json!("application/x");
    })
    .await?;
    runs(&ctx, &pod, "odd/annotated", "annotated", "odd b\n").await?;

    let image = push(&ctx, "odd/index", same, same).await?;
    let attestation = push(&ctx, "odd/index", same, |m| {
        m["layers"] = json!([statement()])
    })
    .await?;
    let unknown = json!({"os": "unknown", "architecture": "unknown"});
    let amd64 = json!({"os": "linux", "architecture": "amd64"});
    let indexes = [
        (
            "attestation-first",
            json!([
                entry(&attestation, unknown.clone()),
                entry(&image, amd64.clone())
            ]),
        ),
        ("no-platform", json!([entry(&image, Value::Null)])),
        (
            "uname",
            json!([entry(
                &image,
                json!({"os": "Linux", "architecture": "x86_64", "variant": "v1"})
            )]),
        ),
        (
            "other-variant-first",
            json!([
                entry(
                    &attestation,
                    json!({"os": "linux", "architecture": "amd64", "variant": "v3"})
                ),
                entry(&image, amd64.clone()),
            ]),
        ),
    ];
    for (name, entries) in indexes {
        push_index(&ctx, "odd/index", "1", entries).await?;
        runs(&ctx, &pod, "odd/index", name, "odd b\n").await?;
    }
    let inner = push_index(
        &ctx,
        "odd/index",
        "inner",
        json!([entry(&image, amd64.clone())]),
    )
    .await?;
    push_index(&ctx, "odd/index", "1", json!([entry(&inner, amd64)])).await?;
    runs(&ctx, &pod, "odd/index", "nested", "odd b\n").await?;
    push_index(
        &ctx,
        "odd/index",
        "1",
        json!([entry(&attestation, unknown)]),
    )
    .await?;
    let outcome = pull(&ctx.node, &format!("{}/odd/index:1", ctx.registry.host)).await;
    expect_error(&outcome, &["linux/amd64", "no manifest"])?;
    pod.end().await
}

async fn images_that_cannot_run_are_refused(ctx: Context) -> Result {
    type Change = fn(&mut Value);
    let none: Change = |_| ();
    let refused: [(&str, Change, Change, &str); 9] = [
        (
            "entrypoint-text",
            |c| c["config"]["Entrypoint"] = json!("/bin/sh"),
            none,
            "expected a sequence",
        ),
        (
            "env-text",
            |c| c["config"]["Env"] = json!("A=b"),
            none,
            "expected a sequence",
        ),
        (
            "arm",
            |c| c["architecture"] = json!("aarch64"),
            none,
            "linux/aarch64",
        ),
        (
            "windows",
            |c| c["os"] = json!("windows"),
            none,
            "windows/amd64",
        ),
        (
            "diff-ids",
            |c| c["rootfs"]["diff_ids"] = json!([]),
            none,
            "0 diff ids for 1 layers",
        ),
        (
            "rootfs-type",
            |c| c["rootfs"]["type"] = json!("windows"),
            none,
            "rootfs type \"windows\"",
        ),
        (
            "encrypted",
            none,
            |m| {
                m["layers"][0]["mediaType"] =
                    json!("application/vnd.oci.image.layer.v1.tar+gzip+encrypted");
            },
            "+encrypted",
        ),
        (
            "artifact",
            none,
            |m| m["layers"] = json!([statement()]),
            "application/vnd.in-toto+json",
        ),
        // Another config, since the size of a stored one is not checked again.
        (
            "size",
            |c| c["author"] = json!("size"),
            |m| m["config"]["size"] = json!(7),
            "7 bytes",
        ),
    ];
    for (name, config, manifest, reason) in refused {
        let name = format!("refused/{name}");
        push(&ctx, &name, config, manifest).await?;
        let reference = format!("{}/{name}:1", ctx.registry.host);
        expect_error(&pull(&ctx.node, &reference).await, &[&name, reason])?;
    }
    let list = ListImagesRequest::default();
    let list = ctx.node.cri.image().list_images(list).await?.into_inner();
    let listed = list.images.iter().flat_map(|image| &image.repo_tags);
    for tag in listed {
        ensure!(!tag.contains("/refused/"), "{tag} is listed");
    }
    // A layer with a name but no content is an image, too.
    let mut tar = LayerTar::default();
    tar.dir("empty", 0o755)?;
    let layer = tar.finish(Compression::Gzip)?;
    let image = Image::new(
        vec![ctx.images.busybox.clone(), layer.clone(), layer],
        Value::Null,
    );
    ctx.registry.push("odd/null-config", "1", &image).await?;
    pull(
        &ctx.node,
        &format!("{}/odd/null-config:1", ctx.registry.host),
    )
    .await?;
    Ok(())
}

/// Layers that name files without their directories, as Bazel and ko write them.
async fn undescribed_directories_keep_attributes(ctx: Context) -> Result {
    let mut lower = LayerTar::default();
    lower
        .owned_dir("srv", 0o1777, (1000, 1001))?
        .owned_dir("srv/a", 0o700, (33, 33))?
        .owned_dir("replaced", 0o711, (33, 33))?
        .owned_dir("opaque", 0o711, (33, 33))?;
    let mut middle = LayerTar::default();
    middle.file("srv/a/x", 0o644, b"x")?;
    middle.file(".wh.replaced", 0o644, b"")?.opaque("opaque")?;
    let mut upper = LayerTar::default();
    upper
        .file("srv/a/y", 0o644, b"y")?
        .file("srv/new/z", 0o644, b"z")?
        .file("replaced/x", 0o644, b"x")?
        .file("opaque/x", 0o644, b"x")?;
    let mut layers = vec![ctx.images.busybox.clone()];
    for layer in [lower, middle, upper] {
        layers.push(layer.finish(Compression::Gzip)?);
    }
    let image = Image::new(layers, json!({"Cmd": ["sh"], "Env": ["PATH=/bin"]}));
    ctx.registry.push("odd/directories", "1", &image).await?;
    let reference = format!("{}/odd/directories:1", ctx.registry.host);
    pull(&ctx.node, &reference).await?;
    let pod = ctx.shared_pod().await;
    same!(
        pod.sh(
            &reference,
            "stat -c '%n %a %u %g' /srv /srv/a /srv/new /replaced /opaque; ls /srv/a /replaced"
        )
        .await?,
        "/srv 1777 1000 1001\n/srv/a 700 33 33\n/srv/new 755 0 0\n/replaced 755 0 0\n/opaque 711 33 33\n\
         /replaced:\nx\n\n/srv/a:\nx\ny\n",
        "attributes of directories"
    );
    pod.end().await
}
