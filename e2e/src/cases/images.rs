//! Images: every manifest form, compression and way to a registry; one download for many callers; resumption; lists,
//! status and removal; what layers become in a guest.

use crate::client::answer;
use crate::image::build::Image;
use crate::image::front::{Fault, Front, Guard};
use crate::image::layer::{Compression, LayerTar};
use crate::image::registry::Registry;
use crate::image::set::ImageSet;
use crate::outcome::Result;
use crate::pod::{Pod, pull, pull_with};
use crate::runner::{Case, Shared, case};
use crate::{ensure, same};
use k8s_cri::v1::*;
use rand::RngCore;
use serde_json::json;

/// base64 of `user:secret`.
const SECRET: &str = "dXNlcjpzZWNyZXQ=";

pub fn cases() -> Vec<Case> {
    vec![
        case("images::index_zstd_and_docker_manifests", 90, forms),
        case("images::layers_in_the_guest", 90, layers_in_guest),
        case("images::list_status_and_filter", 60, list_and_status),
        case("images::by_digest", 60, by_digest),
        case("images::in_use_is_kept_then_nothing_is_left", 90, removal),
        case("images::basic_auth", 60, basic),
        case("images::bearer_auth", 60, bearer),
        case("images::tls_with_an_own_ca", 60, tls),
        case("images::mirror_of_another_host", 60, mirror),
        case(
            "images::mirror_that_fails_is_passed_over",
            60,
            failing_mirror,
        ),
        case("images::many_callers_one_download", 90, one_download),
        case("images::resumes_after_a_cut", 90, resumes),
        case("images::fs_info", 60, fs_info),
    ]
}

/// A node whose registry configuration sends `host` to `server`.
async fn node_with(
    world: &Shared,
    name: &str,
    host: &str,
    server: &str,
) -> Result<std::sync::Arc<crate::node::Node>> {
    world
        .own_node(name, |o| {
            o.registries.push((host.into(), server.into(), None))
        })
        .await
}

async fn image_of(node: &crate::node::Node, reference: &str) -> Result<Option<k8s_cri::v1::Image>> {
    let request = ImageStatusRequest {
        image: Some(ImageSpec {
            image: reference.into(),
            ..Default::default()
        }),
        verbose: false,
    };
    Ok(answer("ImageStatus", node.cri.image().image_status(request).await)?.image)
}

async fn remove(node: &crate::node::Node, reference: &str) -> Result {
    let request = RemoveImageRequest {
        image: Some(ImageSpec {
            image: reference.into(),
            ..Default::default()
        }),
    };
    answer("RemoveImage", node.cri.image().remove_image(request).await)?;
    Ok(())
}

/// An image of one small and several random layers, so that a transfer has a length.
pub fn bulky(set: &ImageSet, layers: usize, bytes: usize) -> Result<Image> {
    let mut all = vec![set.busybox.clone()];
    for i in 0..layers {
        let mut noise = vec![0; bytes];
        rand::rng().fill_bytes(&mut noise);
        let mut tar = LayerTar::default();
        tar.dir("bulk", 0o755)?
            .file(&format!("bulk/{i}"), 0o644, &noise)?;
        all.push(tar.finish(Compression::Gzip)?);
    }
    Ok(Image::new(
        all,
        json!({"Cmd": ["sh"], "Env": ["PATH=/bin"]}),
    ))
}

async fn forms(world: Shared) -> Result {
    pull(&world.node, &world.images.zstd).await?;
    pull(&world.node, &world.images.docker).await?;
    let pod = Pod::run(&world.node, "forms").await?;
    same!(
        pod.sh(&world.images.zstd, "cat /opt/zstd").await?,
        "from a zstd layer\n",
        "zstd layer"
    );
    same!(
        pod.sh(&world.images.docker, "cat /opt/docker").await?,
        "from a docker manifest\n",
        "docker manifest list"
    );
    pod.end().await
}

async fn layers_in_guest(world: Shared) -> Result {
    pull(&world.node, &world.images.layers).await?;
    let pod = Pod::run(&world.node, "layers").await?;
    let see = |script: &'static str| {
        let pod = pod.clone();
        let image = world.images.layers.clone();
        async move { pod.sh(&image, script).await }
    };
    same!(
        see("ls /data; cat /data/stays; ls /opaque; cat /opaque/new").await?,
        "stays\none\nnew\nnew\n",
        "whiteout and opaque directory"
    );
    same!(
        see("cat /dir-to-file /replaced; stat -c %a /replaced; stat -c %a /data/stays").await?,
        "now a file\nnew\n755\n600\n",
        "replaced"
    );
    same!(see("stat -c %i /links/a | grep -qx $(stat -c %i /links/b) && cat /links/b /links/c /links/absolute").await?, "linked\nlinked\none\n", "links");
    same!(
        see("stat -c '%F %t,%T' /links/null; stat -c '%a %u %g' /links/owned").await?,
        "character special file 1,3\n4755 1000 50000\n",
        "device and owner"
    );
    let big: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let sum = crate::image::digest(&big).replace("sha256:", "");
    let zeros = crate::image::digest(&vec![0; 5_000_000]).replace("sha256:", "");
    same!(
        see("sha256sum < /links/big; sha256sum < /links/holes").await?,
        format!("{sum}  -\n{zeros}  -\n"),
        "big files"
    );
    same!(
        see("cat /links/long-name-*").await?,
        "long\n",
        "a name of 200 bytes"
    );
    same!(see("echo x >> /replaced && rm /data/stays && mv /links/a /links/z && mkdir /opaque/old && ls /opaque /data && cat /links/z").await?, "/data:\n\n/opaque:\nnew\nold\nlinked\n", "changes in the writable layer");
    same!(
        see("cat /replaced; ls /data").await?,
        "new\nstays\n",
        "another container's writable layer"
    );
    pod.end().await
}

async fn list_and_status(world: Shared) -> Result {
    let list = answer(
        "ListImages",
        world
            .node
            .cri
            .image()
            .list_images(ListImagesRequest::default())
            .await,
    )?
    .images;
    let base = list
        .iter()
        .find(|i| i.repo_tags.contains(&world.images.base));
    let Some(base) = base else {
        crate::bail!("{} is not among {list:?}", world.images.base)
    };
    same!(
        base.id,
        world.images.base_id,
        "image id is the digest of its configuration"
    );
    let digest = format!("127.0.0.1:5000/base@{}", world.images.base_digest);
    ensure!(
        base.repo_digests.contains(&digest),
        "{digest} is not in {:?}",
        base.repo_digests
    );
    ensure!(base.size > 100_000, "size {}", base.size);
    for reference in [&world.images.base, &world.images.base_id, &digest] {
        same!(
            image_of(&world.node, reference).await?.map(|i| i.id),
            Some(base.id.clone()),
            "ImageStatus {reference}"
        );
    }
    same!(
        image_of(&world.node, "127.0.0.1:5000/none:1").await?,
        None,
        "status of what is not there"
    );
    let filter = ListImagesRequest {
        filter: Some(ImageFilter {
            image: Some(ImageSpec {
                image: world.images.base.clone(),
                ..Default::default()
            }),
        }),
    };
    same!(
        answer(
            "ListImages",
            world.node.cri.image().list_images(filter).await
        )?
        .images
        .len(),
        1,
        "filtered"
    );
    Ok(())
}

async fn by_digest(world: Shared) -> Result {
    let node = world.own_node("dig", |_| {}).await?;
    let reference = format!("127.0.0.1:5000/base@{}", world.images.base_digest);
    pull(&node, &reference).await?;
    let Some(image) = image_of(&node, &reference).await? else {
        crate::bail!("{reference} is not there after the pull")
    };
    same!(
        (image.id, image.repo_tags.len()),
        (world.images.base_id.clone(), 0),
        "an image without a tag"
    );
    pull(&node, &world.images.base).await?;
    let image = image_of(&node, &reference).await?.unwrap_or_default();
    same!(
        image.repo_tags,
        std::slice::from_ref(&world.images.base),
        "the tag that came later"
    );
    Ok(())
}

async fn removal(world: Shared) -> Result {
    let node = world.own_node("rm", |_| {}).await?;
    // The image store; beside it the first pod leaves what is made once of agent and kernel.
    let size = || -> u64 { du(&node.dir.join("root/images")) };
    let empty = size();
    let image = bulky(&world.images, 3, 2 << 20)?;
    let reference = "127.0.0.1:5000/removed:1";
    world.registry.push("removed", "1", &image).await?;
    pull(&node, reference).await?;
    ensure!(
        size() > empty + (6 << 20),
        "an image of 6 MiB takes {} bytes",
        size() - empty
    );
    let pod = Pod::run(&node, "uses").await?;
    let c = pod
        .start("c", reference, &["sh", "-c", "sleep 2; sha256sum /bulk/*"])
        .await?;
    let refused = remove(&node, reference).await;
    c.exited(world.patience(30)).await?;
    same!(
        c.output()?.lines().count(),
        3,
        "files of an image removed under a container ({refused:?})"
    );
    c.remove().await?;
    remove(&node, reference).await?;
    remove(&node, reference).await?;
    same!(
        image_of(&node, reference).await?,
        None,
        "status after removal"
    );
    pod.end().await?;
    let left = size();
    ensure!(
        left <= empty + (64 << 10),
        "{left} bytes after removal, {empty} before the pull"
    );
    Ok(())
}

/// Bytes allocated below `dir`.
fn du(dir: &std::path::Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => du(&entry.path()),
            Ok(_) if entry.file_name().to_string_lossy().contains(".db") => 0,
            Ok(meta) => std::os::unix::fs::MetadataExt::blocks(&meta) * 512,
            Err(_) => 0,
        })
        .sum()
}

async fn basic(world: Shared) -> Result {
    let front = Front::start(&world.registry.host, Guard::Basic(SECRET.into()), vec![]).await?;
    let node = node_with(
        &world,
        "basic",
        &front.host,
        &format!("http://{}", front.host),
    )
    .await?;
    with_credentials(&node, &format!("{}/base:1", front.host)).await
}

async fn bearer(world: Shared) -> Result {
    let front = Front::start(&world.registry.host, Guard::Bearer(SECRET.into()), vec![]).await?;
    let node = node_with(
        &world,
        "bearer",
        &front.host,
        &format!("http://{}", front.host),
    )
    .await?;
    with_credentials(&node, &format!("{}/base:1", front.host)).await?;
    let open = Front::start(&world.registry.host, Guard::Bearer(String::new()), vec![]).await?;
    let node = node_with(&world, "anon", &open.host, &format!("http://{}", open.host)).await?;
    pull(&node, &format!("{}/base:1", open.host)).await?;
    Ok(())
}

async fn with_credentials(node: &crate::node::Node, reference: &str) -> Result {
    let nobody = pull(node, reference).await;
    ensure!(
        nobody
            .as_ref()
            .is_err_and(|e| e.0.contains("Unauthenticated")),
        "without credentials: {nobody:?}"
    );
    let wrong = AuthConfig {
        username: "user".into(),
        password: "WrongPassword".into(),
        ..Default::default()
    };
    let refused = pull_with(node, reference, Some(wrong)).await;
    ensure!(
        refused
            .as_ref()
            .is_err_and(|e| !e.0.contains("WrongPassword")),
        "with a wrong password: {refused:?}"
    );
    let auth = AuthConfig {
        username: "user".into(),
        password: "secret".into(),
        ..Default::default()
    };
    pull_with(node, reference, Some(auth)).await?;
    let encoded = AuthConfig {
        auth: SECRET.into(),
        ..Default::default()
    };
    pull_with(node, reference, Some(encoded)).await?;
    let log = std::fs::read_to_string(node.log())?;
    for secret in ["WrongPassword", SECRET, "e2e-token-of-the-front"] {
        ensure!(
            !log.contains(secret),
            "the daemon's log holds the secret {secret}"
        );
    }
    Ok(())
}

async fn tls(world: Shared) -> Result {
    let registry = Registry::start(&world.install.registry, &world.scratch, 5443, true).await?;
    let image = bulky(&world.images, 1, 100_000)?;
    registry.push("tls", "1", &image).await?;
    let server = format!("https://{}", registry.host);
    let trusted = world
        .own_node("tls", |o| {
            o.registries
                .push((registry.host.clone(), server.clone(), registry.ca.clone()))
        })
        .await?;
    pull(&trusted, "127.0.0.1:5443/tls:1").await?;
    let doubting = node_with(&world, "notls", &registry.host, &server).await?;
    let refused = pull(&doubting, "127.0.0.1:5443/tls:1").await;
    ensure!(
        refused
            .as_ref()
            .is_err_and(|e| e.0.to_lowercase().contains("certificate")),
        "a CA nobody trusts: {refused:?}"
    );
    Ok(())
}

async fn mirror(world: Shared) -> Result {
    let node = node_with(
        &world,
        "mirror",
        "registry.example.test",
        &format!("http://{}", world.registry.host),
    )
    .await?;
    pull(&node, "registry.example.test/base:1").await?;
    let image = image_of(&node, "registry.example.test/base:1")
        .await?
        .unwrap_or_default();
    same!(
        image.repo_tags,
        ["registry.example.test/base:1"],
        "the tag keeps the name that was asked for"
    );
    Ok(())
}

async fn failing_mirror(world: Shared) -> Result {
    let front = Front::start(
        &world.registry.host,
        Guard::Open,
        vec![("/v2/", Fault::Status(503))],
    )
    .await?;
    let node = world.own_node("skip", |_| {}).await?;
    let dir = node.dir.join("certs.d/two.example.test");
    std::fs::create_dir_all(&dir)?;
    let block = |host: &str| {
        format!("[host.\"http://{host}\"]\n  capabilities = [\"pull\", \"resolve\"]\n\n")
    };
    let toml = format!(
        "server = \"http://{0}\"\n\n{1}{2}",
        world.registry.host,
        block(&front.host),
        block(&world.registry.host)
    );
    std::fs::write(dir.join("hosts.toml"), toml)?;
    pull(&node, "two.example.test/base:1").await?;
    Ok(())
}

async fn one_download(world: Shared) -> Result {
    let front = Front::start(&world.registry.host, Guard::Open, vec![]).await?;
    let image = bulky(&world.images, 3, 3 << 20)?;
    world.registry.push("many", "1", &image).await?;
    let node = node_with(
        &world,
        "one",
        &front.host,
        &format!("http://{}", front.host),
    )
    .await?;
    let reference = format!("{}/many:1", front.host);
    futures::future::try_join_all((0..8).map(|_| pull(&node, &reference))).await?;
    pull(&node, &reference).await?;
    for layer in &image.layers {
        same!(
            front.count(&format!("blobs/{}", layer.digest)),
            1,
            "downloads of layer {} for 9 callers",
            layer.digest
        );
    }
    same!(
        front.count(&format!("blobs/{}", image.id()?)),
        1,
        "downloads of the config for 9 callers"
    );
    Ok(())
}

async fn resumes(world: Shared) -> Result {
    let image = bulky(&world.images, 1, 4 << 20)?;
    world.registry.push("cut", "1", &image).await?;
    let layer = image.layers[1].digest.clone();
    let faults = vec![(
        layer.as_str(),
        Fault::Cut {
            after: 1 << 20,
            times: 2,
        },
    )];
    let front = Front::start(&world.registry.host, Guard::Open, faults).await?;
    let node = node_with(
        &world,
        "cut",
        &front.host,
        &format!("http://{}", front.host),
    )
    .await?;
    pull(&node, &format!("{}/cut:1", front.host)).await?;
    let tries = front.count(&layer);
    ensure!(
        tries == 3,
        "{tries} requests for a layer that was cut twice"
    );
    Ok(())
}

async fn fs_info(world: Shared) -> Result {
    let info = answer(
        "ImageFsInfo",
        world
            .node
            .cri
            .image()
            .image_fs_info(ImageFsInfoRequest {})
            .await,
    )?;
    let Some(fs) = info.image_filesystems.first() else {
        crate::bail!("ImageFsInfo names no file system")
    };
    let used = fs.used_bytes.unwrap_or_default().value;
    ensure!((500_000..1 << 32).contains(&used), "used bytes {used}");
    let place = fs.fs_id.clone().unwrap_or_default().mountpoint;
    ensure!(
        std::path::Path::new(&place).is_dir(),
        "mountpoint {place:?}"
    );
    Ok(())
}
