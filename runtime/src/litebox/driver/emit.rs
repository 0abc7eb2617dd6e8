//! Emits the events that follow from the difference between two publications of a driver, in the order of the changes.
//!
//! A driver publishes after every change, so no state is skipped between two publications. Contents and subscribers of
//! events are in [`crate::events`].

use super::Driver;
use crate::box_state::Phase;
use crate::events::{BoxEvent, EventKind, EventState};
use crate::litebox::{BoxView, now_ns, snapshot_of};
use crate::types::ContainerState;
use std::sync::Arc;

/// Last event emitted for the box itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Emitted {
    Nothing,
    Started,
    Stopped,
}

impl Emitted {
    /// Returns the last event that the previous daemon emitted.
    fn of(phase: Phase) -> Self {
        match phase {
            Phase::Created | Phase::Starting => Self::Nothing,
            Phase::Ready | Phase::Stopping | Phase::Removing => Self::Started,
            Phase::NotReady | Phase::Removed => Self::Stopped,
        }
    }
}

impl Driver {
    /// Emits the difference between two publications.
    pub(super) fn emit_changes(&mut self, before: &BoxView, now: &BoxView) {
        let mut changes = containers(before, now);
        changes.extend(self.sandbox_changes(now.phase));
        self.emit(now, changes);
    }

    /// Emits the state of a recovered box, because subscribers may have missed its latest changes.
    pub(super) fn emit_recovered(&mut self, now: &BoxView) {
        self.emitted = Emitted::of(now.phase);
        let own = self.row.options.id.clone();
        let mut changes: Vec<_> = now
            .containers
            .values()
            .filter_map(|container| Some((kind_of(container.state)?, container.id.clone())))
            .collect();
        match self.emitted {
            Emitted::Nothing => {}
            Emitted::Started => changes.insert(0, (EventKind::Started, own)),
            Emitted::Stopped => changes.push((EventKind::Stopped, own)),
        }
        self.emit(now, changes);
    }

    fn sandbox_changes(&mut self, phase: Phase) -> Vec<(EventKind, String)> {
        let mut kinds = Vec::new();
        if phase == Phase::Ready && self.emitted == Emitted::Nothing {
            kinds.extend([EventKind::Created, EventKind::Started]);
            self.emitted = Emitted::Started;
        }
        if matches!(phase, Phase::NotReady | Phase::Removed) && self.emitted == Emitted::Started {
            kinds.push(EventKind::Stopped);
            self.emitted = Emitted::Stopped;
        }
        if phase == Phase::Removed && self.emitted == Emitted::Stopped {
            kinds.push(EventKind::Deleted);
        }
        let own = &self.row.options.id;
        kinds.into_iter().map(|kind| (kind, own.clone())).collect()
    }

    fn emit(&self, now: &BoxView, changes: Vec<(EventKind, String)>) {
        if changes.is_empty() {
            return;
        }
        let state = Arc::new(EventState {
            sandbox: snapshot_of(
                &self.row.options,
                self.row.created_at_ns,
                now,
                &self.metrics,
            ),
            containers: now.containers.values().cloned().collect(),
        });
        for (kind, id) in changes {
            self.env.events.emit(BoxEvent {
                kind,
                id,
                at_ns: now_ns(),
                state: state.clone(),
            });
        }
    }
}

/// Returns the event that led to a container's state; none for a container that is still being created.
fn kind_of(state: ContainerState) -> Option<EventKind> {
    match state {
        ContainerState::Created => Some(EventKind::Created),
        ContainerState::Running => Some(EventKind::Started),
        ContainerState::Exited => Some(EventKind::Stopped),
        ContainerState::Unknown => None,
    }
}

fn containers(before: &BoxView, now: &BoxView) -> Vec<(EventKind, String)> {
    let mut changes = Vec::new();
    for (id, container) in &now.containers {
        let was = before.containers.get(id).map(|container| container.state);
        // A failed creation emits nothing.
        let creating = was.is_none_or(|was| was == ContainerState::Unknown);
        if was != Some(container.state) && !(creating && container.state == ContainerState::Exited)
        {
            changes.extend(kind_of(container.state).map(|kind| (kind, id.clone())));
        }
    }
    for (id, was) in &before.containers {
        if now.containers.contains_key(id) || was.state == ContainerState::Unknown {
            continue;
        }
        if was.state == ContainerState::Running {
            changes.push((EventKind::Stopped, id.clone()));
        }
        changes.push((EventKind::Deleted, id.clone()));
    }
    changes
}
