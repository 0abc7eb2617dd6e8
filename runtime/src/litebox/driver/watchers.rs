//! Watchers: tasks of a driver that wait for the ends of what runs — one for the VM, one per running container.
//!
//! Task.Wait and WaitSandbox are the truth, events only hurry things. A connection that breaks while the shim lives
//! is made anew; a shim that is dead ends the VM (its child dies with it), and that shows as soon as the kernel
//! closes its socket.

use super::Driver;
use crate::error::{ErrorKind, RuntimeError};
use crate::litebox::teardown::{self, Exits};
use crate::litebox::{BoxView, Running};
use crate::shim_controller::{ShimController, TaskExit};
use crate::types::ContainerState;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Between two tries at a shim that lives and does not answer.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// For asking the guest whether an exit was an OOM kill; part of the time in which the exit must show.
const OOM_LIMIT: Duration = Duration::from_millis(500);
/// Reconnects tried before a live shim that does not serve counts as dead; its clean-up kills it.
const RECONNECTS: u32 = 5;
/// Key of the VM's watcher among those of containers; no container has an empty id.
const VM: &str = "";

/// What a watcher saw.
pub(super) enum Watched {
    /// A container ended.
    Exited {
        id: String,
        exit: TaskExit,
        oom: bool,
    },
    /// Nothing that concerns the box any more.
    Nothing { id: String },
    /// A new connection to the same shim.
    Reconnected { running: Box<Running> },
    /// The VM or its shim is dead.
    VmGone { reason: String, exits: Exits },
}

impl Driver {
    /// Starts the watchers that are missing.
    pub(super) fn watch_what_runs(&mut self) {
        let Some(running) = self.running.clone() else {
            return;
        };
        if !self.watched.contains_key(VM) {
            let watcher = watch_vm(
                running.clone(),
                self.row.options.id.clone(),
                self.view.subscribe(),
            );
            let handle = self.watchers.spawn(watcher);
            self.watched.insert(VM.to_owned(), handle);
        }
        for row in self.containers.values() {
            let id = &row.snapshot.id;
            if row.snapshot.state == ContainerState::Running && !self.watched.contains_key(id) {
                let handle = self
                    .watchers
                    .spawn(watch_container(running.clone(), id.clone()));
                self.watched.insert(id.clone(), handle);
            }
        }
    }

    /// Ends all watchers.
    pub(super) fn stop_watching(&mut self) {
        self.watchers.abort_all();
        self.watched.clear();
    }
}

async fn watch_container(running: Running, id: String) -> Watched {
    loop {
        match running.shim.wait_task(&id).await {
            Ok(exit) => {
                let oom = exit.code != 0 && was_oom(&running, &id).await;
                return Watched::Exited { id, exit, oom };
            }
            Err(RuntimeError::Shim {
                kind: ErrorKind::NotFound,
                ..
            }) => return Watched::Nothing { id },
            // The VM's watcher says what a broken connection means, and starts this one anew.
            Err(RuntimeError::ShimConnection { .. }) => std::future::pending::<()>().await,
            Err(error) => {
                tracing::debug!(id, %error, "Task.Wait failed; trying again");
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }
}

/// Whether the guest says that the kernel killed it for want of memory. A guest that cannot be asked leaves it at
/// what events said.
async fn was_oom(running: &Running, id: &str) -> bool {
    let container = running.session.container();
    let asking = container.list(Some(id));
    match tokio::time::timeout(OOM_LIMIT, asking).await {
        Ok(Ok(list)) => list.iter().any(|info| {
            info.container_id == id && info.exit.as_ref().is_some_and(|exit| exit.oom_killed)
        }),
        _ => false,
    }
}

async fn watch_vm(
    running: Running,
    box_id: String,
    view: watch::Receiver<Arc<BoxView>>,
) -> Watched {
    loop {
        match running.shim.wait_sandbox().await {
            Ok(_) => {
                let live: Vec<String> = live_containers(&view);
                let exits = teardown::exits_of(&running.shim, live).await;
                let reason = "its VM ended".to_owned();
                return Watched::VmGone { reason, exits };
            }
            Err(RuntimeError::ShimConnection { .. }) => {
                return match reconnect(&running.shim, &box_id).await {
                    Some(shim) => Watched::Reconnected {
                        running: Box::new(Running {
                            shim,
                            session: running.session,
                        }),
                    },
                    None => Watched::VmGone {
                        reason: "its shim died".to_owned(),
                        exits: Exits::new(),
                    },
                };
            }
            Err(error) => {
                tracing::debug!(box_id, %error, "WaitSandbox failed; trying again");
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }
}

fn live_containers(view: &watch::Receiver<Arc<BoxView>>) -> Vec<String> {
    let view = view.borrow().clone();
    let live = view
        .containers
        .values()
        .filter(|c| c.state != ContainerState::Exited);
    live.map(|container| container.id.clone()).collect()
}

/// A new connection to a shim whose process lives; `None` where it is dead.
async fn reconnect(shim: &ShimController, box_id: &str) -> Option<ShimController> {
    for _ in 0..RECONNECTS {
        if !shim.alive() {
            return None;
        }
        match ShimController::adopt(box_id, shim.record().clone()).await {
            Ok(shim) => return Some(shim),
            Err(error) => tracing::debug!(box_id, %error, "shim does not answer"),
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
    None
}
