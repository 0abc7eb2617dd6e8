//! Stops a VM and its shim and cleans up after them: the jobs of Stop and Remove, and the cleanup after a VM that died.
//!
//! All functions are idempotent and accept a shim that is alive, dead or unknown. They write no state; the driver
//! records their results.

use super::BoxEnv;
use crate::error::{Result, RuntimeError};
use crate::failpoint;
use crate::filesystem_layout::remove_file;
use crate::shim_controller::{ShimController, TaskExit};
use boxlite_sys::report::report;
use futures::StreamExt;
use std::collections::BTreeMap;
use std::time::Duration;

/// Timeout for collecting the exits of all containers of a VM that just ended; the remaining exits count as unknown.
/// Part of the 2 s in which the end of a VM is published.
const EXIT_QUERY_TIMEOUT: Duration = Duration::from_secs(1);
/// Concurrent Task.Wait calls while exits are collected.
const EXIT_QUERY_CONCURRENCY: usize = 8;

/// Known exits, by container id.
pub(crate) type Exits = BTreeMap<String, TaskExit>;

/// Stops the VM, collects the exits of `containers`, then stops the shim and cleans up after it.
///
/// # Errors
/// The reason why the shim could not be stopped.
pub(crate) async fn stop(
    env: &BoxEnv,
    id: &str,
    shim: Option<&ShimController>,
    containers: Vec<String>,
) -> Result<Exits> {
    let mut exits = Exits::new();
    failpoint::reach("pod.stop").await?;
    if let Some(shim) = shim.filter(|shim| shim.alive()) {
        if let Err(error) = shim.stop_sandbox().await {
            // The shim's `delete` kills the VM below.
            tracing::warn!(
                id,
                error = report(&error),
                "failed to stop the VM, killing it"
            );
        }
        exits = exits_of(shim, containers).await;
    }
    end_shim(env, id, shim).await?;
    Ok(exits)
}

/// Collects the exits that the shim reports within [`EXIT_QUERY_TIMEOUT`]. The VM has ended, so the containers exit as
/// soon as the shim has drained their output.
pub(crate) async fn exits_of(shim: &ShimController, containers: Vec<String>) -> Exits {
    let mut exits = Exits::new();
    let mut waits = futures::stream::iter(containers.into_iter().map(|container| async move {
        let exit = shim.wait_task(&container).await;
        (container, exit)
    }))
    .buffer_unordered(EXIT_QUERY_CONCURRENCY);
    let collecting = async {
        while let Some((container, exit)) = waits.next().await {
            if let Ok(exit) = exit {
                exits.insert(container, exit);
            }
        }
    };
    let _ = tokio::time::timeout(EXIT_QUERY_TIMEOUT, collecting).await;
    drop(waits);
    exits
}

/// Shuts a shim down and cleans up after it; idempotent.
///
/// # Errors
/// The reason why the shim could not be stopped.
pub(crate) async fn end_shim(env: &BoxEnv, id: &str, shim: Option<&ShimController>) -> Result<()> {
    let state = env.layout.shim_state(id);
    failpoint::reach("pod.shutdown").await?;
    if let Some(shim) = shim.filter(|shim| shim.alive()) {
        let recorded = state.exists();
        match shim.shutdown().await {
            // An orderly end removes everything that `delete` would, and the record of it last.
            Ok(()) if recorded && !state.exists() => return remove_scratch(env, id).await,
            Ok(()) => {}
            Err(error) => tracing::warn!(
                id,
                error = report(&error),
                "failed to shut the shim down, killing it"
            ),
        }
    }
    clean(env, id).await
}

/// As [`end_shim`], but only logs a failure.
pub(crate) async fn end_shim_or_warn(env: &BoxEnv, id: &str, shim: Option<&ShimController>) {
    if let Err(error) = end_shim(env, id, shim).await {
        tracing::warn!(id, error = report(&error), "failed to stop the shim");
    }
}

/// Runs the shim's `delete` in the bundle, which kills all remaining processes, then removes the scratch disk. Without a
/// bundle there are no processes: it is created before the shim and removed after it, and both are gone after a reboot,
/// unlike the scratch disk.
///
/// # Errors
/// Those of [`crate::shim_controller::ShimProgram::delete`]; `Io` if the scratch disk cannot be removed.
pub(crate) async fn clean(env: &BoxEnv, id: &str) -> Result<()> {
    let bundle = env.layout.bundle(id);
    failpoint::reach("pod.clean").await?;
    if bundle.is_dir() {
        env.program.delete(id, &bundle).await?;
    }
    remove_scratch(env, id).await
}

async fn remove_scratch(env: &BoxEnv, id: &str) -> Result<()> {
    let scratch = env.layout.scratch(id);
    blocking(move || remove_file(&scratch)).await
}

/// As [`clean`], but only logs a failure.
pub(crate) async fn clean_or_warn(env: &BoxEnv, id: &str) {
    if let Err(error) = clean(env, id).await {
        tracing::warn!(
            id,
            error = report(&error),
            "failed to clean up after a shim"
        );
    }
}

/// Removes the VM, the shim and the bundle of a box. The driver deletes the row and releases the images.
///
/// # Errors
/// The reason why something could not be removed.
pub(crate) async fn remove(env: &BoxEnv, id: &str, shim: Option<&ShimController>) -> Result<()> {
    stop(env, id, shim, Vec::new()).await?;
    failpoint::reach("pod.unbundle").await?;
    env.database.remove_bundle(env.layout.bundle(id)).await
}

/// Runs blocking file operations on a blocking thread. They run to completion even if the future is dropped.
pub(crate) async fn blocking<T: Send + 'static>(
    operation: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(operation).await {
        Ok(result) => result,
        Err(error) => Err(RuntimeError::Internal {
            detail: format!("blocking task failed: {error}"),
        }),
    }
}
