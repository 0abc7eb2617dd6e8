//! [`Pool`]: booted VMs that wait for pods. Off unless [`crate::BoxliteRuntime::start_pool`] was called.
//!
//! A waiting VM has the shim, bundle and paths of the pod that it will be; its id becomes the pod's. [`policy`] decides,
//! [`member`] makes and removes VMs, the task [`run`] connects both; one VM is made at a time. The start pipeline takes a
//! claimed VM by [`WarmVms`]. No VM is adopted from an earlier daemon: recovery removes those that it finds by the
//! marker in their bundles, and the task removes all when the runtime closes.
//!
//! ```text
//!  RunPodSandbox ─claim─▶ id ─(CNI, create_box)─▶ pipeline ─take─▶ shim
//!                          └── failed before that: discard
//! ```

mod member;
mod policy;
#[cfg(test)]
mod tests;

pub use policy::{PoolCounters, PoolSettings, PoolStatus, Removal, Shape};

use crate::litebox::{BoxEnv, WarmVms};
use crate::report;
use crate::shim_controller::ShimController;
use crate::types::BoxOptions;
use async_trait::async_trait;
use boxlite_sys::sync::Mutex;
use policy::{Policy, Step};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

/// An error of [`PoolNetworks`].
pub type NetworkError = Box<dyn std::error::Error + Send + Sync>;

/// Network namespaces of waiting VMs, which become the pods'.
#[async_trait]
pub trait PoolNetworks: std::fmt::Debug + Send + Sync {
    /// Creates the network namespace that the pod with this id will have, without any interface but the loopback.
    async fn create(&self, id: &str) -> Result<PathBuf, NetworkError>;
    /// Removes it; idempotent.
    async fn remove(&self, id: &str) -> Result<(), NetworkError>;
}

/// A waiting VM, or one that was claimed and is not the pod's yet.
#[derive(Debug)]
struct WarmShim {
    shim: ShimController,
    /// Ends the task that waits for the VM's end.
    _watch: DropGuard,
}

/// The pool.
#[derive(Debug)]
pub(crate) struct Pool {
    policy: Mutex<Policy>,
    shims: Mutex<HashMap<String, WarmShim>>,
    networks: Arc<dyn PoolNetworks>,
    changed: Notify,
}

impl Pool {
    pub(crate) fn new(settings: PoolSettings, networks: Arc<dyn PoolNetworks>) -> Self {
        Self {
            policy: Mutex::new(Policy::new(settings)),
            shims: Mutex::default(),
            networks,
            changed: Notify::new(),
        }
    }

    /// Takes a VM for a pod with these options and returns its id, which the pod must have; `None` if none fits.
    pub(crate) fn claim(&self, options: &BoxOptions) -> Option<String> {
        let mut policy = self.policy.lock();
        let settings = policy.settings();
        let possible = !options.host_network
            && !options.passt
            && options.vmm.is_none()
            && options.scratch_bytes == settings.scratch_bytes
            && options.debug_console == settings.debug_console;
        let shape = possible.then_some(Shape {
            vcpus: options.vcpus,
            memory_mib: options.memory_mib,
        });
        let id = policy.claim(shape, Instant::now());
        self.changed.notify_one();
        id
    }

    /// Removes a claimed VM that no pod has taken.
    pub(crate) async fn discard(&self, env: &BoxEnv, id: &str) {
        if self.take(id).is_some() {
            self.claimed(false);
            member::remove(env, self.networks.as_ref(), id).await;
        }
    }

    /// Returns the state for status and metrics, without waiting.
    pub(crate) fn status(&self) -> PoolStatus {
        self.policy.lock().status(Instant::now())
    }
}

impl WarmVms for Pool {
    fn take(&self, id: &str) -> Option<ShimController> {
        self.shims.lock().remove(id).map(|warm| warm.shim)
    }

    fn claimed(&self, succeeded: bool) {
        self.policy.lock().claimed(succeeded, Instant::now());
    }
}

/// Fills and empties the pool until the runtime closes, then removes all waiting VMs.
pub(crate) async fn run(env: Arc<BoxEnv>, pool: Arc<Pool>) {
    // Each returns the id of a VM that ended, or `None` for one that was taken.
    let mut ends: JoinSet<Option<String>> = JoinSet::new();
    while !env.closing.is_cancelled() {
        let step = pool
            .policy
            .lock()
            .step(Instant::now(), member::available_bytes());
        match step {
            Step::Fill(shape) => fill(&env, &pool, shape, &mut ends).await,
            Step::Remove(id, reason) => {
                tracing::info!(id, reason = reason.name(), "removing warm VM");
                remove(&env, &pool, &id).await;
            }
            Step::Wait(limit) => tokio::select! {
                () = env.closing.cancelled() => {}
                () = pool.changed.notified() => {}
                () = tokio::time::sleep(limit) => {}
                Some(Ok(Some(id))) = ends.join_next() => {
                    if pool.policy.lock().died(&id) {
                        tracing::warn!(id, "warm VM ended");
                        remove(&env, &pool, &id).await;
                    }
                }
            },
        }
    }
    let waiting: Vec<String> = pool.shims.lock().keys().cloned().collect();
    let removals = waiting.iter().map(|id| remove(&env, &pool, id));
    futures::future::join_all(removals).await;
}

async fn remove(env: &BoxEnv, pool: &Pool, id: &str) {
    drop(pool.take(id));
    member::remove(env, pool.networks.as_ref(), id).await;
}

async fn fill(env: &BoxEnv, pool: &Pool, shape: Shape, ends: &mut JoinSet<Option<String>>) {
    let id = member::new_id();
    let began = Instant::now();
    let options = {
        let mut policy = pool.policy.lock();
        policy.begin(id.clone(), shape);
        member::options(&id, shape, policy.settings())
    };
    let made = member::make(env, pool.networks.as_ref(), &options).await;
    let (now, took) = (Instant::now(), began.elapsed());
    match made {
        Ok((shim, bytes)) => {
            let taken = CancellationToken::new();
            let watched = shim.clone();
            let (end, ended) = (taken.clone(), id.clone());
            ends.spawn(async move {
                let wait = end.run_until_cancelled(watched.wait_sandbox());
                wait.await.map(|_| ended)
            });
            let warm = WarmShim {
                shim,
                _watch: taken.drop_guard(),
            };
            // Before the policy gives it out.
            pool.shims.lock().insert(id.clone(), warm);
            pool.policy.lock().filled(&id, bytes, took, now);
            tracing::info!(id, ?shape, ?took, bytes, "warm VM is waiting");
        }
        Err(error) => {
            if !env.closing.is_cancelled() {
                tracing::warn!(id, error = report(&error), "failed to make a warm VM");
            }
            pool.policy.lock().fill_failed(&id, now);
            member::remove(env, pool.networks.as_ref(), &id).await;
        }
    }
}
