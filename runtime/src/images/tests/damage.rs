//! Damaged layer files: found at their first use after the daemon's start, and fetched again.

use super::*;
use std::os::unix::fs::PermissionsExt;

/// Returns the file of a layer.
fn file(store: &TestStore, diff_id: &str) -> std::path::PathBuf {
    let hex = diff_id.strip_prefix("sha256:").unwrap();
    let name = format!("images/layers/sha256/{hex}.erofs");
    store.dir.path().join(name)
}

/// Changes one bit in the middle of a file.
fn damage(path: &Path) {
    let writable = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(path, writable).unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn damaged_layer_is_set_aside_and_fetched_again() {
    let (registry, mut store) = setup().await;
    let [a, b] = [layer("a", 1, 300_000), layer("b", 2, 70_000)];
    let pushed = registry.push("r", "v", &[(&a, Pack::Gzip), (&b, Pack::Gzip)]);
    registry.push("q", "v", &[(&b, Pack::Gzip)]);
    let image = store.pull(&registry.name("r:v")).await.unwrap();
    let healthy = store.pull(&registry.name("q:v")).await.unwrap();
    let damaged = file(&store, &image.layers[0]);

    store = store.reopened().await;
    damage(&damaged);
    let layers = store.images.overlay_layers(&image.id).unwrap();
    assert_eq!(layers.len(), 2, "the verification does not block");
    store.images.wait_idle().await;
    assert!(store.images.status(&image.id).is_none());
    assert!(store.images.status(&healthy.id).is_some());
    assert_eq!(store.images.quarantined(), 1);
    assert!(!damaged.exists());
    assert!(
        store
            .dir
            .path()
            .join("images/layers/damaged.erofs")
            .exists()
    );

    // The index is written, too.
    store = store.reopened().await;
    assert!(store.images.status(&image.id).is_none());
    registry.take_requests();
    let again = store.pull(&registry.name("r:v")).await.unwrap();
    assert_eq!(again.layers, image.layers);
    let requests = registry.take_requests();
    let fetched = |blob: &str| requests.iter().any(|request| request.path.contains(blob));
    assert!(fetched(&pushed.blobs[0]) && !fetched(&pushed.blobs[1]));

    store = store.reopened().await;
    store.images.overlay_layers(&image.id).unwrap();
    store.images.wait_idle().await;
    assert!(store.images.status(&image.id).is_some());
    assert_eq!(store.images.quarantined(), 0);
}

#[tokio::test]
async fn layer_of_an_earlier_version_is_recorded_at_its_first_use() {
    let (registry, mut store) = setup().await;
    registry.push("r", "v", &[(&layer("a", 1, 300_000), Pack::Gzip)]);
    let image = store.pull(&registry.name("r:v")).await.unwrap();
    let checksums = store.dir.path().join("images/layers/checksums");
    std::fs::remove_dir_all(&checksums).unwrap();
    store = store.reopened().await;
    assert_eq!(store.files("layers/checksums"), Vec::<String>::new());
    store.images.overlay_layers(&image.id).unwrap();
    store.images.wait_idle().await;
    assert_eq!(store.files("layers/checksums").len(), 1);

    store = store.reopened().await;
    damage(&file(&store, &image.layers[0]));
    store.images.overlay_layers(&image.id).unwrap();
    store.images.wait_idle().await;
    assert_eq!(store.images.quarantined(), 1);
    store.pull(&registry.name("r:v")).await.unwrap();
    assert!(store.images.remove(&image.id).await.unwrap());
    store.assert_empty().await;
}
