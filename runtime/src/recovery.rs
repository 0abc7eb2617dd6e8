//! Recovery: reconciles the rows and bundles of the previous process, which may have died at any point, with the shims
//! that are still running. Part of [`crate::BoxliteRuntime::open`].
//!
//! Assumptions:
//! - One runtime at a time uses the roots (enforced by a lock file), so no other process changes them.
//! - A box's row is persisted before its bundle is created, its bundle is created before its shim is started, and the
//!   shim's state is persisted before the VM boots. A row in phase Starting may have a shim whose state is not persisted:
//!   the shim's `delete` finds it from the bundle.
//! - Shims keep running, with logs and exit codes, without a runtime. The state that a shim reports for its containers
//!   therefore overrides the rows.
//! - A dead shim has taken its VM with it (PDEATHSIG), and a reboot removes everything but the rows.
//! - `state` may be empty (tmpfs) while `root` is not. Bundles without a row are orphans and are removed, unless their shim
//!   lives: then the row was lost, with its copy, and the pod keeps running. Bundles with a marker are VMs of the pool
//!   (`pool`) and are removed, too.
//!
//! Recovery does not wait for guests. Boxes are recovered concurrently, each within the timeouts of ShimController.

use crate::box_state::Phase;
use crate::database::{BoxRow, ContainerRow};
use crate::error::{ErrorKind, Result, RuntimeError};
use crate::failpoint;
use crate::filesystem_layout::{check_id, remove_tree};
use crate::litebox::driver::{InitialState, exit};
use crate::litebox::{BoxEnv, Running, now_ns, teardown};
use crate::metrics::BoxMetrics;
use crate::shim_controller::{ShimController, TaskState};
use crate::types::ContainerState;
use boxlite_portal::{Connection, GuestAddress, GuestSession};
use boxlite_proto::names::SCRATCH_SUFFIX;
use boxlite_sys::report::report;
use futures::{FutureExt, StreamExt};
use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Boxes recovered concurrently.
const RECOVERY_CONCURRENCY: usize = 16;
/// Attempts to connect to a shim whose process lives.
const MAX_ADOPT_ATTEMPTS: usize = 3;
/// Timeout to connect to the shim of a bundle without a row.
const SHIM_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Determines the state of every box, from which the drivers continue. Also returns the running boxes without a row.
///
/// # Errors
/// `Database` only: a box that cannot be recovered becomes NotReady with a reason.
pub(crate) async fn recover(env: &Arc<BoxEnv>) -> Result<(Vec<InitialState>, Vec<String>)> {
    failpoint::reach("recovery.load").await?;
    let rows = env.database.load().await?;
    let known: HashSet<String> = rows.iter().map(|(row, _)| row.options.id.clone()).collect();
    let unmanaged = remove_orphans(env, &known).await;
    let recovering = rows
        .into_iter()
        .map(|(row, containers)| recover_or_give_up(env, row, containers));
    let recovered: Vec<InitialState> = futures::stream::iter(recovering)
        .buffer_unordered(RECOVERY_CONCURRENCY)
        .collect()
        .await;
    Ok((recovered, unmanaged))
}

/// Recovers a box. A panic, which one record may cause at each start, ends this box only: its shim is removed, and the other
/// boxes are served.
async fn recover_or_give_up(
    env: &Arc<BoxEnv>,
    mut row: BoxRow,
    mut containers: Vec<ContainerRow>,
) -> InitialState {
    hold_images(env, &containers);
    let recovering = recover_box(env, row.clone(), containers.clone());
    if let Ok(recovered) = AssertUnwindSafe(recovering).catch_unwind().await {
        return recovered;
    }
    tracing::error!(id = row.options.id, "recovery of a sandbox panicked");
    row.phase = match row.phase {
        Phase::Removing | Phase::Removed => row.phase,
        _ => Phase::NotReady,
    };
    row.reason = "its recovery failed, see the daemon's log".to_owned();
    for container in &mut containers {
        if container.snapshot.state != ContainerState::Exited {
            exit::finish_unknown(container, &row.reason);
        }
    }
    InitialState {
        row,
        containers,
        running: None,
        metrics: Arc::default(),
        recovered: true,
    }
}

async fn recover_box(
    env: &Arc<BoxEnv>,
    mut row: BoxRow,
    mut containers: Vec<ContainerRow>,
) -> InitialState {
    let id = row.options.id.clone();
    let metrics = Arc::new(BoxMetrics::default());
    let mut running = None;
    match row.phase {
        Phase::Removed => {}
        // A box that took a warm VM has a bundle before its start.
        Phase::Created if !env.layout.bundle(&id).is_dir() => {}
        Phase::Created | Phase::Starting => {
            teardown::clean_or_warn(env, &id).await;
            let bundle = env.layout.bundle(&id);
            if let Err(error) = teardown::blocking(move || remove_tree(&bundle)).await {
                tracing::warn!(
                    id,
                    error = report(&error),
                    "failed to remove the bundle of an interrupted start"
                );
            }
            row.phase = Phase::Created;
            row.shim = None;
            row.reason = "its start was interrupted".to_owned();
        }
        // The driver resumes these jobs with the adopted shim.
        Phase::Stopping | Phase::Removing => running = adopt(env, &row, &metrics).await,
        Phase::Ready => match adopt(env, &row, &metrics).await {
            Some(found) => {
                let alive = matches!(found.shim.sandbox_status().await, Ok((true, _)));
                recover_containers(&found.shim, &mut containers, alive).await;
                if alive {
                    running = Some(found);
                } else {
                    row.phase = Phase::NotReady;
                    row.reason = "its VM ended while the daemon was not running".to_owned();
                    running = Some(found);
                }
            }
            None => {
                row.phase = Phase::NotReady;
                row.reason = "its shim ended while the daemon was not running".to_owned();
            }
        },
        Phase::NotReady => {}
    }
    let vm_lives =
        running.is_some() && matches!(row.phase, Phase::Ready | Phase::Stopping | Phase::Removing);
    let containers = reconcile(env, containers, vm_lives, &row.reason, running.as_ref()).await;
    persist(env, &row, &containers).await;
    tracing::info!(id, phase = ?row.phase, containers = containers.len(), reason = row.reason, "sandbox recovered");
    InitialState {
        row,
        containers,
        running,
        metrics,
        recovered: true,
    }
}

/// Connects to the shim of a row, if it lives and serves.
async fn adopt(env: &BoxEnv, row: &BoxRow, metrics: &BoxMetrics) -> Option<Running> {
    let id = &row.options.id;
    let state = row.shim.clone()?;
    for _ in 0..MAX_ADOPT_ATTEMPTS {
        if state
            .process
            .as_ref()
            .is_some_and(|process| !process.alive())
        {
            return None;
        }
        let adopting = async {
            failpoint::reach("recovery.adopt").await?;
            ShimController::adopt(id, state.clone()).await
        };
        match adopting.await {
            Ok(shim) => {
                let address = GuestAddress::of(&state.vmm, env.layout.vsock(id));
                let session = GuestSession::counted(
                    Connection::lazy(address),
                    metrics.bytes_transferred.clone(),
                );
                return Some(Running { shim, session });
            }
            Err(error) => tracing::warn!(id, error = report(&error), "shim does not answer"),
        }
    }
    None
}

/// Restores the image holds of all containers, which are in memory only.
fn hold_images(env: &BoxEnv, containers: &[ContainerRow]) {
    for row in containers {
        let snapshot = &row.snapshot;
        for image in snapshot.images() {
            if let Err(error) = env.images.hold(image, &snapshot.id) {
                tracing::warn!(
                    id = snapshot.id,
                    image,
                    error = report(&error),
                    "image of a container not found"
                );
            }
        }
    }
}

/// Takes over the shim's state of each container.
async fn recover_containers(
    shim: &ShimController,
    containers: &mut [ContainerRow],
    vm_alive: bool,
) {
    for row in containers {
        if !row.complete || row.snapshot.state == ContainerState::Exited {
            continue;
        }
        let querying = async {
            failpoint::reach("recovery.container").await?;
            shim.task_state(&row.snapshot.id).await
        };
        match querying.await {
            Ok(TaskState::Running) if vm_alive => {
                if row.snapshot.state != ContainerState::Running {
                    row.snapshot.state = ContainerState::Running;
                    row.snapshot.started_at_ns = now_ns();
                }
            }
            Ok(TaskState::Created | TaskState::Unknown | TaskState::Running) => {}
            Ok(TaskState::Stopped(exit)) => {
                if row.snapshot.started_at_ns == 0 {
                    row.snapshot.started_at_ns = row.snapshot.created_at_ns;
                }
                exit::finish(row, exit, "");
            }
            Err(RuntimeError::Shim {
                kind: ErrorKind::NotFound,
                ..
            }) => exit::finish_unknown(row, "the shim does not know the container"),
            Err(error) => tracing::warn!(
                id = row.snapshot.id,
                error = report(&error),
                "failed to get the state of a container"
            ),
        }
    }
}

/// Removes partially created containers, and marks containers without a VM as exited.
async fn reconcile(
    env: &BoxEnv,
    containers: Vec<ContainerRow>,
    vm_lives: bool,
    reason: &str,
    running: Option<&Running>,
) -> Vec<ContainerRow> {
    let mut kept = Vec::with_capacity(containers.len());
    for mut row in containers {
        if !row.complete {
            remove_incomplete(env, &row, running).await;
            continue;
        }
        if !vm_lives && row.snapshot.state != ContainerState::Exited {
            exit::finish_unknown(&mut row, reason);
        }
        kept.push(row);
    }
    kept
}

async fn remove_incomplete(env: &BoxEnv, row: &ContainerRow, running: Option<&Running>) {
    let (id, box_id) = (&row.snapshot.id, &row.snapshot.box_id);
    if let Some(running) = running
        && let Err(error) = running.shim.delete_task(id).await
    {
        tracing::warn!(
            id,
            error = report(&error),
            "failed to delete the task of a partially created container"
        );
    }
    let bundle = env.layout.container_bundle(box_id, id);
    let removed = teardown::blocking(move || remove_tree(&bundle)).await;
    let removed = match removed {
        Ok(()) => env.database.delete_container(id).await,
        Err(error) => Err(error),
    };
    if let Err(error) = removed {
        tracing::warn!(
            id,
            error = report(&error),
            "partially created container could not be removed"
        );
    }
    env.release_images(&row.snapshot);
}

async fn persist(env: &BoxEnv, row: &BoxRow, containers: &[ContainerRow]) {
    let mut written = env.database.update_box(row.clone()).await;
    for container in containers {
        if written.is_err() {
            break;
        }
        written = env.database.put_container(container.clone()).await;
    }
    if let Err(error) = written {
        tracing::error!(
            id = row.options.id,
            error = report(&error),
            "failed to persist the state of a recovered sandbox"
        );
    }
}

fn names_in(directory: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(directory).map_err(|source| RuntimeError::Io {
        operation: "list",
        path: directory.to_owned(),
        source,
    })?;
    let names = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.collect())
}

/// Returns true if a shim serves at the address in the bundle.
async fn shim_lives(env: &BoxEnv, id: &str) -> bool {
    let Ok(address) = std::fs::read_to_string(env.layout.shim_address(id)) else {
        return false;
    };
    let Some(path) = address.trim().strip_prefix("unix://") else {
        return false;
    };
    let connected = boxlite_sys::unix_socket::connect(Path::new(path));
    matches!(
        tokio::time::timeout(SHIM_CONNECT_TIMEOUT, connected).await,
        Ok(Ok(_))
    )
}

/// Removes bundles, scratch disks and leftovers of shims without a row. Returns the ids whose shim lives.
async fn remove_orphans(env: &BoxEnv, known: &HashSet<String>) -> Vec<String> {
    let mut unmanaged = Vec::new();
    let (boxes, scratch) = (env.layout.boxes(), env.layout.scratch_dir().to_owned());
    let listed = teardown::blocking(move || {
        let disks = names_in(&scratch)?;
        let disks = disks
            .iter()
            .filter_map(|name| name.strip_suffix(SCRATCH_SUFFIX).map(str::to_owned));
        let mut ids: HashSet<String> = disks.collect();
        ids.extend(names_in(&boxes)?);
        Ok(ids)
    });
    let names = match listed.await {
        Ok(names) => names,
        Err(error) => {
            tracing::warn!(error = report(&error), "failed to list bundles");
            return unmanaged;
        }
    };
    for id in names {
        if known.contains(&id) || check_id("bundle", &id).is_err() {
            continue;
        }
        let warm = env.layout.warm_marker(&id).exists();
        if !warm && shim_lives(env, &id).await {
            tracing::error!(
                id,
                "a pod runs whose record is lost: leaving it, end it with the shim's action delete"
            );
            unmanaged.push(id);
            continue;
        }
        if warm {
            tracing::info!(id, "removing warm VM of an earlier run");
        } else {
            tracing::warn!(id, "removing bundle or scratch disk without a sandbox");
        }
        teardown::clean_or_warn(env, &id).await;
        let bundle = env.layout.bundle(&id);
        let removing = async {
            failpoint::reach("recovery.orphan").await?;
            teardown::blocking(move || remove_tree(&bundle)).await
        };
        if let Err(error) = removing.await {
            tracing::warn!(id, error = report(&error), "failed to remove bundle");
        }
    }
    unmanaged
}
