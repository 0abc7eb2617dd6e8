//! [`Policy`]: decides which warm VMs are made and removed. A pure state machine: time and memory are arguments, and
//! [`super::Pool`] performs the steps.
//!
//! ```text
//!  (none) ──begin──► Filling ──filled──► Warm ──claim──► (none: the pod's, for good)
//!                       │ failed          │ remove: pressure, ceiling, obsolete shape, died
//!                       ▼                 ▼
//!                     (none)            (none)
//! ```
//!
//! No transition leads back from a claim, so a VM serves at most one pod.

use boxlite_proto::vmm::IdRange;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Number of pod starts from which shapes are learnt.
const LEARNING_WINDOW: usize = 32;
/// Interval at which memory is checked while there is nothing else to do.
const POLL_INTERVAL: Duration = Duration::from_secs(2);
/// Maximum delay after failed fills; the first delay is one second and doubles.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(60);
/// Number of failed claims in a row after which the pool pauses: each one costs a boot.
const MAX_FAILED_CLAIMS: u32 = 3;
/// Duration of that pause.
const PAUSE_TIME: Duration = Duration::from_secs(600);
/// Memory of a waiting VM before one was measured: that of an idle pod on QEMU with TCG.
const INITIAL_ESTIMATE_BYTES: u64 = 192 << 20;

/// Size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shape {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
}

/// Settings of the pool.
#[derive(Debug, Clone)]
pub struct PoolSettings {
    /// Maximum number of waiting VMs.
    pub size: usize,
    /// Maximum host memory that waiting VMs use together, in bytes.
    pub max_bytes: u64,
    /// Available memory of the node below which waiting VMs are removed, in bytes.
    pub min_available_bytes: u64,
    /// Time without a pod start after which the node counts as idle.
    pub idle: Duration,
    /// Shapes to keep; empty to learn them from recent pods.
    pub shapes: Vec<Shape>,
    /// Shape of a pod without limits, kept until pods have come.
    pub default_shape: Shape,
    /// Size of the scratch disk of every pod, in bytes.
    pub scratch_bytes: u64,
    /// True if the guest's kernel messages go to the console log.
    pub debug_console: bool,
    /// Users of the VMs; `None` for root.
    pub vmm_ids: Option<IdRange>,
}

/// Reason for the removal of a waiting VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Removal {
    /// Memory is short on the node.
    Pressure,
    /// The waiting VMs use more memory than configured.
    Ceiling,
    /// Another shape is wanted and there is no space for both.
    Obsolete,
    /// It ended while it waited.
    Died,
}

impl Removal {
    /// Returns the label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pressure => "pressure",
            Self::Ceiling => "ceiling",
            Self::Obsolete => "obsolete",
            Self::Died => "died",
        }
    }
}

/// Next step of the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Boot a VM of this shape.
    Fill(Shape),
    /// Remove this VM; it cannot be claimed any more.
    Remove(String, Removal),
    /// Nothing to do for this time.
    Wait(Duration),
}

/// Counters since the daemon's start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PoolCounters {
    /// Pods that got a warm VM.
    pub hits: u64,
    /// Pods for which no warm VM waited.
    pub misses: u64,
    /// Pods that booted cold because the claim failed.
    pub failed_claims: u64,
    /// VMs made.
    pub fills: u64,
    /// Total time of those boots.
    pub fill_time: Duration,
    /// VMs that could not be made.
    pub failed_fills: u64,
    /// VMs removed unused, by reason.
    pub removals: BTreeMap<Removal, u64>,
}

/// State of the pool for status and metrics.
#[derive(Debug, Clone)]
pub struct PoolStatus {
    /// Configured number of VMs.
    pub size: usize,
    /// Waiting VMs with their age, oldest first.
    pub warm: Vec<(Shape, Duration)>,
    /// True while a VM is being made.
    pub filling: bool,
    /// Measured memory of the waiting VMs in bytes.
    pub bytes: u64,
    /// Reason why the pool is not being filled, if it is not.
    pub held: Option<&'static str>,
    /// Counters.
    pub counters: PoolCounters,
}

#[derive(Debug, Clone)]
struct Member {
    shape: Shape,
    bytes: u64,
    /// `None` while it boots.
    warm_since: Option<Instant>,
}

/// The state machine.
#[derive(Debug)]
pub(super) struct Policy {
    settings: PoolSettings,
    members: BTreeMap<String, Member>,
    recent: VecDeque<Shape>,
    last_start: Option<Instant>,
    pressed: bool,
    estimate_bytes: u64,
    failed_fills: u32,
    retry_at: Option<Instant>,
    failed_claims: u32,
    paused_until: Option<Instant>,
    counters: PoolCounters,
}

impl Policy {
    pub(super) fn new(settings: PoolSettings) -> Self {
        Self {
            settings,
            members: BTreeMap::new(),
            recent: VecDeque::new(),
            last_start: None,
            pressed: false,
            estimate_bytes: INITIAL_ESTIMATE_BYTES,
            failed_fills: 0,
            retry_at: None,
            failed_claims: 0,
            paused_until: None,
            counters: PoolCounters::default(),
        }
    }

    pub(super) fn settings(&self) -> &PoolSettings {
        &self.settings
    }

    /// Returns the next step, given the node's available memory.
    pub(super) fn step(&mut self, now: Instant, available_bytes: u64) -> Step {
        let minimum = self.settings.min_available_bytes;
        if available_bytes < minimum {
            self.pressed = true;
            if let Some(id) = self.oldest(|_| true) {
                return self.remove(id, Removal::Pressure);
            }
        } else if available_bytes >= minimum.saturating_add(2 * self.estimate_bytes) {
            // Not at the minimum itself: the next VM would be removed at once.
            self.pressed = false;
        }
        if self.bytes() > self.settings.max_bytes
            && let Some(id) = self.oldest(|_| true)
        {
            return self.remove(id, Removal::Ceiling);
        }
        if self.pressed || self.is_paused(now) {
            return Step::Wait(POLL_INTERVAL);
        }
        let delays = [self.idle_at(), self.retry_at];
        if let Some(later) = delays.into_iter().flatten().filter(|at| *at > now).max() {
            return Step::Wait((later - now).min(POLL_INTERVAL));
        }
        let Some(shape) = self.missing() else {
            return Step::Wait(POLL_INTERVAL);
        };
        let fits = self.members.len() < self.settings.size
            && self.bytes() + self.estimate_bytes <= self.settings.max_bytes;
        if fits {
            return Step::Fill(shape);
        }
        match self.surplus() {
            Some(id) => self.remove(id, Removal::Obsolete),
            None => Step::Wait(POLL_INTERVAL),
        }
    }

    /// Adds a VM that is being made.
    pub(super) fn begin(&mut self, id: String, shape: Shape) {
        let member = Member {
            shape,
            bytes: self.estimate_bytes,
            warm_since: None,
        };
        self.members.insert(id, member);
    }

    /// Records that a VM has booted, with its measured memory.
    pub(super) fn filled(&mut self, id: &str, bytes: u64, took: Duration, now: Instant) {
        self.failed_fills = 0;
        self.retry_at = None;
        self.counters.fills += 1;
        self.counters.fill_time += took;
        if bytes > 0 {
            self.estimate_bytes = bytes;
        }
        if let Some(member) = self.members.get_mut(id) {
            member.bytes = self.estimate_bytes;
            member.warm_since = Some(now);
        }
    }

    /// Records that a VM could not be made.
    pub(super) fn fill_failed(&mut self, id: &str, now: Instant) {
        self.members.remove(id);
        self.counters.failed_fills += 1;
        let delay = Duration::from_secs(1 << self.failed_fills.min(6)).min(MAX_RETRY_DELAY);
        self.failed_fills += 1;
        self.retry_at = Some(now + delay);
    }

    /// Takes a VM for a pod that starts now; `None` if none of its shape waits. A pod that no VM of the pool could serve is
    /// passed without shape.
    pub(super) fn claim(&mut self, shape: Option<Shape>, now: Instant) -> Option<String> {
        self.last_start = Some(now);
        let shape = shape?;
        self.recent.push_back(shape);
        if self.recent.len() > LEARNING_WINDOW {
            self.recent.pop_front();
        }
        let found = match self.is_paused(now) {
            true => None,
            false => self.oldest(|member| member.shape == shape),
        };
        match &found {
            Some(id) => drop(self.members.remove(id)),
            None => self.counters.misses += 1,
        }
        found
    }

    /// Records the result of a claim: whether the pod runs in the VM.
    pub(super) fn claimed(&mut self, succeeded: bool, now: Instant) {
        if succeeded {
            self.counters.hits += 1;
            self.failed_claims = 0;
            return;
        }
        self.counters.failed_claims += 1;
        self.failed_claims += 1;
        if self.failed_claims >= MAX_FAILED_CLAIMS {
            self.paused_until = Some(now + PAUSE_TIME);
        }
    }

    /// Removes a VM that ended; returns false if it was claimed or removed before.
    pub(super) fn died(&mut self, id: &str) -> bool {
        let known = self.members.contains_key(id);
        if known {
            self.remove(id.to_owned(), Removal::Died);
        }
        known
    }

    /// Returns the state.
    pub(super) fn status(&self, now: Instant) -> PoolStatus {
        let mut warm: Vec<(Shape, Duration)> = self
            .members
            .values()
            .filter_map(|member| {
                Some((
                    member.shape,
                    now.saturating_duration_since(member.warm_since?),
                ))
            })
            .collect();
        warm.sort_by_key(|(_, age)| std::cmp::Reverse(*age));
        let held = if self.is_paused(now) {
            Some("claims failed")
        } else if self.pressed {
            Some("memory pressure")
        } else if self.retry_at.is_some_and(|at| at > now) {
            Some("the last boot failed")
        } else {
            None
        };
        PoolStatus {
            size: self.settings.size,
            filling: self.members.len() > warm.len(),
            warm,
            bytes: self.bytes(),
            held,
            counters: self.counters.clone(),
        }
    }

    fn remove(&mut self, id: String, reason: Removal) -> Step {
        self.members.remove(&id);
        *self.counters.removals.entry(reason).or_default() += 1;
        Step::Remove(id, reason)
    }

    fn bytes(&self) -> u64 {
        self.members.values().map(|member| member.bytes).sum()
    }

    fn is_paused(&self, now: Instant) -> bool {
        self.paused_until.is_some_and(|until| until > now)
    }

    /// Returns the time from which the node counts as idle.
    fn idle_at(&self) -> Option<Instant> {
        self.last_start.map(|last| last + self.settings.idle)
    }

    /// Returns the waiting VM that waits longest among those that `select` accepts.
    fn oldest(&self, select: impl Fn(&Member) -> bool) -> Option<String> {
        self.members
            .iter()
            .filter(|(_, member)| select(member))
            .filter_map(|(id, member)| Some((member.warm_since?, id)))
            .min()
            .map(|(_, id)| id.clone())
    }

    /// Returns the shapes of a full pool, the most important first: the recent pods' shapes in proportion (d'Hondt).
    fn wanted(&self) -> Vec<Shape> {
        let mut weights: Vec<(Shape, usize)> = Vec::new();
        let mut add = |shape: Shape| match weights.iter_mut().find(|(known, _)| *known == shape) {
            Some((_, count)) => *count += 1,
            None => weights.push((shape, 1)),
        };
        if !self.settings.shapes.is_empty() {
            self.settings.shapes.iter().copied().for_each(&mut add);
        } else if self.recent.is_empty() {
            add(self.settings.default_shape);
        } else {
            // The newest first, so that it wins a tie.
            self.recent.iter().rev().copied().for_each(&mut add);
        }
        let mut assigned = vec![0; weights.len()];
        let mut wanted = Vec::with_capacity(self.settings.size);
        for _ in 0..self.settings.size {
            let mut best = 0;
            for next in 1..weights.len() {
                // weights[next] / (assigned[next] + 1) > weights[best] / (assigned[best] + 1)
                if weights[next].1 * (assigned[best] + 1) > weights[best].1 * (assigned[next] + 1) {
                    best = next;
                }
            }
            assigned[best] += 1;
            wanted.push(weights[best].0);
        }
        wanted
    }

    /// Returns the most important wanted shape that has too few VMs.
    fn missing(&self) -> Option<Shape> {
        let mut present: Vec<Shape> = self.members.values().map(|member| member.shape).collect();
        self.wanted().into_iter().find(|shape| {
            let found = present.iter().position(|known| known == shape);
            found.map(|at| present.swap_remove(at)).is_none()
        })
    }

    /// Returns a waiting VM whose shape has too many.
    fn surplus(&self) -> Option<String> {
        let wanted = self.wanted();
        self.oldest(|member| {
            let count = |shapes: &mut dyn Iterator<Item = Shape>| {
                shapes.filter(|shape| *shape == member.shape).count()
            };
            count(&mut self.members.values().map(|other| other.shape))
                > count(&mut wanted.iter().copied())
        })
    }
}

#[cfg(test)]
mod tests;
