//! The driver's half of events: what changed between two publications, told in the order in which it happened.
//!
//! Every change is published at once by the one task that makes it, so two publications never hide a step in between.
//! What an event carries and who follows is [`crate::events`]'.

use super::Driver;
use crate::events::{BoxEvent, EventKind, EventState};
use crate::litebox::{BoxView, now_ns, snapshot_of};
use crate::management::box_state::Phase;
use crate::types::ContainerState;
use std::sync::Arc;

/// What was told about the box itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    Nothing,
    Started,
    Stopped,
}

impl Told {
    /// What the daemon before this one had told.
    fn of(phase: Phase) -> Self {
        match phase {
            Phase::Created | Phase::Starting => Self::Nothing,
            Phase::Ready | Phase::Stopping | Phase::Removing => Self::Started,
            Phase::NotReady | Phase::Removed => Self::Stopped,
        }
    }
}

impl Driver {
    /// Tells what differs between two publications.
    pub(super) fn tell_changes(&mut self, before: &BoxView, now: &BoxView) {
        let mut changes = containers(before, now);
        changes.extend(self.told_of_box(now.phase));
        self.tell(now, changes);
    }

    /// Tells how a box that was found again stands: its followers may have missed how it came to that.
    pub(super) fn tell_found(&mut self, now: &BoxView) {
        self.told = Told::of(now.phase);
        let own = self.row.options.id.clone();
        let mut changes: Vec<_> = now
            .containers
            .values()
            .filter_map(|container| Some((kind_of(container.state)?, container.id.clone())))
            .collect();
        match self.told {
            Told::Nothing => {}
            Told::Started => changes.insert(0, (EventKind::Started, own)),
            Told::Stopped => changes.push((EventKind::Stopped, own)),
        }
        self.tell(now, changes);
    }

    fn told_of_box(&mut self, phase: Phase) -> Vec<(EventKind, String)> {
        let mut kinds = Vec::new();
        if phase == Phase::Ready && self.told == Told::Nothing {
            kinds.extend([EventKind::Created, EventKind::Started]);
            self.told = Told::Started;
        }
        if matches!(phase, Phase::NotReady | Phase::Removed) && self.told == Told::Started {
            kinds.push(EventKind::Stopped);
            self.told = Told::Stopped;
        }
        if phase == Phase::Removed && self.told == Told::Stopped {
            kinds.push(EventKind::Deleted);
        }
        let own = &self.row.options.id;
        kinds.into_iter().map(|kind| (kind, own.clone())).collect()
    }

    fn tell(&self, now: &BoxView, changes: Vec<(EventKind, String)>) {
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
            self.env.events.tell(BoxEvent {
                kind,
                id,
                at_ns: now_ns(),
                state: state.clone(),
            });
        }
    }
}

/// What a container's state says has happened to it last. One that is half created was not told of.
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
        // A creation that failed is never told, nor its end.
        let half = was.is_none_or(|was| was == ContainerState::Unknown);
        if was != Some(container.state) && !(half && container.state == ContainerState::Exited) {
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
