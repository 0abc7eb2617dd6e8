//! [`BoxPolicy`]: the state machine of a box, a plain value without locks and I/O.
//!
//! It decides whether a request starts a job, joins one, is already satisfied, or is denied. The box's driver
//! (`litebox::driver`) owns it, runs the jobs and reports their results.
//!
//! ```text
//!            Start                Started
//!  Created ─────────▶ Starting ─────────▶ Ready
//!   │  ▲                │   │              │ │
//!   │  └── StartFailed ─┘   │ Stop    Stop │ │ VmGone
//!   │                       ▼              ▼ │
//!   │ Stop                Stopping ◀───────┘ │       (StopFailed: back to Ready)
//!   │                       │ Stopped        │
//!   └───────────────────▶ NotReady ◀─────────┘
//!
//!  any of them ── Remove ──▶ Removing ── RemoveDone ──▶ Removed       (RemoveFailed: NotReady, may be retried)
//! ```
//!
//! Happy path: Created → Starting → Ready → Stopping → NotReady → Removing → Removed. A stopped box cannot be started
//! again: a container created after Stop is denied, however the two race.

use crate::types::BoxState;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Internal state of a box. [`BoxState`] is its public form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// Registered, not started.
    Created,
    /// The start pipeline is running.
    Starting,
    /// The guest answers.
    Ready,
    /// Being stopped.
    Stopping,
    /// The VM has ended.
    NotReady,
    /// Being removed.
    Removing,
    /// Removed; the driver returns.
    Removed,
}

impl Phase {
    /// Returns the public state.
    pub fn public(self) -> BoxState {
        match self {
            Self::Created => BoxState::Created,
            Self::Starting => BoxState::Starting,
            Self::Ready => BoxState::Ready,
            Self::Stopping | Self::NotReady => BoxState::NotReady,
            Self::Removing | Self::Removed => BoxState::Removing,
        }
    }
}

/// Request of a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Run the start pipeline.
    Start,
    /// Stop the VM.
    Stop,
    /// Stop and remove the box.
    Remove,
}

/// Event reported by the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The pipeline succeeded.
    Started,
    /// The pipeline failed and undid itself.
    StartFailed,
    /// The VM was stopped on request.
    Stopped,
    /// The VM could not be stopped.
    StopFailed,
    /// Everything was removed.
    RemoveDone,
    /// Something could not be removed.
    RemoveFailed,
    /// The shim or the VMM died.
    VmGone,
}

/// Decision on a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// A new job starts; the phase has changed.
    Begin,
    /// The job is already running; wait for its result.
    Join,
    /// The request is already satisfied.
    Done,
}

/// Reason for which a request was denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// It was stopped, or its VM died; a box can be started only once.
    Stopped,
    /// It is being removed.
    Removing,
    /// It has been removed.
    Removed,
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopped => "it was stopped and cannot be started again",
            Self::Removing => "it is being removed",
            Self::Removed => "it has been removed",
        })
    }
}

/// The state machine of one box.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoxPolicy {
    phase: Phase,
}

impl BoxPolicy {
    /// Returns a state machine in `phase`.
    pub fn at(phase: Phase) -> Self {
        Self { phase }
    }

    /// Returns the present phase.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Decides on a request, and changes the phase if a job starts.
    ///
    /// # Errors
    /// [`Denied`], with the phase unchanged.
    pub fn request(&mut self, request: Request) -> Result<Verdict, Denied> {
        use Phase as P;
        let (verdict, next) = match (request, self.phase) {
            (Request::Start, P::Created) => (Verdict::Begin, P::Starting),
            (Request::Start, P::Starting) => (Verdict::Join, P::Starting),
            (Request::Start, P::Ready) => (Verdict::Done, P::Ready),
            (Request::Start, P::Stopping | P::NotReady) => return Err(Denied::Stopped),
            (Request::Start, P::Removing) => return Err(Denied::Removing),
            (Request::Start, P::Removed) => return Err(Denied::Removed),
            (Request::Stop, P::Created | P::Starting | P::Ready) => (Verdict::Begin, P::Stopping),
            (Request::Stop, P::Stopping) => (Verdict::Join, P::Stopping),
            (Request::Stop, P::NotReady) => (Verdict::Done, P::NotReady),
            (Request::Stop, P::Removing) => (Verdict::Join, P::Removing),
            (Request::Stop, P::Removed) => (Verdict::Done, P::Removed),
            (Request::Remove, P::Created | P::Starting | P::Ready | P::Stopping | P::NotReady) => {
                (Verdict::Begin, P::Removing)
            }
            (Request::Remove, P::Removing) => (Verdict::Join, P::Removing),
            (Request::Remove, P::Removed) => (Verdict::Done, P::Removed),
        };
        self.phase = next;
        Ok(verdict)
    }

    /// Checks that a container may be created, now or after the start.
    ///
    /// # Errors
    /// [`Denied`].
    pub fn admit_container(&self) -> Result<(), Denied> {
        match self.phase {
            Phase::Created | Phase::Starting | Phase::Ready => Ok(()),
            Phase::Stopping | Phase::NotReady => Err(Denied::Stopped),
            Phase::Removing => Err(Denied::Removing),
            Phase::Removed => Err(Denied::Removed),
        }
    }

    /// Applies an event; returns whether the phase changed. Events that do not fit the phase are ignored: if a start
    /// succeeds after Stop was requested, the phase remains Stopping and the driver stops the VM.
    pub fn event(&mut self, event: Event) -> bool {
        use Phase as P;
        let next = match (event, self.phase) {
            (Event::Started, P::Starting) => P::Ready,
            (Event::StartFailed, P::Starting) => P::Created,
            (Event::Stopped, P::Stopping) => P::NotReady,
            (Event::StopFailed, P::Stopping) => P::Ready,
            (Event::RemoveDone, P::Removing) => P::Removed,
            (Event::RemoveFailed, P::Removing) => P::NotReady,
            (Event::VmGone, P::Ready) => P::NotReady,
            (Event::Started | Event::StartFailed, _)
            | (Event::Stopped | Event::StopFailed, _)
            | (Event::RemoveDone | Event::RemoveFailed, _)
            | (Event::VmGone, _) => self.phase,
        };
        let changed = next != self.phase;
        self.phase = next;
        changed
    }
}

#[cfg(test)]
mod tests;
