//! Tests of the pool with fake shims: claims, their failures, and that nothing waits after the runtime closes or dies.

use super::*;
use crate::fake_shim::FakeNode;
use crate::{BoxState, BoxliteRuntime, Stage};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio_util::task::AbortOnDropHandle;

/// Timeout of every wait.
const WAIT_TIMEOUT: Duration = Duration::from_secs(10);
const SHAPE: Shape = Shape {
    vcpus: 1,
    memory_mib: 128,
};

/// Records the namespaces that exist.
#[derive(Debug, Default)]
struct FakeNetworks(Mutex<Vec<String>>);

#[async_trait]
impl PoolNetworks for FakeNetworks {
    async fn create(&self, id: &str) -> Result<PathBuf, NetworkError> {
        self.0.lock().push(id.to_owned());
        Ok(Path::new("/netns").join(id))
    }

    async fn remove(&self, id: &str) -> Result<(), NetworkError> {
        self.0.lock().retain(|known| known != id);
        Ok(())
    }
}

struct Fixture {
    node: Arc<FakeNode>,
    runtime: BoxliteRuntime,
    networks: Arc<FakeNetworks>,
    _attending: AbortOnDropHandle<()>,
}

impl Fixture {
    /// Opens a runtime with a pool of one VM, and waits until it waits.
    async fn new() -> Self {
        let node = Arc::new(FakeNode::new());
        let runtime = BoxliteRuntime::open(node.options()).await.unwrap();
        let served = node.clone();
        let attending = tokio::spawn(async move { served.attend().await });
        let networks = Arc::new(FakeNetworks::default());
        let options = node.box_options("x");
        let settings = PoolSettings {
            size: 1,
            max_bytes: u64::MAX,
            min_available_bytes: 0,
            // No test waits for a second fill.
            idle: Duration::from_secs(3600),
            shapes: Vec::new(),
            default_shape: SHAPE,
            scratch_bytes: options.scratch_bytes,
            debug_console: false,
            vmm_ids: None,
        };
        runtime.start_pool(settings, networks.clone());
        let fixture = Self {
            node,
            runtime,
            networks,
            _attending: AbortOnDropHandle::new(attending),
        };
        fixture.until(|status| status.warm.len() == 1).await;
        fixture
    }

    fn status(&self) -> PoolStatus {
        self.runtime.pool_status().unwrap()
    }

    async fn until(&self, holds: impl Fn(&PoolStatus) -> bool) {
        let began = Instant::now();
        while !holds(&self.status()) {
            assert!(began.elapsed() < WAIT_TIMEOUT, "{:?}", self.status());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn claim(&self) -> String {
        let options = self.node.box_options("any");
        self.runtime.claim_warm(&options).unwrap()
    }

    fn bundle(&self, id: &str) -> PathBuf {
        self.node.at("s/s").join(id)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn claimed_vm_is_the_boxs() {
    let fixture = Fixture::new().await;
    let mut large = fixture.node.box_options("any");
    large.memory_mib = 256;
    assert_eq!(fixture.runtime.claim_warm(&large), None);
    large.memory_mib = SHAPE.memory_mib;
    large.host_network = true;
    assert_eq!(fixture.runtime.claim_warm(&large), None);
    large.host_network = false;
    large.passt = true;
    assert_eq!(fixture.runtime.claim_warm(&large), None);
    let id = fixture.claim();
    assert!(fixture.bundle(&id).join("warm").exists());
    let options = fixture.node.box_options(&id);
    let litebox = fixture.runtime.create_box(options).await.unwrap();
    litebox.start().await.unwrap();
    let snapshot = litebox.snapshot();
    assert_eq!(snapshot.state, BoxState::Ready);
    assert!(snapshot.timers.get("claim").is_some() && snapshot.timers.get("spawn").is_none());
    assert!(!fixture.bundle(&id).join("warm").exists());
    assert_eq!(fixture.node.log(), format!("start {id}\n"), "one shim");
    let counters = fixture.status().counters;
    assert_eq!((counters.hits, counters.misses), (1, 1));
    // The namespace is the pod's now, and the box's end is not the pool's business.
    assert_eq!(*fixture.networks.0.lock(), [id]);
    fixture.runtime.shutdown().await;
    assert_eq!(fixture.node.alive(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_claim_removes_the_vm_and_boots_cold() {
    let fixture = Fixture::new().await;
    let id = fixture.claim();
    let options = fixture.node.box_options(&id);
    let litebox = fixture.runtime.create_box(options).await.unwrap();
    let fault = &fixture.node.faults.fail_create_sandbox;
    fault.store(true, Ordering::SeqCst);
    let error = litebox.start().await.unwrap_err();
    assert_eq!(error.stage(), Some(Stage::Spawn), "of the cold boot");
    fault.store(false, Ordering::SeqCst);
    let attempt = format!("start {id}\ndelete {id}\n");
    assert_eq!(fixture.node.log(), attempt.repeat(2));
    let counters = fixture.status().counters;
    assert_eq!((counters.hits, counters.failed_claims), (0, 1));
    assert!(!fixture.bundle(&id).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn discard_removes_a_vm_that_no_box_took() {
    let fixture = Fixture::new().await;
    let id = fixture.claim();
    for _ in 0..2 {
        fixture.runtime.discard_warm(&id).await;
    }
    assert!(!fixture.bundle(&id).exists());
    assert!(fixture.networks.0.lock().is_empty());
    let log = format!("start {id}\ndelete {id}\n");
    assert_eq!(fixture.node.log(), log, "removed once");
    assert_eq!(fixture.status().counters.failed_claims, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_removes_waiting_vms() {
    let fixture = Fixture::new().await;
    let bundles = fixture.node.at("s/s");
    assert_eq!(std::fs::read_dir(&bundles).unwrap().count(), 1);
    fixture.runtime.clone().shutdown().await;
    assert_eq!(std::fs::read_dir(&bundles).unwrap().count(), 0);
    assert!(fixture.networks.0.lock().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn vm_that_ends_while_it_waits_is_removed() {
    let fixture = Fixture::new().await;
    let id = fixture.networks.0.lock()[0].clone();
    fixture.node.kill_shim(&id);
    fixture
        .until(|status| status.counters.removals.contains_key(&Removal::Died))
        .await;
    let began = Instant::now();
    // Removed, or replaced already.
    while fixture.networks.0.lock().contains(&id) {
        assert!(began.elapsed() < WAIT_TIMEOUT, "{:?}", fixture.networks);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!fixture.bundle(&id).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn open_removes_marked_bundles_of_live_shims() {
    let node = FakeNode::new();
    let (bundle, socket) = (node.at("s/s/vm"), node.at("f/vm"));
    std::fs::create_dir_all(&bundle).unwrap();
    node.serve("vm").await;
    let address = format!("unix://{}", socket.display());
    std::fs::write(bundle.join("address"), address).unwrap();
    std::fs::write(bundle.join("warm"), "").unwrap();
    let runtime = BoxliteRuntime::open(node.options()).await.unwrap();
    assert_eq!(runtime.unmanaged(), Vec::<String>::new());
    assert_eq!(node.log(), "delete vm\n");
    assert!(!bundle.exists());
    runtime.shutdown().await;
}
