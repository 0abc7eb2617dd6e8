//! Concurrent pulls of one layer, canceled pulls, and resumed downloads.

use std::time::Duration;

use futures::future::join_all;

use super::registry::packed;
use super::*;

#[tokio::test]
async fn concurrent_pulls_download_once() {
    let (registry, store) = setup().await;
    let shared = layer("shared", 1, 100_000);
    let pushed: Vec<_> = (0..6)
        .map(|n| {
            registry.push(
                "r",
                &format!("v{n}"),
                &[
                    (&shared, Pack::Gzip),
                    (&layer("own", 10 + n, 10), Pack::Zstd),
                ],
            )
        })
        .collect();
    registry.faults(Faults {
        delay_ms: 200,
        ..Faults::default()
    });
    let pulls = (0..12).map(|n| {
        let (images, reference) = (
            store.images.clone(),
            registry.name(&format!("r:v{}", n % 6)),
        );
        async move { images.pull(&reference, None, None).await }
    });
    for outcome in join_all(pulls).await {
        outcome.unwrap();
    }
    let requests = registry.take_requests();
    for blob in pushed
        .iter()
        .flat_map(|p| p.blobs.iter().chain([&p.config]))
    {
        assert_eq!(
            requests.iter().filter(|r| r.path.contains(blob)).count(),
            1,
            "{blob}"
        );
    }
    assert_eq!(store.images.list().len(), 6);
}

#[tokio::test]
async fn dropped_pull_is_resumed_after_restart() {
    let (registry, store) = setup().await;
    let tar = layer("a", 1, 3 << 20);
    let pushed = registry.push("r", "v", &[(&tar, Pack::Gzip)]);
    let size = packed(&tar, Pack::Gzip).len() as u64;
    // The first connection gives a third of the blob; then the caller gives up.
    registry.faults(Faults {
        cut: Some((1 << 20, 1)),
        ..Faults::default()
    });
    let (sender, mut progress) = tokio::sync::watch::channel(PullProgress::default());
    let reference = registry.name("r:v");
    let pull = store.images.pull(&reference, None, Some(sender));
    let given_up = async {
        while progress
            .borrow_and_update()
            .layers
            .first()
            .is_none_or(|l| l.received_bytes < 1 << 20)
        {
            progress.changed().await.unwrap();
        }
    };
    tokio::select! {
        biased;
        () = given_up => {}
        outcome = pull => panic!("the pull ended first: {outcome:?}"),
    }
    store.images.wait_idle().await;
    let left = store.files("ingest");
    assert!(left.len() == 1 && left[0].ends_with(".partial"), "{left:?}");
    // A restarted daemon resumes the download.
    let store = store.reopened().await;
    registry.take_requests();
    store.pull(&registry.name("r:v")).await.unwrap();
    let ranges = registry.take_ranges(&pushed.blobs[0]);
    assert_eq!(ranges, [Some(1 << 20)]);
    // Both pulls fetched the config too.
    assert!(
        registry.sent() < size + 10_000,
        "nothing is downloaded twice: {} of {size}",
        registry.sent()
    );
    assert!(store.files("ingest").is_empty());
}

#[tokio::test]
async fn damaged_partial_download_is_restarted() {
    let (registry, store) = setup().await;
    let tar = layer("a", 1, 300_000);
    let pushed = registry.push("r", "v", &[(&tar, Pack::Gzip)]);
    let name = format!(
        "{}-{}.partial",
        &pushed.blobs[0][7..],
        Digest::of(&tar).hex()
    );
    let partial = store.dir.path().join("images/ingest").join(name);
    for damage in [vec![0; 100_000], vec![1; 5 << 20], Vec::new()] {
        std::fs::write(&partial, &damage).unwrap();
        let record = store.pull(&registry.name("r:v")).await.unwrap();
        assert!(!partial.exists());
        store.images.remove(&record.id).await.unwrap();
    }
    store.assert_empty().await;
}

#[tokio::test]
async fn failed_credentials_do_not_affect_other_pull() {
    let (registry, store) = setup().await;
    registry.push("r", "v", &[(&layer("a", 1, 50_000), Pack::Gzip)]);
    registry.faults(Faults {
        delay_ms: 100,
        basic: Some("u:p".into()),
        ..Faults::default()
    });
    let reference = registry.name("r:v");
    let (bad, good) = tokio::join!(
        store.images.pull(&reference, auth("u", "wrong"), None),
        store.images.pull(&reference, auth("u", "p"), None)
    );
    assert_eq!(bad.unwrap_err().kind(), ImageErrorKind::Unauthorized);
    good.unwrap();
}

#[tokio::test]
async fn remove_during_pull_keeps_shared_layers() {
    let (registry, store) = setup().await;
    let shared = layer("shared", 1, 50_000);
    registry.push("a", "v", &[(&shared, Pack::Gzip)]);
    registry.push(
        "b",
        "v",
        &[(&shared, Pack::Gzip), (&layer("b", 2, 10), Pack::Gzip)],
    );
    registry.faults(Faults {
        delay_ms: 5,
        ..Faults::default()
    });
    for _ in 0..15 {
        store.pull(&registry.name("a:v")).await.unwrap();
        let (a, b) = (registry.name("a:v"), registry.name("b:v"));
        let remove = async {
            tokio::time::sleep(Duration::from_millis(3)).await;
            store.images.remove(&a).await
        };
        let (pulled, removed) = tokio::join!(store.pull(&b), remove);
        removed.unwrap();
        let pulled = pulled.unwrap();
        assert!(
            store
                .images
                .layers(&pulled.id)
                .unwrap()
                .iter()
                .all(|l| l.path.exists())
        );
        store.images.remove(&pulled.id).await.unwrap();
        store.assert_empty().await;
    }
}

/// A layer of few bytes that unpacks to many: all bytes have arrived long before the conversion ends.
#[tokio::test]
async fn dropped_pull_ends_its_conversion() {
    const FRAME_BYTES: usize = 64 << 20;
    const FRAMES: u64 = 512;
    let (registry, store) = setup().await;
    let mut header = ::tar::Header::new_gnu();
    header.set_path("zeros").unwrap();
    header.set_mode(0o644);
    header.set_size(FRAMES * FRAME_BYTES as u64);
    header.set_cksum();
    let mut bomb = zstd::encode_all(header.as_bytes().as_slice(), 1).unwrap();
    let zeros = zstd::encode_all(vec![0; FRAME_BYTES].as_slice(), 1).unwrap();
    for _ in 0..FRAMES {
        bomb.extend_from_slice(&zeros);
    }
    registry.push("r", "v", &[(&bomb, Pack::Plain)]);
    let (images, name) = (store.images.clone(), registry.name("r:v"));
    let (sender, mut progress) = tokio::sync::watch::channel(PullProgress::default());
    let pull = tokio::spawn(async move { images.pull(&name, None, Some(sender)).await });
    let arrived = progress.wait_for(|p| {
        let finishing = |l: &LayerProgress| l.state == LayerState::Finishing;
        p.layers.first().is_some_and(finishing)
    });
    let limit = std::time::Duration::from_secs(30);
    tokio::time::timeout(limit, arrived).await.unwrap().unwrap();
    pull.abort();
    assert!(pull.await.unwrap_err().is_cancelled());
    let began = std::time::Instant::now();
    store.images.wait_idle().await;
    assert!(
        began.elapsed() < std::time::Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
    let left = store.files("ingest");
    assert!(
        left.iter().all(|name| name.ends_with(".partial")),
        "only the download is kept: {left:?}"
    );
}
