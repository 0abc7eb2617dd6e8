//! Images: every manifest form, compression and registry access, shared and resumed downloads, lists, status, removal,
//! and layers as the guest sees them.

use super::bad_input::expect_error;
use crate::case;
use crate::client::answer;
use crate::failure::Result;
use crate::image::build::Image;
use crate::image::fault_proxy::{Auth, Fault, FaultProxy};
use crate::image::layer::{Compression, LayerTar};
use crate::image::registry::Registry;
use crate::image::set::ImageSet;
use crate::pod::{Pod, container_spec, pull, pull_with};
use crate::runner::{Case, Context};
use crate::{ensure, probe, same};
use k8s_cri::v1::*;
use rand::RngCore;
use serde_json::json;

/// Base64 of `user:secret`.
const SECRET: &str = "dXNlcjpzZWNyZXQ=";

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(every_manifest_form_is_pulled, 90),
        case!(layers_are_merged_in_the_guest, 90),
        case!(repeated_layers_are_used_once, 60),
        case!(image_volumes_are_writable_in_read_only_root, 90),
        case!(image_without_layers_has_an_empty_root, 60),
        case!(list_status_and_filter_agree, 60),
        case!(image_is_pulled_by_digest, 60),
        case!(image_in_use_is_kept_until_unused, 90),
        case!(basic_auth_is_supported, 60),
        case!(bearer_auth_is_supported, 60),
        case!(tls_with_a_private_ca_is_supported, 60),
        case!(mirror_serves_another_host, 60),
        case!(failing_mirror_is_skipped, 60),
        case!(concurrent_pulls_share_one_download, 90),
        case!(interrupted_download_resumes, 90),
        case!(image_fs_info_counts_the_store, 60),
    ]
}

/// Starts a node whose registry configuration maps `host` to `server`.
async fn node_with(
    ctx: &Context,
    name: &str,
    host: &str,
    server: &str,
) -> Result<std::sync::Arc<crate::node::Node>> {
    ctx.dedicated_node(name, |o| {
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

/// Creates an image of one small and several random layers, so that a transfer takes time.
pub(crate) fn bulky(set: &ImageSet, layers: usize, bytes: usize) -> Result<Image> {
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

async fn every_manifest_form_is_pulled(ctx: Context) -> Result {
    pull(&ctx.node, &ctx.images.zstd).await?;
    pull(&ctx.node, &ctx.images.docker).await?;
    let pod = Pod::run(&ctx.node, "forms").await?;
    same!(
        pod.sh(&ctx.images.zstd, "cat /opt/zstd").await?,
        "from a zstd layer\n",
        "zstd layer"
    );
    same!(
        pod.sh(&ctx.images.docker, "cat /opt/docker").await?,
        "from a docker manifest\n",
        "docker manifest list"
    );
    pod.end().await
}

async fn layers_are_merged_in_the_guest(ctx: Context) -> Result {
    pull(&ctx.node, &ctx.images.layers).await?;
    let pod = Pod::run(&ctx.node, "layers").await?;
    let see = |script: &'static str| {
        let pod = pod.clone();
        let image = ctx.images.layers.clone();
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

/// Runs an image whose manifest lists layers several times, as equal COPY steps and empty layers produce.
async fn repeated_layers_are_used_once(ctx: Context) -> Result {
    let layer = |content: &[u8]| {
        let mut tar = LayerTar::default();
        tar.file("repeated", 0o644, content)?;
        tar.finish(Compression::Gzip)
    };
    let (a, b) = (layer(b"a\n")?, layer(b"b\n")?);
    let empty = LayerTar::default().finish(Compression::Gzip)?;
    let busybox = ctx.images.busybox.clone();
    let layers = vec![
        busybox,
        empty.clone(),
        a.clone(),
        b,
        empty.clone(),
        a,
        empty,
    ];
    let image = Image::new(layers, json!({"Cmd": ["sh"]}));
    ctx.registry.push("repeated", "1", &image).await?;
    let reference = format!("{}/repeated:1", ctx.registry.host);
    pull(&ctx.node, &reference).await?;
    let pod = ctx.shared_pod().await;
    same!(
        pod.sh(&reference, "cat /repeated").await?,
        "a\n",
        "the topmost layer"
    );
    pod.end().await
}

/// Runs a program from a volume in an image without layers, as `FROM scratch` with labels only produces.
async fn image_volumes_are_writable_in_read_only_root(ctx: Context) -> Result {
    let mut tar = LayerTar::default();
    tar.dir("data", 0o755)?
        .file("data/seed", 0o644, b"seed\n")?
        .dir("srv", 0o755)?
        .dir("srv/real", 0o700)?
        .file("srv/real/linked", 0o644, b"linked\n")?
        .symlink("link", "srv/real")?
        .symlink("dangling", "/srv/made")?
        .file("file", 0o644, b"")?;
    let layers = vec![ctx.images.busybox.clone(), tar.finish(Compression::Gzip)?];
    let volumes = json!({"/data": {}, "link": {}, "/dangling": {}, "/new/deep": {}, "/mounted": {}, "/": {},
        "/sys/fs/cgroup": {}, "/../data/": {}});
    let config = json!({"Env": ["PATH=/bin"], "Volumes": volumes});
    let image = Image::new(layers.clone(), config);
    ctx.registry.push("volumes", "1", &image).await?;
    let reference = format!("{}/volumes:1", ctx.registry.host);
    pull(&ctx.node, &reference).await?;
    let pod = ctx.shared_pod().await;
    let explicit = super::volumes::volume_dir(&ctx, "explicit")?;
    let spec = |name: &str, read_only: bool| {
        let mut config = container_spec(name, &reference, &["sleep", "1000"]);
        config.mounts = vec![super::volumes::mount(&explicit, "/mounted")];
        let linux = config.linux.get_or_insert_default();
        let security = linux.security_context.get_or_insert_default();
        security.readonly_rootfs = read_only;
        config
    };
    let write = "cat /data/seed /link/linked; for d in /data /link /dangling /new/deep /mounted /srv/made; do \
        echo $d > $d/new || echo no $d; done; cat /data/new /srv/real/new /srv/made/new /new/deep/new; \
        echo x 2>&- > /root-file && echo written; ls -d /sys/fs/cgroup/cgroup.procs; stat -c %a /srv/real";
    let expected = "seed\nlinked\n/data\n/link\n/srv/made\n/new/deep\n";
    let first = pod.start_with(spec("ro", true)).await?;
    same!(
        first
            .out(&["sh", "-c", &format!("({write}) 2>/dev/null")])
            .await?,
        format!("{expected}/sys/fs/cgroup/cgroup.procs\n700\n"),
        "volumes of the image below a read-only root"
    );
    same!(
        std::fs::read_to_string(explicit.join("new"))?,
        "/mounted\n",
        "the explicit mount wins"
    );
    // Private to the container, also with a writable root.
    let second = pod.start_with(spec("rw", false)).await?;
    same!(
        second.out(&["ls", "/data"]).await?,
        "seed\n",
        "another container's volume"
    );
    same!(
        second
            .out(&["sh", "-c", "grep -c \" /data \" /proc/mounts"])
            .await?,
        "1\n",
        "a mount with a writable root, too"
    );
    first.remove().await?;
    let again = pod.start_with(spec("ro", true)).await?;
    same!(
        again.out(&["ls", "/data"]).await?,
        "seed\n",
        "after the removal"
    );
    let file = Image::new(
        layers,
        json!({"Env": ["PATH=/bin"], "Volumes": {"/file": {}}}),
    );
    ctx.registry.push("volume-file", "1", &file).await?;
    let reference = format!("{}/volume-file:1", ctx.registry.host);
    pull(&ctx.node, &reference).await?;
    let refused = pod.start("file", &reference, &["true"]).await.map(drop);
    expect_error(&refused, &["/file"])?;
    pod.end().await
}

async fn image_without_layers_has_an_empty_root(ctx: Context) -> Result {
    let image = Image::new(Vec::new(), json!({"Cmd": ["/missing"]}));
    ctx.registry.push("no-layers", "1", &image).await?;
    let reference = format!("{}/no-layers:1", ctx.registry.host);
    pull(&ctx.node, &reference).await?;
    let pod = ctx.shared_pod().await;
    let mut spec = container_spec("empty", &reference, &["/lister", "--help"]);
    spec.mounts = probe::mounts("/lister")?;
    let container = pod.start_with(spec).await?;
    let status = container.exited(ctx.patience(30)).await?;
    same!(status.exit_code, 0, "{}", container.output()?);
    // The program of the image itself is missing, and the error has its name.
    let missing = pod.start("missing", &reference, &[]).await.map(drop);
    expect_error(&missing, &["/missing"])?;
    pod.end().await
}

async fn list_status_and_filter_agree(ctx: Context) -> Result {
    let list = answer(
        "ListImages",
        ctx.node
            .cri
            .image()
            .list_images(ListImagesRequest::default())
            .await,
    )?
    .images;
    let base = list.iter().find(|i| i.repo_tags.contains(&ctx.images.base));
    let Some(base) = base else {
        crate::bail!("{} is not among {list:?}", ctx.images.base)
    };
    same!(
        base.id,
        ctx.images.base_id,
        "image id is the digest of its configuration"
    );
    let digest = format!("127.0.0.1:5000/base@{}", ctx.images.base_digest);
    ensure!(
        base.repo_digests.contains(&digest),
        "{digest} is not in {:?}",
        base.repo_digests
    );
    ensure!(base.size > 100_000, "size {}", base.size);
    for reference in [&ctx.images.base, &ctx.images.base_id, &digest] {
        same!(
            image_of(&ctx.node, reference).await?.map(|i| i.id),
            Some(base.id.clone()),
            "ImageStatus {reference}"
        );
    }
    same!(
        image_of(&ctx.node, "127.0.0.1:5000/none:1").await?,
        None,
        "status of an unknown image"
    );
    let filter = ListImagesRequest {
        filter: Some(ImageFilter {
            image: Some(ImageSpec {
                image: ctx.images.base.clone(),
                ..Default::default()
            }),
        }),
    };
    same!(
        answer("ListImages", ctx.node.cri.image().list_images(filter).await)?
            .images
            .len(),
        1,
        "filtered"
    );
    Ok(())
}

async fn image_is_pulled_by_digest(ctx: Context) -> Result {
    let node = ctx.dedicated_node("dig", |_| {}).await?;
    let reference = format!("127.0.0.1:5000/base@{}", ctx.images.base_digest);
    pull(&node, &reference).await?;
    let Some(image) = image_of(&node, &reference).await? else {
        crate::bail!("{reference} not found after the pull")
    };
    same!(
        (image.id, image.repo_tags.len()),
        (ctx.images.base_id.clone(), 0),
        "an image without a tag"
    );
    pull(&node, &ctx.images.base).await?;
    let image = image_of(&node, &reference).await?.unwrap_or_default();
    same!(
        image.repo_tags,
        std::slice::from_ref(&ctx.images.base),
        "the tag pulled later"
    );
    Ok(())
}

async fn image_in_use_is_kept_until_unused(ctx: Context) -> Result {
    let node = ctx.dedicated_node("rm", |_| {}).await?;
    // The image store only: the first pod also creates files derived from the agent and kernel.
    let size = || -> u64 { du(&node.dir.join("root/images")) };
    let empty = size();
    let image = bulky(&ctx.images, 3, 2 << 20)?;
    let reference = "127.0.0.1:5000/removed:1";
    ctx.registry.push("removed", "1", &image).await?;
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
    c.exited(ctx.patience(30)).await?;
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

/// Returns the bytes allocated below `dir`.
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

async fn basic_auth_is_supported(ctx: Context) -> Result {
    let proxy = FaultProxy::start(&ctx.registry.host, Auth::Basic(SECRET.into()), vec![]).await?;
    let node = node_with(
        &ctx,
        "basic",
        &proxy.host,
        &format!("http://{}", proxy.host),
    )
    .await?;
    with_credentials(&node, &format!("{}/base:1", proxy.host)).await
}

async fn bearer_auth_is_supported(ctx: Context) -> Result {
    let proxy = FaultProxy::start(&ctx.registry.host, Auth::Bearer(SECRET.into()), vec![]).await?;
    let node = node_with(
        &ctx,
        "bearer",
        &proxy.host,
        &format!("http://{}", proxy.host),
    )
    .await?;
    with_credentials(&node, &format!("{}/base:1", proxy.host)).await?;
    let open = FaultProxy::start(&ctx.registry.host, Auth::Bearer(String::new()), vec![]).await?;
    let node = node_with(&ctx, "anon", &open.host, &format!("http://{}", open.host)).await?;
    pull(&node, &format!("{}/base:1", open.host)).await?;
    Ok(())
}

async fn with_credentials(node: &crate::node::Node, reference: &str) -> Result {
    let anonymous = pull(node, reference).await;
    ensure!(
        anonymous
            .as_ref()
            .is_err_and(|e| e.0.contains("Unauthenticated")),
        "without credentials: {anonymous:?}"
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
    for secret in ["WrongPassword", SECRET, "e2e-token-of-the-proxy"] {
        ensure!(
            !log.contains(secret),
            "the daemon's log holds the secret {secret}"
        );
    }
    Ok(())
}

async fn tls_with_a_private_ca_is_supported(ctx: Context) -> Result {
    let registry = Registry::start(&ctx.install.registry, &ctx.scratch, 5443, true).await?;
    let image = bulky(&ctx.images, 1, 100_000)?;
    registry.push("tls", "1", &image).await?;
    let server = format!("https://{}", registry.host);
    let trusted = ctx
        .dedicated_node("tls", |o| {
            o.registries
                .push((registry.host.clone(), server.clone(), registry.ca.clone()))
        })
        .await?;
    pull(&trusted, "127.0.0.1:5443/tls:1").await?;
    let doubting = node_with(&ctx, "notls", &registry.host, &server).await?;
    let refused = pull(&doubting, "127.0.0.1:5443/tls:1").await;
    ensure!(
        refused
            .as_ref()
            .is_err_and(|e| e.0.to_lowercase().contains("certificate")),
        "an untrusted CA: {refused:?}"
    );
    Ok(())
}

async fn mirror_serves_another_host(ctx: Context) -> Result {
    let node = node_with(
        &ctx,
        "mirror",
        "registry.example.test",
        &format!("http://{}", ctx.registry.host),
    )
    .await?;
    pull(&node, "registry.example.test/base:1").await?;
    let image = image_of(&node, "registry.example.test/base:1")
        .await?
        .unwrap_or_default();
    same!(
        image.repo_tags,
        ["registry.example.test/base:1"],
        "the tag has the requested name"
    );
    Ok(())
}

async fn failing_mirror_is_skipped(ctx: Context) -> Result {
    let proxy = FaultProxy::start(
        &ctx.registry.host,
        Auth::Open,
        vec![("/v2/", Fault::Status(503))],
    )
    .await?;
    let node = ctx.dedicated_node("skip", |_| {}).await?;
    let dir = node.dir.join("certs.d/two.example.test");
    std::fs::create_dir_all(&dir)?;
    let block = |host: &str| {
        format!("[host.\"http://{host}\"]\n  capabilities = [\"pull\", \"resolve\"]\n\n")
    };
    let toml = format!(
        "server = \"http://{0}\"\n\n{1}{2}",
        ctx.registry.host,
        block(&proxy.host),
        block(&ctx.registry.host)
    );
    std::fs::write(dir.join("hosts.toml"), toml)?;
    pull(&node, "two.example.test/base:1").await?;
    Ok(())
}

async fn concurrent_pulls_share_one_download(ctx: Context) -> Result {
    let proxy = FaultProxy::start(&ctx.registry.host, Auth::Open, vec![]).await?;
    let image = bulky(&ctx.images, 3, 3 << 20)?;
    ctx.registry.push("many", "1", &image).await?;
    let node = node_with(&ctx, "one", &proxy.host, &format!("http://{}", proxy.host)).await?;
    let reference = format!("{}/many:1", proxy.host);
    futures::future::try_join_all((0..8).map(|_| pull(&node, &reference))).await?;
    pull(&node, &reference).await?;
    for layer in &image.layers {
        same!(
            proxy.count(&format!("blobs/{}", layer.digest)),
            1,
            "downloads of layer {} for 9 callers",
            layer.digest
        );
    }
    same!(
        proxy.count(&format!("blobs/{}", image.id()?)),
        1,
        "downloads of the config for 9 callers"
    );
    Ok(())
}

async fn interrupted_download_resumes(ctx: Context) -> Result {
    let image = bulky(&ctx.images, 1, 4 << 20)?;
    ctx.registry.push("cut", "1", &image).await?;
    let layer = image.layers[1].digest.clone();
    let faults = vec![(
        layer.as_str(),
        Fault::Cut {
            after: 1 << 20,
            times: 2,
        },
    )];
    let proxy = FaultProxy::start(&ctx.registry.host, Auth::Open, faults).await?;
    let node = node_with(&ctx, "cut", &proxy.host, &format!("http://{}", proxy.host)).await?;
    pull(&node, &format!("{}/cut:1", proxy.host)).await?;
    let tries = proxy.count(&layer);
    ensure!(
        tries == 3,
        "{tries} requests for a layer that was cut twice"
    );
    Ok(())
}

async fn image_fs_info_counts_the_store(ctx: Context) -> Result {
    let info = answer(
        "ImageFsInfo",
        ctx.node
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
