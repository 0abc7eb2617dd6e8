//! The driver's half of containers: their rows, their ends, and why they ended.
//!
//! What is done to a container (Task calls, bundles) is `litebox::containers`'; only rows change here.

use super::{Change, Driver};
use crate::database::ContainerRow;
use crate::error::{Result, RuntimeError};
use crate::litebox::now_ns;
use crate::litebox::teardown::Exits;
use crate::shim_controller::TaskExit;
use crate::types::{ContainerSnapshot, ContainerState};
use boxlite_sys::report::report;

/// Exit code of what was killed with its VM: 128 + SIGKILL.
pub(crate) const KILLED: i32 = 137;

impl Driver {
    /// Registers a container. One that is there with the same id and name is answered as it is.
    pub(super) async fn admit(&mut self, row: ContainerRow) -> Result<ContainerRow> {
        self.policy
            .admit_container()
            .map_err(|denied| self.denied(denied))?;
        let exists = |row: &ContainerRow, reason: &str| RuntimeError::AlreadyExists {
            what: "container",
            id: row.snapshot.id.clone(),
            reason: reason.to_owned(),
        };
        if let Some(present) = self.containers.get(&row.snapshot.id) {
            return match present.snapshot.name == row.snapshot.name {
                true => Ok(present.clone()),
                false => Err(exists(&row, "under another name")),
            };
        }
        if let Some(present) = self
            .containers
            .values()
            .find(|c| c.snapshot.name == row.snapshot.name)
        {
            return Err(exists(
                &row,
                &format!("its name is that of {}", present.snapshot.id),
            ));
        }
        self.env.database.put_container(row.clone()).await?;
        self.containers.insert(row.snapshot.id.clone(), row.clone());
        self.publish();
        Ok(row)
    }

    /// Changes a container's row, on disk first.
    pub(super) async fn change(&mut self, id: &str, change: Change) -> Result<ContainerSnapshot> {
        let mut row = self.row_of(id)?;
        change(&mut row);
        self.env.database.put_container(row.clone()).await?;
        let snapshot = row.snapshot.clone();
        self.containers.insert(id.to_owned(), row);
        self.publish();
        self.watch_what_runs();
        Ok(snapshot)
    }

    fn row_of(&self, id: &str) -> Result<ContainerRow> {
        self.containers
            .get(id)
            .cloned()
            .ok_or_else(|| RuntimeError::NotFound {
                what: "container",
                id: id.to_owned(),
            })
    }

    /// Forgets a container and lets go of its image; ok where there is none.
    pub(super) async fn forget(&mut self, id: &str) -> Result<()> {
        self.env.database.delete_container(id).await?;
        if let Some(watcher) = self.watched.remove(id) {
            watcher.abort();
        }
        if let Some(row) = self.containers.remove(id) {
            self.env.release_images(&row.snapshot);
            self.publish();
        }
        Ok(())
    }

    /// An OOM kill, of whatever process of the container, is remembered until the container ends, also by the next daemon:
    /// it is the reason of the end then, whatever the exit code (containerd's way).
    pub(super) async fn note_oom(&mut self, id: &str) {
        if let Some(row) = self.containers.get(id)
            && row.snapshot.state == ContainerState::Running
            && !row.oom
        {
            let mut row = row.clone();
            row.oom = true;
            self.keep(row).await;
        }
    }

    /// A container ended by itself or by a signal.
    pub(super) async fn on_exit(&mut self, id: &str, exit: TaskExit, oom: bool) {
        let Ok(mut row) = self.row_of(id) else { return };
        if row.snapshot.state == ContainerState::Exited {
            return;
        }
        row.oom |= oom;
        finish(&mut row, exit, "");
        self.keep(row).await;
        self.publish();
    }

    /// Every container that has not ended ends now: as the shim told, or killed.
    pub(super) async fn end_containers(&mut self, exits: &Exits, reason: &str) {
        for id in self.live_containers() {
            let Ok(mut row) = self.row_of(&id) else {
                continue;
            };
            match exits.get(&id) {
                Some(exit) => finish(&mut row, *exit, ""),
                None => finish_unknown(&mut row, reason),
            }
            self.keep(row).await;
        }
    }

    /// What is true whether it can be written down or not.
    async fn keep(&mut self, row: ContainerRow) {
        if let Err(error) = self.env.database.put_container(row.clone()).await {
            tracing::error!(
                id = row.snapshot.id,
                error = report(&error),
                "news of a container are not on disk"
            );
        }
        self.containers.insert(row.snapshot.id.clone(), row);
    }

    /// Ids of those that have not ended.
    pub(super) fn live_containers(&self) -> Vec<String> {
        self.containers
            .values()
            .filter(|row| row.snapshot.state != ContainerState::Exited)
            .map(|row| row.snapshot.id.clone())
            .collect()
    }
}

/// Exited, with the reason that the kubelet knows from containerd.
pub(crate) fn finish(row: &mut ContainerRow, exit: TaskExit, message: &str) {
    let snapshot = &mut row.snapshot;
    snapshot.state = ContainerState::Exited;
    snapshot.exit_code = exit.code;
    // The guest's clock, within what the host knows: not before its start, not in the future.
    let now = now_ns();
    snapshot.finished_at_ns = match exit.at_ns {
        at if at > 0 => at.max(snapshot.started_at_ns).min(now),
        _ => now,
    };
    snapshot.message = message.to_owned();
    snapshot.reason = match exit.code {
        _ if row.oom => "OOMKilled",
        0 => "Completed",
        _ => "Error",
    }
    .to_owned();
}

/// Exited with its VM; nobody saw how.
pub(crate) fn finish_unknown(row: &mut ContainerRow, message: &str) {
    let exit = TaskExit {
        code: KILLED,
        at_ns: 0,
    };
    finish(row, exit, message);
    if !row.oom {
        row.snapshot.reason = "Unknown".to_owned();
    }
}
