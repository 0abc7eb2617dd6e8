//! Recovery: what [`crate::BoxliteRuntime::open`] does with the rows and bundles of the runtime before it, which may
//! have died at any line.
//!
//! Assumptions:
//! - One runtime at a time uses the roots (a lock file says so), so nothing found here is being worked on.
//! - A box's row is on disk before its bundle, its bundle before its shim, and the shim's record before the VM boots.
//!   A row in phase Starting may have a shim without a record: its own `delete` finds it by what the shim wrote into the bundle.
//! - Shims go on without a runtime: they keep logs and exit codes. So a shim that answers is believed about its
//!   containers, whatever the row says.
//! - A shim that is dead took its VM along (PDEATHSIG), and a reboot takes everything but the rows.
//! - `state` may be empty (tmpfs) while `root` is not; the other way round there are orphans, and they are ended.
//!
//! Nothing here waits for a guest; boxes are looked at side by side, each within the limits of ShimController.

use crate::database::{BoxRow, ContainerRow};
use crate::error::{ErrorKind, Result, RuntimeError};
use crate::filesystem_layout::{check_id, remove_tree};
use crate::litebox::driver::{Initial, end};
use crate::litebox::{BoxEnv, Running, now_ns, teardown};
use crate::management::box_state::Phase;
use crate::metrics::BoxMetrics;
use crate::shim_controller::{ShimController, TaskState};
use crate::types::ContainerState;
use boxlite_portal::{Connection, GuestAddress, GuestSession};
use boxlite_proto::names::SCRATCH_SUFFIX;
use boxlite_sys::report::report;
use futures::StreamExt;
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

/// Boxes looked at side by side.
const AT_ONCE: usize = 16;
/// Tries at a shim whose process lives.
const ADOPT_TRIES: usize = 3;

/// Finds out what became of every box; drivers take over from there.
///
/// # Errors
/// `Database` only: a box that cannot be recovered is NotReady, with the reason.
pub(crate) async fn recover(env: &Arc<BoxEnv>) -> Result<Vec<Initial>> {
    let rows = env.database.load().await?;
    let known: HashSet<String> = rows.iter().map(|(row, _)| row.options.id.clone()).collect();
    end_orphans(env, &known).await;
    let recovering = rows
        .into_iter()
        .map(|(row, containers)| recover_box(env, row, containers));
    let recovered: Vec<Initial> = futures::stream::iter(recovering)
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    Ok(recovered)
}

async fn recover_box(env: &Arc<BoxEnv>, mut row: BoxRow, containers: Vec<ContainerRow>) -> Initial {
    let id = row.options.id.clone();
    let metrics = Arc::new(BoxMetrics::default());
    let mut containers = hold_images(env, containers);
    let mut running = None;
    match row.phase {
        Phase::Created | Phase::Removed => {}
        Phase::Starting => {
            teardown::clean_or_warn(env, &id).await;
            let bundle = env.layout.bundle(&id);
            if let Err(error) = teardown::blocking(move || remove_tree(&bundle)).await {
                tracing::warn!(
                    id,
                    error = report(&error),
                    "bundle of an interrupted start is left"
                );
            }
            row.phase = Phase::Created;
            row.shim = None;
            row.reason = "its start was interrupted".to_owned();
        }
        // The driver goes on with these; what it needs of the shim is looked up here.
        Phase::Stopping | Phase::Removing => running = adopt(env, &row, &metrics).await,
        Phase::Ready => match adopt(env, &row, &metrics).await {
            Some(found) => {
                let alive = matches!(found.shim.sandbox_status().await, Ok((true, _)));
                recover_containers(&found.shim, &mut containers, alive).await;
                if alive {
                    running = Some(found);
                } else {
                    row.phase = Phase::NotReady;
                    row.reason = "its VM ended while no runtime watched".to_owned();
                    running = Some(found);
                }
            }
            None => {
                row.phase = Phase::NotReady;
                row.reason = "its shim ended while no runtime watched".to_owned();
            }
        },
        Phase::NotReady => {}
    }
    let vm_lives =
        running.is_some() && matches!(row.phase, Phase::Ready | Phase::Stopping | Phase::Removing);
    let containers = settle(env, containers, vm_lives, &row.reason, running.as_ref()).await;
    write_down(env, &row, &containers).await;
    tracing::info!(id, phase = ?row.phase, containers = containers.len(), reason = row.reason, "box found again");
    Initial {
        row,
        containers,
        running,
        metrics,
        found: true,
    }
}

/// The shim of a row, if it lives and serves.
async fn adopt(env: &BoxEnv, row: &BoxRow, metrics: &BoxMetrics) -> Option<Running> {
    let id = &row.options.id;
    let record = row.shim.clone()?;
    for _ in 0..ADOPT_TRIES {
        if record
            .process
            .as_ref()
            .is_some_and(|process| !process.alive())
        {
            return None;
        }
        match ShimController::adopt(id, record.clone()).await {
            Ok(shim) => {
                let address = GuestAddress::of(&record.vmm, env.layout.vsock(id));
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

/// Takes the holds of all containers again: they are in memory only.
fn hold_images(env: &BoxEnv, containers: Vec<ContainerRow>) -> Vec<ContainerRow> {
    for row in &containers {
        let snapshot = &row.snapshot;
        for image in snapshot.images() {
            if let Err(error) = env.images.hold(image, &snapshot.id) {
                tracing::warn!(
                    id = snapshot.id,
                    image,
                    error = report(&error),
                    "image of a container is not here any more"
                );
            }
        }
    }
    containers
}

/// Believes the shim about each container.
async fn recover_containers(
    shim: &ShimController,
    containers: &mut [ContainerRow],
    vm_alive: bool,
) {
    for row in containers {
        if !row.complete || row.snapshot.state == ContainerState::Exited {
            continue;
        }
        match shim.task_state(&row.snapshot.id).await {
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
                end::finish(row, exit, "");
            }
            Err(RuntimeError::Shim {
                kind: ErrorKind::NotFound,
                ..
            }) => end::finish_unknown(row, "its shim does not know it"),
            Err(error) => tracing::warn!(
                id = row.snapshot.id,
                error = report(&error),
                "state of a container is not known"
            ),
        }
    }
}

/// Drops half containers, and ends those whose VM is gone.
async fn settle(
    env: &BoxEnv,
    containers: Vec<ContainerRow>,
    vm_lives: bool,
    reason: &str,
    running: Option<&Running>,
) -> Vec<ContainerRow> {
    let mut kept = Vec::with_capacity(containers.len());
    for mut row in containers {
        if !row.complete {
            drop_half(env, &row, running).await;
            continue;
        }
        if !vm_lives && row.snapshot.state != ContainerState::Exited {
            end::finish_unknown(&mut row, reason);
        }
        kept.push(row);
    }
    kept
}

async fn drop_half(env: &BoxEnv, row: &ContainerRow, running: Option<&Running>) {
    let (id, box_id) = (&row.snapshot.id, &row.snapshot.box_id);
    if let Some(running) = running
        && let Err(error) = running.shim.delete_task(id).await
    {
        tracing::warn!(
            id,
            error = report(&error),
            "task of a half container is left in the guest"
        );
    }
    let bundle = env.layout.container_bundle(box_id, id);
    let removed = teardown::blocking(move || remove_tree(&bundle)).await;
    let removed = match removed {
        Ok(()) => env.database.delete_container(id).await,
        Err(error) => Err(error),
    };
    if let Err(error) = removed {
        tracing::warn!(id, error = report(&error), "half a container is left");
    }
    env.release_images(&row.snapshot);
}

async fn write_down(env: &BoxEnv, row: &BoxRow, containers: &[ContainerRow]) {
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
            "state of a box found again is not on disk"
        );
    }
}

fn names_in(directory: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(directory).map_err(|source| RuntimeError::Io {
        what: "cannot list",
        path: directory.to_owned(),
        source,
    })?;
    let names = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.collect())
}

/// Ends and removes bundles that belong to no row.
async fn end_orphans(env: &BoxEnv, known: &HashSet<String>) {
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
        Err(error) => return tracing::warn!(error = report(&error), "bundles cannot be listed"),
    };
    for id in names {
        if known.contains(&id) || check_id("bundle", &id).is_err() {
            continue;
        }
        tracing::warn!(id, "removing bundle or scratch disk without a box");
        teardown::clean_or_warn(env, &id).await;
        let bundle = env.layout.bundle(&id);
        if let Err(error) = teardown::blocking(move || remove_tree(&bundle)).await {
            tracing::warn!(id, error = report(&error), "bundle is left");
        }
    }
}
