//! Container rows of a driver: registration, changes, and exits with their reasons.
//!
//! Only rows change here; Task calls and bundles are in `litebox::containers`.

use super::exit::{finish, finish_unknown};
use super::{Change, Driver};
use crate::database::ContainerRow;
use crate::error::{Result, RuntimeError};
use crate::litebox::teardown::Exits;
use crate::shim_controller::TaskExit;
use crate::types::{ContainerSnapshot, ContainerState};
use boxlite_sys::report::report;

impl Driver {
    /// Registers a container. If one with the same id and name exists, returns its row.
    pub(super) async fn admit(&mut self, row: ContainerRow) -> Result<ContainerRow> {
        self.policy
            .admit_container()
            .map_err(|denied| self.denied(denied))?;
        let exists = |row: &ContainerRow, reason: &str| RuntimeError::AlreadyExists {
            subject: "container",
            id: row.snapshot.id.clone(),
            reason: reason.to_owned(),
        };
        if let Some(present) = self.containers.get(&row.snapshot.id) {
            return match present.snapshot.name == row.snapshot.name {
                true => Ok(present.clone()),
                false => Err(exists(&row, "it has another name")),
            };
        }
        if let Some(present) = self
            .containers
            .values()
            .find(|c| c.snapshot.name == row.snapshot.name)
        {
            return Err(exists(
                &row,
                &format!("its name is used by container {}", present.snapshot.id),
            ));
        }
        self.env.database.put_container(row.clone()).await?;
        self.containers.insert(row.snapshot.id.clone(), row.clone());
        self.publish();
        Ok(row)
    }

    /// Changes a container's row; persists before it publishes. If a fact cannot be persisted, that is only logged.
    pub(super) async fn change(
        &mut self,
        id: &str,
        change: Change,
        fact: bool,
    ) -> Result<ContainerSnapshot> {
        let mut row = self.row_of(id)?;
        change(&mut row);
        let snapshot = row.snapshot.clone();
        if fact {
            self.store(row).await;
        } else {
            self.env.database.put_container(row.clone()).await?;
            self.containers.insert(id.to_owned(), row);
        }
        self.publish();
        self.watch_running();
        Ok(snapshot)
    }

    fn row_of(&self, id: &str) -> Result<ContainerRow> {
        self.containers
            .get(id)
            .cloned()
            .ok_or_else(|| RuntimeError::NotFound {
                subject: "container",
                id: id.to_owned(),
            })
    }

    /// Deletes a container's row and releases its images; idempotent.
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

    /// Records an OOM kill of any process of the container. It becomes the reason of the container's exit regardless
    /// of the exit code, as with containerd, also across a restart of the daemon.
    pub(super) async fn note_oom(&mut self, id: &str) {
        if let Some(row) = self.containers.get(id)
            && row.snapshot.state == ContainerState::Running
            && !row.oom
        {
            let mut row = row.clone();
            row.oom = true;
            self.store(row).await;
        }
    }

    /// Records that a container exited.
    pub(super) async fn on_exit(&mut self, id: &str, exit: TaskExit, oom: bool) {
        let Ok(mut row) = self.row_of(id) else { return };
        if row.snapshot.state == ContainerState::Exited {
            return;
        }
        row.oom |= oom;
        finish(&mut row, exit, "");
        self.store(row).await;
        self.publish();
    }

    /// Marks every live container as exited: with the exit that the shim reported, otherwise as killed.
    pub(super) async fn end_containers(&mut self, exits: &Exits, reason: &str) {
        for id in self.live_containers() {
            let Ok(mut row) = self.row_of(&id) else {
                continue;
            };
            match exits.get(&id) {
                Some(exit) => finish(&mut row, *exit, ""),
                None => finish_unknown(&mut row, reason),
            }
            self.store(row).await;
        }
    }

    /// Marks every live container as exited without persisting that: the next start does the same.
    pub(super) fn end_in_memory(&mut self, reason: &str) {
        for row in self.containers.values_mut() {
            if row.snapshot.state != ContainerState::Exited {
                finish_unknown(row, reason);
            }
        }
    }

    /// Stores a row that holds even if it cannot be persisted; then only logs the failure.
    async fn store(&mut self, row: ContainerRow) {
        self.containers.insert(row.snapshot.id.clone(), row.clone());
        if let Err(error) = self.env.database.put_container(row.clone()).await {
            tracing::error!(
                id = row.snapshot.id,
                error = report(&error),
                "failed to persist container state"
            );
        }
    }

    /// Returns the ids of the containers that have not exited.
    pub(super) fn live_containers(&self) -> Vec<String> {
        self.containers
            .values()
            .filter(|row| row.snapshot.state != ContainerState::Exited)
            .map(|row| row.snapshot.id.clone())
            .collect()
    }
}
