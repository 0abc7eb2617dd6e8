//! Watchers: tasks of a driver that wait for exits, one for the VM and one per running container.
//!
//! Task.Wait and WaitSandbox are authoritative. A watcher reconnects if the connection breaks while the shim lives. A
//! dead shim takes the VM with it (PDEATHSIG), which is noticed as soon as the kernel closes the shim's socket.

use super::Driver;
use crate::error::{ErrorKind, RuntimeError};
use crate::litebox::teardown::{self, Exits};
use crate::litebox::{BoxView, Running};
use crate::shim_controller::{ShimController, TaskExit};
use crate::types::ContainerState;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Delay between two attempts at a live shim that does not answer.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);
/// Timeout for asking the guest whether an exit was an OOM kill; it delays the exit's publication.
const OOM_QUERY_TIMEOUT: Duration = Duration::from_millis(500);
/// Reconnection attempts before a live shim that does not serve counts as dead; the cleanup kills it.
const MAX_RECONNECTS: u32 = 5;
/// Key of the VM's watcher among the containers' watchers; no container has an empty id.
const VM_KEY: &str = "";

/// Result of a watcher.
pub(super) enum WatchEvent {
    /// A container exited.
    Exited {
        id: String,
        exit: TaskExit,
        oom: bool,
    },
    /// The shim does not know the container.
    Unknown { id: String },
    /// A new connection to the same shim.
    Reconnected { running: Box<Running> },
    /// The VM or its shim died.
    VmGone { reason: String, exits: Exits },
}

impl Driver {
    /// Starts missing watchers.
    pub(super) fn watch_running(&mut self) {
        let Some(running) = self.running.clone() else {
            return;
        };
        if !self.watched.contains_key(VM_KEY) {
            let watcher = watch_vm(
                running.clone(),
                self.row.options.id.clone(),
                self.view.subscribe(),
            );
            let handle = self.watchers.spawn(watcher);
            self.watched.insert(VM_KEY.to_owned(), handle);
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

    /// Aborts all watchers.
    pub(super) fn stop_watching(&mut self) {
        self.watchers.abort_all();
        self.watched.clear();
    }
}

async fn watch_container(running: Running, id: String) -> WatchEvent {
    loop {
        match running.shim.wait_task(&id).await {
            Ok(exit) => {
                let oom = exit.code != 0 && was_oom(&running, &id).await;
                return WatchEvent::Exited { id, exit, oom };
            }
            Err(RuntimeError::Shim {
                kind: ErrorKind::NotFound,
                ..
            }) => return WatchEvent::Unknown { id },
            // The VM's watcher handles a broken connection and restarts this one.
            Err(RuntimeError::ShimConnection { .. }) => std::future::pending::<()>().await,
            Err(error) => {
                tracing::debug!(id, %error, "Task.Wait failed, retrying");
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
    }
}

/// Asks the guest whether the OOM killer ended the container. False if the guest does not answer; OOM events count too.
async fn was_oom(running: &Running, id: &str) -> bool {
    let container = running.session.container();
    let asking = container.list(Some(id));
    match tokio::time::timeout(OOM_QUERY_TIMEOUT, asking).await {
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
) -> WatchEvent {
    loop {
        match running.shim.wait_sandbox().await {
            Ok(_) => {
                let live: Vec<String> = live_containers(&view);
                let exits = teardown::exits_of(&running.shim, live).await;
                let reason = "its VM ended".to_owned();
                return WatchEvent::VmGone { reason, exits };
            }
            Err(RuntimeError::ShimConnection { .. }) => {
                return match reconnect(&running.shim, &box_id).await {
                    Some(shim) => WatchEvent::Reconnected {
                        running: Box::new(Running {
                            shim,
                            session: running.session,
                        }),
                    },
                    None => WatchEvent::VmGone {
                        reason: "its shim died".to_owned(),
                        exits: Exits::new(),
                    },
                };
            }
            Err(error) => {
                tracing::debug!(box_id, %error, "WaitSandbox failed, retrying");
                tokio::time::sleep(RETRY_INTERVAL).await;
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

/// Reconnects to a shim whose process lives; `None` if it is dead.
async fn reconnect(shim: &ShimController, box_id: &str) -> Option<ShimController> {
    for _ in 0..MAX_RECONNECTS {
        if !shim.alive() {
            return None;
        }
        match ShimController::adopt(box_id, shim.state().clone()).await {
            Ok(shim) => return Some(shim),
            Err(error) => tracing::debug!(box_id, %error, "shim does not answer"),
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
    None
}
