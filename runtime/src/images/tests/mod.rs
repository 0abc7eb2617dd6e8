//! Tests of pulls from an in-process registry: success, sharing, and faults.

mod damage;
mod faults;
mod fuzz;
mod registry;
mod sharing;
mod walk;

use std::path::Path;
use std::sync::Arc;

use super::*;
use registry::{Faults, Pack, Registry};

/// Returns a layer of one file, determined by seed and size. Incompressible, so that sizes are predictable.
fn layer(name: &str, seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let body: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(size)
    .collect();
    let mut builder = ::tar::Builder::new(Vec::new());
    let mut header = ::tar::Header::new_gnu();
    header.set_size(size as u64);
    header.set_mode(0o644);
    builder
        .append_data(&mut header, name, body.as_slice())
        .unwrap();
    builder.into_inner().unwrap()
}

/// A store in a temporary directory.
struct TestStore {
    dir: tempfile::TempDir,
    images: ImageManager,
}

fn options(dir: &Path) -> RegistryOptions {
    RegistryOptions {
        certs_dir: dir.join("certs.d"),
        ..RegistryOptions::default()
    }
}

impl TestStore {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let images = ImageManager::open(&dir.path().join("images"), options(dir.path()))
            .await
            .unwrap();
        Self { dir, images }
    }

    /// Closes the store and opens it again, as after a crash of the daemon.
    async fn reopened(self) -> Self {
        let Self { dir, images } = self;
        images.wait_idle().await;
        drop(images);
        let images = ImageManager::open(&dir.path().join("images"), options(dir.path()))
            .await
            .unwrap();
        Self { dir, images }
    }

    /// Returns the names of the files in a directory of the store.
    fn files(&self, sub: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path().join("images").join(sub)).unwrap();
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Asserts that there are no images, layers, blobs and partial files.
    async fn assert_empty(&self) {
        self.images.wait_idle().await;
        assert!(self.images.list().is_empty());
        for sub in [
            "layers/sha256",
            "layers/checksums",
            "blobs/sha256",
            "ingest",
        ] {
            assert_eq!(self.files(sub), Vec::<String>::new(), "{sub}");
        }
    }

    async fn pull(&self, reference: &str) -> ImageResult<ImageRecord> {
        self.images.pull(reference, None, None).await
    }

    fn hosts(&self, name: &str, text: &str) {
        let dir = self.dir.path().join("certs.d").join(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    }
}

/// Starts a registry and opens an empty store.
async fn setup() -> (Registry, TestStore) {
    (Registry::start().await, TestStore::new().await)
}

fn auth(username: &str, password: &str) -> Option<RegistryAuth> {
    Some(RegistryAuth {
        username: username.into(),
        password: password.into(),
        ..RegistryAuth::default()
    })
}

#[tokio::test]
async fn pull_stores_image_and_remove_deletes_it() {
    let (registry, store) = setup().await;
    let layers = [
        layer("a", 1, 100_000),
        layer("b", 2, 70_000),
        layer("c", 3, 10),
    ];
    for (docker, repository) in [(false, "oci"), (true, "docker")] {
        let packs = [
            (layers[0].as_slice(), Pack::Gzip),
            (&layers[1], Pack::Zstd),
            (&layers[2], Pack::Plain),
        ];
        let pushed = registry.push_with(repository, "v1", &packs, docker, |c| {
            c["comment"] = repository.into()
        });
        let reference = registry.name(&format!("{repository}:v1"));
        let (sender, receiver) = tokio::sync::watch::channel(PullProgress::default());
        let record = store
            .images
            .pull(&reference, None, Some(sender))
            .await
            .unwrap();

        assert_eq!(record.id, pushed.config);
        assert_eq!(record.repo_tags, std::slice::from_ref(&reference));
        let digest = format!("{}@{}", registry.name(repository), pushed.manifest);
        assert_eq!(record.repo_digests, std::slice::from_ref(&digest));
        assert_eq!(record.user(), ImageUser::Uid(1000));
        let config = record.config.config().clone().unwrap();
        assert_eq!(
            (config.cmd().clone().unwrap(), record.pinned),
            (vec!["sh".to_owned()], false)
        );
        let files = store.images.layers(&record.id).unwrap();
        assert_eq!(files.len(), 3);
        assert!(
            record.size_bytes > 180_000
                && files
                    .iter()
                    .all(|f| f.path.metadata().unwrap().len() == f.bytes)
        );
        for what in [
            &record.id,
            &reference,
            &digest,
            &record.id[7..],
            &record.id[7..20],
        ] {
            assert_eq!(
                store.images.status(what).map(|r| r.id),
                Some(record.id.clone()),
                "{what}"
            );
        }
        assert!(store.images.status("sha256:").is_none() && store.images.status("").is_none());
        let progress = receiver.borrow().clone();
        assert!(
            progress.done
                && progress
                    .layers
                    .iter()
                    .all(|l| l.received_bytes == l.total_bytes)
        );
    }
    let info = store.images.fs_info().await.unwrap();
    assert!(
        info.used_bytes > 180_000 && info.inodes_used > 8,
        "{info:?}"
    );
    assert_eq!(
        store.files("layers/sha256").len(),
        3,
        "both images have the same layers"
    );
    for record in store.images.list() {
        assert!(store.images.remove(&record.id).await.unwrap());
        assert!(
            !store.images.remove(&record.id).await.unwrap(),
            "removing twice succeeds"
        );
    }
    store.assert_empty().await;
}

#[tokio::test]
async fn pulled_image_survives_restart_and_is_not_downloaded_again() {
    let (registry, store) = setup().await;
    let tar = layer("a", 1, 50_000);
    let pushed = registry.push("r", "v1", &[(&tar, Pack::Gzip), (&tar, Pack::Gzip)]);
    let reference = registry.name("r:v1");
    let first = store.pull(&reference).await.unwrap();
    assert_eq!(
        store.images.layers(&first.id).unwrap().len(),
        2,
        "the same layer twice is two layers"
    );
    let store = store.reopened().await;
    let again = store.images.status(&reference).unwrap();
    assert_eq!(
        (again.id, again.repo_digests, again.size_bytes),
        (first.id, first.repo_digests, first.size_bytes)
    );
    registry.take_requests();
    store.pull(&reference).await.unwrap();
    let paths: Vec<String> = registry
        .take_requests()
        .into_iter()
        .map(|r| r.path)
        .collect();
    assert!(
        paths.iter().all(|p| !p.contains(&pushed.blobs[0])),
        "{paths:?}"
    );
}

#[tokio::test]
async fn open_drops_damaged_images_only() {
    let (registry, store) = setup().await;
    let kept = layer("kept", 1, 5000);
    registry.push("kept", "v", &[(&kept, Pack::Gzip)]);
    registry.push(
        "lost",
        "v",
        &[(&kept, Pack::Gzip), (&layer("lost", 2, 5000), Pack::Gzip)],
    );
    store.pull(&registry.name("kept:v")).await.unwrap();
    let lost = store.pull(&registry.name("lost:v")).await.unwrap();
    std::fs::remove_file(&store.images.layers(&lost.id).unwrap()[1].path).unwrap();
    std::fs::write(store.dir.path().join("images/ingest/layer-leftover"), b"x").unwrap();
    std::fs::write(
        store.dir.path().join("images/layers/sha256/stray.erofs"),
        b"x",
    )
    .unwrap();
    let store = store.reopened().await;
    let left: Vec<String> = store
        .images
        .list()
        .into_iter()
        .flat_map(|r| r.repo_tags)
        .collect();
    assert_eq!(left, [registry.name("kept:v")]);
    assert_eq!(
        (
            store.files("ingest").len(),
            store.files("layers/sha256").len()
        ),
        (0, 1)
    );
    store.pull(&registry.name("lost:v")).await.unwrap();

    let second =
        ImageManager::open(&store.dir.path().join("images"), options(store.dir.path())).await;
    assert_eq!(
        second.expect_err("one process at a time").kind(),
        ImageErrorKind::Config
    );
}

#[tokio::test]
async fn damaged_index_is_rebuilt() {
    type Damage = fn(&Path);
    let cases: [(&str, Damage); 4] = [
        ("empty", |path| std::fs::write(path, "").unwrap()),
        ("cut", |path| {
            let bytes = std::fs::read(path).unwrap();
            std::fs::write(path, &bytes[..100]).unwrap();
        }),
        ("garbage", |path| std::fs::write(path, [0xff; 500]).unwrap()),
        ("gone", |path| std::fs::remove_file(path).unwrap()),
    ];
    for (name, damage) in cases {
        let (registry, mut store) = setup().await;
        let tar = layer("a", 1, 5000);
        let pushed = registry.push("r", "v", &[(&tar, Pack::Gzip)]);
        registry.push("q", "v", &[(&layer("b", 2, 5000), Pack::Gzip)]);
        store.pull(&registry.name("r:v")).await.unwrap();
        store.pull(&registry.name("q:v")).await.unwrap();
        let names = |store: &TestStore| -> Vec<(String, Vec<String>)> {
            let images = store.images.list().into_iter();
            images.map(|image| (image.id, image.repo_tags)).collect()
        };
        let expected = names(&store);
        let index = store.dir.path().join("images/index.json");
        damage(&index);
        store = store.reopened().await;
        assert_eq!(names(&store), expected, "{name}");
        assert_eq!(store.images.quarantined(), 1, "{name}");
        store = store.reopened().await;
        assert_eq!(store.images.quarantined(), 0, "{name}: it is repaired");

        // Without its copy only the names are lost.
        damage(&index);
        damage(&index.with_file_name("index.backup.json"));
        store = store.reopened().await;
        let nameless: Vec<_> = expected
            .iter()
            .map(|(id, _)| (id.clone(), Vec::new()))
            .collect();
        assert_eq!(names(&store), nameless, "{name}");
        registry.take_requests();
        store.pull(&registry.name("r:v")).await.unwrap();
        assert!(registry.take_ranges(&pushed.blobs[0]).is_empty(), "{name}");
        assert!(store.images.status(&registry.name("r:v")).is_some());
    }
    // A newer store is not touched.
    let (registry, store) = setup().await;
    registry.push("r", "v", &[(&layer("a", 1, 10), Pack::Gzip)]);
    store.pull(&registry.name("r:v")).await.unwrap();
    let index = store.dir.path().join("images/index.json");
    std::fs::write(&index, r#"{"version": 2, "images": {"new": "form"}}"#).unwrap();
    let TestStore { dir, images } = store;
    drop(images);
    let error = ImageManager::open(&dir.path().join("images"), options(dir.path()))
        .await
        .expect_err("another version");
    assert!(error.report().contains("version 2"), "{}", error.report());
    assert!(index.exists());
}

#[tokio::test]
async fn tags_move_and_held_images_are_kept() {
    let (registry, store) = setup().await;
    let shared = layer("shared", 1, 5000);
    registry.push(
        "r",
        "latest",
        &[(&shared, Pack::Gzip), (&layer("old", 2, 10), Pack::Gzip)],
    );
    let old = store.pull(&registry.name("r")).await.unwrap();
    registry.push(
        "r",
        "latest",
        &[(&shared, Pack::Gzip), (&layer("new", 3, 10), Pack::Gzip)],
    );
    let new = store.pull(&registry.name("r")).await.unwrap();
    assert_ne!(old.id, new.id);
    let left = store.images.status(&old.id).unwrap();
    assert_eq!((left.repo_tags.len(), left.repo_digests.len()), (0, 1));
    assert_eq!(
        store.images.status(&registry.name("r:latest")).unwrap().id,
        new.id
    );

    store.images.hold(&old.id, "box-1").unwrap();
    store.images.hold(&old.id, "box-2").unwrap();
    let error = store.images.remove(&old.id).await.unwrap_err();
    assert!(
        matches!(&error, ImageError::InUse { holders, .. } if *holders == ["box-1", "box-2"]),
        "{error}"
    );
    assert!(error.to_string().contains("box-1, box-2"), "{error}");
    store.images.release(&old.id, "box-1");
    assert!(store.images.remove(&old.id).await.is_err());
    store.images.release(&old.id, "box-2");
    assert!(store.images.remove(&old.id).await.unwrap());
    assert_eq!(
        store.files("layers/sha256").len(),
        2,
        "the shared layer is kept"
    );
    assert_eq!(
        store.images.hold(&old.id, "box-3").unwrap_err().kind(),
        ImageErrorKind::NotFound
    );
    assert!(
        store
            .images
            .remove(&registry.name("r:latest"))
            .await
            .unwrap()
    );
    store.assert_empty().await;
}

#[tokio::test]
async fn pull_tries_mirrors_before_registry() {
    let (mirror, upstream, store) = (
        Registry::start().await,
        Registry::start().await,
        TestStore::new().await,
    );
    let tar = layer("a", 1, 5000);
    mirror.push("x/both", "1", &[(&tar, Pack::Gzip)]);
    upstream.push("x/up", "1", &[(&tar, Pack::Gzip)]);
    store.hosts(
        "reg.example",
        &format!(
            "server = 'http://{}'\n[host.'http://{}']\n[host.'http://{}'.header]\nx-key = 'k'\n",
            upstream.address, mirror.address, mirror.address
        ),
    );
    let record = store.pull("reg.example/x/both:1").await.unwrap();
    assert_eq!(record.repo_tags, ["reg.example/x/both:1"]);
    assert!(upstream.take_requests().is_empty());
    let asked = mirror.take_requests();
    assert!(
        asked
            .iter()
            .all(|r| r.path.ends_with("?ns=reg.example") && r.key.as_deref() == Some("k")),
        "{asked:?}"
    );
    store.pull("reg.example/x/up:1").await.unwrap();
    assert!(
        upstream.take_requests().iter().all(|r| r.key.is_none()),
        "headers of a mirror are sent to that mirror only"
    );
    let error = store.pull("reg.example/x/none:1").await.unwrap_err();
    assert_eq!(error.kind(), ImageErrorKind::NotFound);
    let text = error.report();
    for part in [
        "reg.example/x/none:1",
        &mirror.address.to_string(),
        &upstream.address.to_string(),
    ] {
        assert!(text.contains(part), "{text}");
    }
    let gone = store.pull("reg.example/x/both@sha256:1").await.unwrap_err();
    assert_eq!(gone.kind(), ImageErrorKind::InvalidReference);
}

/// Checks that the futures are `Send`.
#[tokio::test]
async fn pull_future_is_send() {
    fn sendable<T: Send>(value: T) -> T {
        value
    }
    let store = TestStore::new().await;
    let images = Arc::new(store.images.clone());
    let error = tokio::spawn(sendable(async move {
        images.pull("127.0.0.1:1/x", None, None).await
    }))
    .await
    .unwrap();
    assert_eq!(error.unwrap_err().kind(), ImageErrorKind::Unavailable);
}

#[tokio::test]
async fn overlay_layers_are_distinct_and_never_empty() {
    let (registry, store) = setup().await;
    let (a, b) = (layer("x", 1, 10), layer("x", 2, 10));
    let packs = [&a, &b, &a, &b, &b].map(|tar| (tar.as_slice(), Pack::Gzip));
    registry.push("twice", "v", &packs);
    let twice = store.pull(&registry.name("twice:v")).await.unwrap();
    let stack: Vec<String> = store
        .images
        .overlay_layers(&twice.id)
        .unwrap()
        .into_iter()
        .map(|layer| layer.diff_id)
        .collect();
    let id = |tar: &[u8]| Digest::of(tar).to_string();
    assert_eq!(stack, [id(&a), id(&b)], "the topmost repeat counts");

    registry.push("none", "v", &[]);
    let none = store.pull(&registry.name("none:v")).await.unwrap();
    let empty = store.images.overlay_layers(&none.id).unwrap();
    assert_eq!(empty.len(), 1);
    let magic = &std::fs::read(&empty[0].path).unwrap()[1024..1028];
    assert_eq!(magic, 0xE0F5_E1E2u32.to_le_bytes(), "an EROFS image");
    let store = store.reopened().await;
    store.images.remove(&none.id).await.unwrap();
    assert!(empty[0].path.is_file(), "the empty layer is not collected");
}
