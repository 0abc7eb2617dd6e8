//! Faults of registries, networks and disks during a pull, and the cleanup afterwards.

use super::registry::packed;
use super::*;
use crate::fake_shim::SmallDisk;

#[tokio::test]
async fn pull_resumes_broken_download() {
    let (registry, store) = setup().await;
    let tar = layer("a", 1, 300_000);
    let pushed = registry.push("r", "v", &[(&tar, Pack::Gzip)]);
    let size = packed(&tar, Pack::Gzip).len() as u64;
    registry.faults(Faults {
        cut: Some((90_000, 3)),
        ..Faults::default()
    });
    store.pull(&registry.name("r:v")).await.unwrap();
    let ranges = registry.take_ranges(&pushed.blobs[0]);
    assert_eq!(ranges, [None, Some(90_000), Some(180_000), Some(270_000)]);
    assert!(
        registry.sent() < size + 1000,
        "nothing is downloaded twice: {} of {size}",
        registry.sent()
    );
    assert_eq!(store.files("ingest"), Vec::<String>::new());
}

#[tokio::test]
async fn pull_restarts_if_server_ignores_ranges() {
    let (registry, store) = setup().await;
    registry.push("r", "v", &[(&layer("a", 1, 300_000), Pack::Gzip)]);
    registry.faults(Faults {
        cut: Some((200_000, 1)),
        ignore_range: true,
        ..Faults::default()
    });
    let record = store.pull(&registry.name("r:v")).await.unwrap();
    assert_eq!(store.images.layers(&record.id).unwrap().len(), 1);
}

#[tokio::test]
async fn pull_ends_without_progress() {
    let (registry, store) = setup().await;
    registry.push("r", "v", &[(&layer("a", 1, 50_000), Pack::Gzip)]);
    // The manifest and the config arrive; the layer's connections break.
    store.pull(&registry.name("r:v")).await.unwrap();
    registry.push("r", "w", &[(&layer("b", 2, 50_000), Pack::Gzip)]);
    registry.faults(Faults {
        cut: Some((2000, usize::MAX)),
        ..Faults::default()
    });
    let error = store.pull(&registry.name("r:w")).await;
    // 2,000 bytes per connection count as progress.
    error.unwrap();
    registry.push("r", "x", &[(&layer("c", 3, 50_000), Pack::Gzip)]);
    registry.faults(Faults {
        cut: Some((0, usize::MAX)),
        ..Faults::default()
    });
    let error = store.pull(&registry.name("r:x")).await.unwrap_err();
    assert_eq!(
        error.kind(),
        ImageErrorKind::Unavailable,
        "{}",
        error.report()
    );
    assert!(error.report().contains("r:x"), "{}", error.report());
}

#[tokio::test]
async fn pull_of_damaged_blob_names_it_and_cleans_up() {
    type Spoil = fn(&mut Vec<u8>);
    let cases: [(&str, Spoil); 4] = [
        ("a flipped bit", |b| b[25_000] ^= 1),
        ("a cut blob", |b| b.truncate(30_000)),
        ("a longer blob", |b| b.push(0)),
        ("an empty blob", Vec::clear),
    ];
    for (name, spoil) in cases {
        let (registry, store) = setup().await;
        let good = layer("good", 1, 5000);
        let pushed = registry.push(
            "r",
            "v",
            &[(&good, Pack::Gzip), (&layer("bad", 2, 50_000), Pack::Gzip)],
        );
        registry.spoil_blob(&pushed.blobs[1], spoil);
        let error = store.pull(&registry.name("r:v")).await.unwrap_err();
        let text = error.report();
        assert_eq!(error.kind(), ImageErrorKind::Corrupt, "{name}: {text}");
        assert!(
            text.contains("r:v") && text.contains(&pushed.blobs[1]),
            "{name}: {text}"
        );
        store.assert_empty().await;
        // The next pull succeeds.
        registry.push("r", "w", &[(&good, Pack::Gzip)]);
        store.pull(&registry.name("r:w")).await.unwrap();
    }
}

#[tokio::test]
async fn pull_of_invalid_content_is_rejected() {
    let (registry, store) = setup().await;
    let tar = layer("a", 1, 50_000);
    let mut gzip = packed(&tar, Pack::Gzip);
    gzip[20_000..20_100].fill(0);
    let mut evil = ::tar::Builder::new(Vec::new());
    let mut header = ::tar::Header::new_gnu();
    header.as_old_mut().name[..7].copy_from_slice(b"../evil");
    header.set_size(0);
    header.set_cksum();
    evil.append(&header, &b""[..]).unwrap();
    let evil = evil.into_inner().unwrap();
    // The compression is detected from the content, so a damaged gzip can be pushed as "plain".
    for (name, blob, kind, says) in [
        (
            "damaged gzip",
            gzip.clone(),
            ImageErrorKind::Corrupt,
            "gzip stream",
        ),
        (
            "cut gzip",
            packed(&tar, Pack::Gzip)[..20_000].to_vec(),
            ImageErrorKind::Corrupt,
            "gzip stream",
        ),
        (
            "cut zstd",
            packed(&tar, Pack::Zstd)[..20_000].to_vec(),
            ImageErrorKind::Corrupt,
            "zstd stream",
        ),
        ("no tar", vec![7; 3000], ImageErrorKind::Corrupt, "tar"),
        (
            "names out of the tree",
            evil,
            ImageErrorKind::InvalidImage,
            "../evil",
        ),
    ] {
        registry.push_with("r", "v", &[(&blob, Pack::Plain)], false, |_| {});
        let error = store.pull(&registry.name("r:v")).await.unwrap_err();
        let text = error.report();
        assert_eq!(error.kind(), kind, "{name}: {text}");
        assert!(text.contains(says), "{name}: {text}");
        store.assert_empty().await;
    }
    registry.push_with("r", "v", &[(&tar, Pack::Gzip)], false, |c| {
        c["rootfs"]["diff_ids"][0] = format!("sha256:{}", "0".repeat(64)).into();
    });
    let error = store.pull(&registry.name("r:v")).await.unwrap_err();
    assert!(error.report().contains("diff ID"), "{}", error.report());
    store.assert_empty().await;
}

#[tokio::test]
async fn pull_rejects_layer_above_size_limit() {
    let (registry, store) = setup().await;
    drop(store.images);
    let options = RegistryOptions {
        max_layer_bytes: 1 << 20,
        ..options(store.dir.path())
    };
    let images = ImageManager::open(&store.dir.path().join("images"), options)
        .await
        .unwrap();
    let mut bomb = ::tar::Builder::new(Vec::new());
    let mut header = ::tar::Header::new_gnu();
    header.set_size(8 << 20);
    bomb.append_data(
        &mut header,
        "zeros",
        std::io::Read::take(std::io::repeat(0), 8 << 20),
    )
    .unwrap();
    registry.push("r", "v", &[(&bomb.into_inner().unwrap(), Pack::Gzip)]);
    let error = images
        .pull(&registry.name("r:v"), None, None)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ImageErrorKind::TooLarge, "{}", error.report());
}

#[tokio::test]
async fn pull_checks_manifests_and_configs() {
    let (registry, store) = setup().await;
    let tar = layer("a", 1, 50);
    let pushed = registry.push("r", "v", &[(&tar, Pack::Gzip)]);
    let missing = format!("{}@sha256:{}", registry.name("r"), "1".repeat(64));
    let unknown = store
        .pull(&registry.name("nothing:here"))
        .await
        .unwrap_err();
    assert_eq!(unknown.kind(), ImageErrorKind::NotFound);
    assert!(
        unknown.report().contains("nothing:here"),
        "{}",
        unknown.report()
    );
    assert_eq!(
        store.pull(&missing).await.unwrap_err().kind(),
        ImageErrorKind::NotFound
    );
    let by_digest = store
        .pull(&format!("{}:v@{}", registry.name("r"), pushed.manifest))
        .await
        .unwrap();
    assert_eq!(
        (by_digest.repo_tags.len(), by_digest.repo_digests.len()),
        (0, 1)
    );
    registry.put_manifest(
        "r",
        "big",
        "application/json",
        serde_json::json!({ "x": "y".repeat(5 << 20) }),
    );
    let big = store.pull(&registry.name("r:big")).await.unwrap_err();
    assert_eq!(big.kind(), ImageErrorKind::TooLarge, "{}", big.report());
    registry.push_with("arm", "v", &[(&tar, Pack::Gzip)], false, |c| {
        c["architecture"] = "arm64".into()
    });
    let arm = store.pull(&registry.name("arm:v")).await.unwrap_err();
    assert_eq!(arm.kind(), ImageErrorKind::NoPlatform, "{}", arm.report());
    registry.push("r2", "v", &[(&layer("z", 9, 10), Pack::Gzip)]);
    let spoiled = registry.push("r3", "v", &[(&layer("y", 9, 10), Pack::Gzip)]);
    registry.spoil_blob(&spoiled.config, |b| b[0] = b' ');
    let config = store.pull(&registry.name("r3:v")).await.unwrap_err();
    assert_eq!(
        config.kind(),
        ImageErrorKind::Corrupt,
        "{}",
        config.report()
    );
    registry.faults(Faults {
        status: Some(500),
        ..Faults::default()
    });
    let broken = store
        .pull(&registry.name("r2:v"))
        .await
        .unwrap_err()
        .report();
    assert!(
        broken.contains("500") && broken.contains("BROKEN, by order"),
        "{broken}"
    );
}

#[tokio::test]
async fn pull_authenticates_by_basic_and_token() {
    for bearer in [false, true] {
        let (registry, store) = setup().await;
        registry.push("r", "v", &[(&layer("a", 1, 5000), Pack::Gzip)]);
        let pair = Some("user:pass".to_owned());
        registry.faults(if bearer {
            Faults {
                bearer: pair,
                ..Faults::default()
            }
        } else {
            Faults {
                basic: pair,
                ..Faults::default()
            }
        });
        for wrong in [None, auth("user", "other")] {
            let error = store
                .images
                .pull(&registry.name("r:v"), wrong, None)
                .await
                .unwrap_err();
            assert_eq!(
                error.kind(),
                ImageErrorKind::Unauthorized,
                "{}",
                error.report()
            );
            assert!(
                !error.report().contains("other"),
                "no secret in {}",
                error.report()
            );
        }
        let mut elsewhere = auth("user", "pass");
        if let Some(auth) = &mut elsewhere {
            auth.server_address = "https://another.example".into();
        }
        registry.take_requests();
        assert!(
            store
                .images
                .pull(&registry.name("r:v"), elsewhere, None)
                .await
                .is_err()
        );
        assert!(
            registry
                .take_requests()
                .iter()
                .all(|r| r.authorization.is_none())
        );
        store
            .images
            .pull(&registry.name("r:v"), auth("user", "pass"), None)
            .await
            .unwrap();
    }
}

/// A mirror gets neither the registry's token nor its password, whether or not it asks.
#[tokio::test]
async fn mirror_gets_no_credentials_of_the_registry() {
    let (mirror, upstream, store) = (
        Registry::start().await,
        Registry::start().await,
        TestStore::new().await,
    );
    let tar = layer("a", 1, 5000);
    for registry in [&mirror, &upstream] {
        registry.push("x/r", "1", &[(&tar, Pack::Gzip)]);
    }
    let domain = upstream.address.to_string();
    store.hosts(&domain, &format!("[host.'http://{}']\n", mirror.address));
    let reference = upstream.name("x/r:1");
    let token = RegistryAuth {
        registry_token: "tok".into(),
        ..RegistryAuth::default()
    };
    let pair = Some("user:pass".to_owned());
    for (required, auth) in [
        (Faults::default(), Some(token.clone())),
        (
            Faults {
                bearer: pair.clone(),
                ..Faults::default()
            },
            Some(token),
        ),
        (
            Faults {
                basic: pair.clone(),
                ..Faults::default()
            },
            auth("user", "pass"),
        ),
        (
            Faults {
                bearer: pair,
                ..Faults::default()
            },
            auth("user", "pass"),
        ),
    ] {
        mirror.faults(required.clone());
        upstream.faults(required.clone());
        let asks = required.basic.is_some() || required.bearer.is_some();
        let record = store.images.pull(&reference, auth, None).await.unwrap();
        let requests = mirror.take_requests();
        assert!(!requests.is_empty());
        let secret = requests.iter().find(|r| r.authorization.is_some());
        assert!(secret.is_none(), "{secret:?}");
        let used = upstream.take_requests();
        assert_eq!(
            used.iter().any(|r| r.authorization.is_some()),
            asks,
            "{used:?}"
        );
        store.images.remove(&record.id).await.unwrap();
    }
}

#[tokio::test]
async fn redirect_does_not_forward_credentials() {
    let (registry, other, store) = (
        Registry::start().await,
        Registry::start().await,
        TestStore::new().await,
    );
    let tar = layer("a", 1, 5000);
    registry.push("r", "v", &[(&tar, Pack::Gzip)]);
    other.push("r", "v", &[(&tar, Pack::Gzip)]);
    registry.faults(Faults {
        basic: Some("user:pass".into()),
        redirect: Some(format!("http://{}", other.address)),
        ..Faults::default()
    });
    store
        .images
        .pull(&registry.name("r:v"), auth("user", "pass"), None)
        .await
        .unwrap();
    let there = other.take_requests();
    assert!(
        there.len() >= 2 && there.iter().all(|r| r.authorization.is_none()),
        "{there:?}"
    );
}

#[tokio::test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
async fn pull_on_full_disk_names_it_and_cleans_up() {
    let registry = Registry::start().await;
    let disk = SmallDisk::new(1 << 20);
    let images = ImageManager::open(&disk.path().join("images"), options(disk.path()))
        .await
        .unwrap();
    registry.push(
        "r",
        "v",
        &[
            (&layer("a", 1, 100_000), Pack::Gzip),
            (&layer("b", 2, 3 << 20), Pack::Gzip),
        ],
    );
    let error = images
        .pull(&registry.name("r:v"), None, None)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ImageErrorKind::NoSpace, "{}", error.report());
    assert!(
        error.report().contains("no space left") && error.report().contains("images"),
        "{}",
        error.report()
    );
    // Immediately, because the threads of the other layers have ended too.
    let free = nix::sys::statvfs::statvfs(disk.path()).unwrap();
    assert!(
        free.blocks_available() * 100 > free.blocks() * 97,
        "{} of {} blocks are free",
        free.blocks_available(),
        free.blocks()
    );
    for sub in ["layers/sha256", "blobs/sha256", "ingest"] {
        assert_eq!(
            std::fs::read_dir(disk.path().join("images").join(sub))
                .unwrap()
                .count(),
            0,
            "{sub}"
        );
    }
    registry.push("r", "small", &[(&layer("c", 1, 100_000), Pack::Gzip)]);
    images
        .pull(&registry.name("r:small"), None, None)
        .await
        .unwrap();
}

#[tokio::test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
async fn remove_works_on_full_disk() {
    let registry = Registry::start().await;
    let disk = SmallDisk::new(2 << 20);
    let dir = disk.path().join("images");
    let images = ImageManager::open(&dir, options(disk.path()))
        .await
        .unwrap();
    registry.push("r", "v", &[(&layer("a", 1, 100_000), Pack::Gzip)]);
    let record = images
        .pull(&registry.name("r:v"), None, None)
        .await
        .unwrap();
    disk.fill();
    assert!(images.remove(&record.id).await.unwrap());
    assert!(images.list().is_empty());
    assert_eq!(
        std::fs::read_dir(dir.join("layers/sha256"))
            .unwrap()
            .count(),
        0
    );
    images.wait_idle().await;
    drop(images);
    let images = ImageManager::open(&dir, options(disk.path()))
        .await
        .unwrap();
    assert!(images.list().is_empty());
}

#[tokio::test]
async fn partial_downloads_are_bounded_listed_and_reclaimed() {
    let store = TestStore::new().await;
    let ingest = store.dir.path().join("images/ingest");
    let write =
        |n: u8| std::fs::write(ingest.join(format!("{n}.partial")), vec![n; 64 << 10]).unwrap();
    (0..4).for_each(write);
    let info = store.images.fs_info().await.unwrap();
    assert!(info.used_bytes >= 4 * (64 << 10), "{info:?}");
    store.images.reclaim_partials().await.unwrap();
    assert_eq!(store.files("ingest").len(), 4, "below the limit");
    let TestStore { dir, images } = store;
    drop(images);
    let options = RegistryOptions {
        max_partial_bytes: 128 << 10,
        ..options(dir.path())
    };
    let images = ImageManager::open(&dir.path().join("images"), options)
        .await
        .unwrap();
    images.reclaim_partials().await.unwrap();
    let store = TestStore { dir, images };
    assert_eq!(store.files("ingest").len(), 2, "above the limit");
    store.images.remove("none").await.unwrap();
    assert!(store.files("ingest").is_empty(), "a removal needs space");
}

/// Pulls that wait for their registries hold nothing that another pull needs.
#[tokio::test]
async fn slow_registries_do_not_delay_other_pulls() {
    let (fast, store) = setup().await;
    fast.push("r", "v", &[(&layer("fast", 1, 50_000), Pack::Gzip)]);
    let mut slow = Vec::new();
    for seed in 0..4 {
        let registry = Registry::start().await;
        let layers: Vec<Vec<u8>> = (0..3)
            .map(|n| layer(&format!("{seed}-{n}"), 10 * seed + n, 50_000))
            .collect();
        let packs: Vec<(&[u8], Pack)> = layers
            .iter()
            .map(|tar| (tar.as_slice(), Pack::Plain))
            .collect();
        let pushed = registry.push("r", "v", &packs);
        // The config is a blob, too, and arrives in seconds.
        registry.faults(Faults {
            drip_ms: 20,
            ..Faults::default()
        });
        let (images, name) = (store.images.clone(), registry.name("r:v"));
        let pull = tokio::spawn(async move { images.pull(&name, None, None).await });
        slow.push((registry, pushed, pull));
    }
    let started = |(registry, pushed, _): &(Registry, registry::Pushed, _)| {
        let paths = registry.requests();
        let requested = |blob: &String| paths.iter().any(|r| r.path.contains(blob.as_str()));
        pushed.blobs.iter().all(requested)
    };
    let all = async {
        while !slow.iter().all(started) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let limit = std::time::Duration::from_secs(60);
    tokio::time::timeout(limit, all)
        .await
        .expect("all twelve layers are requested");
    tokio::time::timeout(limit, store.pull(&fast.name("r:v")))
        .await
        .expect("the fast pull ends")
        .unwrap();
    for (_, _, pull) in slow {
        assert!(!pull.is_finished(), "the slow pulls still run");
        pull.abort();
    }
}

#[tokio::test]
async fn slow_host_is_left_for_the_next() {
    let (mirror, upstream, store) = (
        Registry::start().await,
        Registry::start().await,
        TestStore::new().await,
    );
    let tar = layer("a", 1, 50_000);
    for registry in [&mirror, &upstream] {
        registry.push("x/r", "1", &[(&tar, Pack::Plain)]);
    }
    store.hosts(
        "reg.example",
        &format!(
            "server = 'http://{}'\n[host.'http://{}']\n",
            upstream.address, mirror.address
        ),
    );
    let TestStore { dir, images } = store;
    drop(images);
    let options = RegistryOptions {
        stall_timeout: std::time::Duration::from_millis(500),
        min_bytes_per_second: 10_000,
        ..options(dir.path())
    };
    let images = ImageManager::open(&dir.path().join("images"), options)
        .await
        .unwrap();
    // 200 bytes per second; the config has some hundred bytes.
    mirror.faults(Faults {
        drip_ms: 50,
        ..Faults::default()
    });
    images.pull("reg.example/x/r:1", None, None).await.unwrap();
    let ranges: Vec<Option<u64>> = upstream
        .take_requests()
        .into_iter()
        .map(|r| r.range)
        .collect();
    assert!(
        matches!(ranges.as_slice(), [Some(offset)] if *offset > 0),
        "resumed at the last byte of the slow host: {ranges:?}"
    );
}

#[tokio::test]
async fn pull_ends_at_its_time_limit() {
    let (registry, store) = setup().await;
    registry.push("r", "v", &[(&layer("a", 1, 50_000), Pack::Plain)]);
    let TestStore { dir, images } = store;
    drop(images);
    let limited = RegistryOptions {
        min_bytes_per_second: 0,
        pull_timeout: std::time::Duration::from_secs(3),
        ..options(dir.path())
    };
    let images = ImageManager::open(&dir.path().join("images"), limited)
        .await
        .unwrap();
    registry.faults(Faults {
        drip_ms: 10,
        ..Faults::default()
    });
    let error = images
        .pull(&registry.name("r:v"), None, None)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ImageErrorKind::Unavailable);
    assert!(
        error.report().contains("not complete after 3 s"),
        "{}",
        error.report()
    );
    images.wait_idle().await;
    let store = TestStore { dir, images };
    assert_eq!(store.files("ingest").len(), 1, "kept for a retry");
}
