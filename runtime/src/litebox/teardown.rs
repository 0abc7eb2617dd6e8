//! Ending a VM and its shim, and clearing away what they leave: the works of Stop and Remove, and of a VM that died
//! by itself.
//!
//! Everything here is idempotent and takes a shim that is alive, dead or unknown. It writes no state; the driver
//! does, from what is returned.

use super::BoxEnv;
use crate::error::{Result, RuntimeError};
use crate::filesystem_layout::{remove_file, remove_tree};
use crate::shim_controller::{ShimController, TaskExit};
use boxlite_sys::report::report;
use futures::StreamExt;
use std::collections::BTreeMap;
use std::time::Duration;

/// For asking a shim about all containers of a VM that just ended; beyond that their ends are unknown. Part of the 2
/// s in which a death must show.
const EXITS_LIMIT: Duration = Duration::from_secs(1);
/// Containers asked about at a time.
const EXITS_AT_ONCE: usize = 8;

/// Ends of containers by id, as far as a shim could tell.
pub(crate) type Exits = BTreeMap<String, TaskExit>;

/// Ends the VM; answers how its `containers` ended. Then ends the shim and cleans up after it.
///
/// # Errors
/// Whatever kept the shim alive.
pub(crate) async fn stop(
    env: &BoxEnv,
    id: &str,
    shim: Option<&ShimController>,
    containers: Vec<String>,
) -> Result<Exits> {
    let mut exits = Exits::new();
    if let Some(shim) = shim.filter(|shim| shim.alive()) {
        if let Err(error) = shim.stop_sandbox().await {
            // `delete` below ends it the hard way.
            tracing::warn!(id, error = report(&error), "VM did not stop as asked");
        }
        exits = exits_of(shim, containers).await;
    }
    end_shim(env, id, shim).await?;
    Ok(exits)
}

/// How these containers ended, as far as the shim tells within [`EXITS_LIMIT`]: their VM is gone, so they end as soon
/// as it has drained them.
pub(crate) async fn exits_of(shim: &ShimController, containers: Vec<String>) -> Exits {
    let mut exits = Exits::new();
    let mut asking = futures::stream::iter(containers.into_iter().map(|container| async move {
        let exit = shim.wait_task(&container).await;
        (container, exit)
    }))
    .buffer_unordered(EXITS_AT_ONCE);
    let collecting = async {
        while let Some((container, exit)) = asking.next().await {
            if let Ok(exit) = exit {
                exits.insert(container, exit);
            }
        }
    };
    let _ = tokio::time::timeout(EXITS_LIMIT, collecting).await;
    drop(asking);
    exits
}

/// Ends a shim, by its own means first, and cleans up after it; ok where it is gone.
///
/// # Errors
/// Whatever kept it alive.
pub(crate) async fn end_shim(env: &BoxEnv, id: &str, shim: Option<&ShimController>) -> Result<()> {
    if let Some(shim) = shim.filter(|shim| shim.alive())
        && let Err(error) = shim.shutdown().await
    {
        tracing::warn!(id, error = report(&error), "shim did not end as asked");
    }
    clean(env, id).await
}

/// As [`end_shim`], for where nothing better can be done about a failure than to say it.
pub(crate) async fn end_shim_or_warn(env: &BoxEnv, id: &str, shim: Option<&ShimController>) {
    if let Err(error) = end_shim(env, id, shim).await {
        tracing::warn!(id, error = report(&error), "shim is left");
    }
}

/// Runs the shim's `delete` in the bundle: kills what is left, by its own record. Without a bundle no process is left: the
/// bundle is made before the shim and removed after it, and a reboot takes both. A reboot does not take the scratch disk,
/// which is removed last.
///
/// # Errors
/// Those of the program; `Io` if the scratch disk cannot be removed.
pub(crate) async fn clean(env: &BoxEnv, id: &str) -> Result<()> {
    let bundle = env.layout.bundle(id);
    if bundle.is_dir() {
        env.program.delete(id, &bundle).await?;
    }
    let scratch = env.layout.scratch(id);
    blocking(move || remove_file(&scratch)).await
}

/// As [`clean`], for where nothing better can be done about a failure than to say it.
pub(crate) async fn clean_or_warn(env: &BoxEnv, id: &str) {
    if let Err(error) = clean(env, id).await {
        tracing::warn!(
            id,
            error = report(&error),
            "what a shim left could not be cleaned"
        );
    }
}

/// Everything of a box but its row: VM, shim, bundle. The images its containers hold are the driver's.
///
/// # Errors
/// Whatever is left.
pub(crate) async fn remove(env: &BoxEnv, id: &str, shim: Option<&ShimController>) -> Result<()> {
    stop(env, id, shim, Vec::new()).await?;
    let bundle = env.layout.bundle(id);
    blocking(move || remove_tree(&bundle)).await
}

/// Runs file work off the async threads; it runs to its end even if the future is dropped.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(RuntimeError::Internal {
            what: format!("a blocking thread: {error}"),
        }),
    }
}
