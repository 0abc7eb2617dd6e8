//! [`BoxPolicy`]: the state machine of a box, as a plain value without locks and without I/O.
//!
//! It says whether a request is work, a join, done already, or denied and why; the box's driver (`litebox::driver`)
//! does the work and reports back. Only the driver holds one.
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
//!  any of them ── Remove ──▶ Removing ── RemoveDone ──▶ Removed       (RemoveFailed: NotReady, to be asked again)
//! ```
//!
//! Happy path: Created → Starting → Ready → Stopping → NotReady → Removing → Removed. A box that was stopped never
//! starts again: a container created after Stop is denied, however the two race.

use crate::types::BoxState;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Where the box is. [`BoxState`] is what outsiders see of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// Registered; nothing runs.
    Created,
    /// The pipeline is at work.
    Starting,
    /// The guest answers.
    Ready,
    /// On the way to NotReady.
    Stopping,
    /// The VM is gone.
    NotReady,
    /// On the way out.
    Removing,
    /// Gone; the driver ends.
    Removed,
}

impl Phase {
    /// What CRI-side callers see.
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

/// What callers ask of a box.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Run the pipeline.
    Start,
    /// End the VM.
    Stop,
    /// End and forget it.
    Remove,
}

/// What happened to a box.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The pipeline succeeded.
    Started,
    /// It failed and undid itself.
    StartFailed,
    /// The VM was ended as asked.
    Stopped,
    /// It could not be ended.
    StopFailed,
    /// Everything is removed.
    RemoveDone,
    /// Something is left.
    RemoveFailed,
    /// Shim or VMM died by themselves.
    VmGone,
}

/// The policy's answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// New work: the phase has changed.
    Begin,
    /// It is being done; wait for its end.
    Join,
    /// It is so already.
    Done,
}

/// Why a request was denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// It was stopped, or its VM died: a box starts once.
    Stopped,
    /// It is being removed.
    Removing,
    /// It is gone.
    Removed,
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopped => "it is stopped, and a stopped box does not start again",
            Self::Removing => "it is being removed",
            Self::Removed => "it is removed",
        })
    }
}

/// The state machine of one box.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoxPolicy {
    phase: Phase,
}

impl BoxPolicy {
    /// A machine that stands at `phase`.
    pub fn at(phase: Phase) -> Self {
        Self { phase }
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Judges a request and, when it begins work, moves on.
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

    /// Whether a container may be created: now, after a start, or never.
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

    /// Takes note of what happened; answers whether the phase changed. What comes too late for the phase is ignored:
    /// a start that succeeds after Stop was asked for leaves Stopping as it is, and the driver then stops what was
    /// started.
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
