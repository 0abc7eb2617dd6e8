//! Spans of the shim's calls and of the steps that the guest reports.
//!
//! A call is traced if its client sent a `traceparent`, as boxlite-cri and containerd's tracing plugin do; nothing else begins a
//! trace. The guest is hostile: it sends kinds and times, and [`guest_steps`] decides names, parents and limits.

use crate::pod::Context;
use boxlite_proto::boxlite::v1::{Step, StepKind};
use boxlite_telemetry::{Kind, Span, TraceContext};
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use std::time::{Duration, SystemTime};

/// Maximum number of steps that are read from an answer. Each kind counts once, so that more are never recorded.
const MAX_STEPS: usize = 16;

/// Starts the span of a call. It has the names of the pod, if they are known.
pub fn server(context: &TtrpcContext, rpc: &'static str, pod: &Context) -> Span {
    let header = |name| {
        let values = context.metadata.get(name)?;
        values.first().map(String::as_str)
    };
    let span = Span::below(&TraceContext::extract(header), rpc, Kind::Server);
    span.set("boxlite.sandbox.id", &pod.id);
    if let Some(pod) = pod.pod.get() {
        span.set("k8s.namespace.name", &pod.namespace);
        span.set("k8s.pod.name", &pod.name);
        span.set("k8s.pod.uid", &pod.uid);
    }
    span
}

/// A call to the guest in progress. Its span fails unless the call is answered.
#[derive(Debug)]
pub struct GuestCall {
    span: Span,
    begun: SystemTime,
    answered: bool,
}

impl GuestCall {
    /// Starts the span of a call, below the current one.
    pub fn begin(rpc: &'static str) -> Self {
        Self {
            span: Span::child(rpc, Kind::Client),
            begun: SystemTime::now(),
            answered: false,
        }
    }

    /// Returns whether the guest is to report its steps.
    pub fn traced(&self) -> bool {
        self.span.context().is_sampled()
    }

    /// Ends the span with the steps of the answer.
    pub fn answered(mut self, steps: &[Step]) {
        self.answered = true;
        let call = Limits {
            parent: self.span.context(),
            begin: self.begun,
        };
        guest_steps(steps, SystemTime::now(), &call, &call);
    }

    /// As [`Self::answered`], for the first call after a boot that began at `boot`.
    pub fn answered_after_boot(mut self, steps: &[Step], boot: SystemTime) {
        self.answered = true;
        let call = Limits {
            parent: self.span.context(),
            begin: self.begun,
        };
        let boot = Limits {
            parent: TraceContext::current(),
            begin: boot,
        };
        guest_steps(steps, SystemTime::now(), &call, &boot);
    }
}

impl Drop for GuestCall {
    fn drop(&mut self) {
        if !self.answered {
            self.span.fail("");
        }
    }
}

/// The span below which steps are recorded, and its begin: no step is earlier.
struct Limits {
    parent: TraceContext,
    begin: SystemTime,
}

/// Records the steps of an answer that arrived at `now`.
fn guest_steps(steps: &[Step], now: SystemTime, call: &Limits, boot: &Limits) {
    let mut enclosing = None;
    for (known, step) in known_steps(steps) {
        let limits = match known.parent {
            StepParent::Boot => boot,
            StepParent::Call | StepParent::EnclosingStep => call,
        };
        let Some((begin, end)) = times(step, limits.begin, now) else {
            continue;
        };
        let parent = match (known.parent, &enclosing) {
            (StepParent::EnclosingStep, Some(enclosing)) => enclosing,
            _ => &limits.parent,
        };
        let recorded = Span::record_guest(parent, known.name, begin, end);
        if matches!(known.parent, StepParent::Call) {
            enclosing = Some(recorded);
        }
    }
}

/// Returns the first step of each known kind, enclosing steps first.
fn known_steps(steps: &[Step]) -> impl Iterator<Item = (&'static KnownStep, &Step)> {
    let steps = &steps[..steps.len().min(MAX_STEPS)];
    KNOWN_STEPS.iter().filter_map(move |known| {
        let mut reported = steps.iter();
        let step = reported.find(|step| step.kind() == known.kind)?;
        Some((known, step))
    })
}

/// Returns begin and end of a step within `earliest` and `now`; None for a step that was over before `earliest`.
fn times(step: &Step, earliest: SystemTime, now: SystemTime) -> Option<(SystemTime, SystemTime)> {
    let begin = now.checked_sub(Duration::from_nanos(step.begun_ns_ago));
    let end = begin.and_then(|begin| begin.checked_add(Duration::from_nanos(step.duration_ns)));
    let end = end.unwrap_or(now).min(now);
    let begin = begin.unwrap_or(earliest).max(earliest);
    (end >= earliest).then_some((begin.min(end), end))
}

/// Parent of a step in the trace.
#[derive(Debug, Clone, Copy)]
enum StepParent {
    /// The span of the boot.
    Boot,
    /// The span of the call.
    Call,
    /// The step of the same answer that has the call as its parent.
    EnclosingStep,
}

struct KnownStep {
    kind: StepKind,
    name: &'static str,
    parent: StepParent,
}

/// The steps that are recorded, enclosing steps first.
const KNOWN_STEPS: [KnownStep; 9] = {
    const fn step(kind: StepKind, name: &'static str, parent: StepParent) -> KnownStep {
        KnownStep { kind, name, parent }
    }
    [
        step(StepKind::Kernel, "guest kernel boot", StepParent::Boot),
        step(StepKind::Agent, "guest agent start", StepParent::Boot),
        step(StepKind::Init, "guest init", StepParent::Call),
        step(StepKind::Create, "guest container create", StepParent::Call),
        step(StepKind::Start, "guest container start", StepParent::Call),
        step(
            StepKind::Network,
            "guest network",
            StepParent::EnclosingStep,
        ),
        step(
            StepKind::Storage,
            "guest storage",
            StepParent::EnclosingStep,
        ),
        step(StepKind::Rootfs, "guest rootfs", StepParent::EnclosingStep),
        step(
            StepKind::Process,
            "guest process",
            StepParent::EnclosingStep,
        ),
    ]
};

#[cfg(test)]
mod tests {
    use super::*;

    fn step(begun_ns_ago: u64, duration_ns: u64) -> Step {
        Step {
            kind: StepKind::Init.into(),
            begun_ns_ago,
            duration_ns,
        }
    }

    #[test]
    fn times_of_any_step_are_within_the_call() {
        let earliest = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let now = earliest + Duration::from_secs(10);
        let at = |seconds| earliest + Duration::from_secs(seconds);
        let second = 1_000_000_000;
        let whole = Some((earliest, now));
        for (step, expected) in [
            (step(8 * second, 3 * second), Some((at(2), at(5)))),
            // Longer than the call, in both directions.
            (step(20 * second, 100 * second), whole),
            (step(8 * second, u64::MAX), Some((at(2), now))),
            (step(u64::MAX, u64::MAX), whole),
            // 584 years ago.
            (step(u64::MAX, 0), None),
            (step(0, second), Some((now, now))),
            // Over before the call.
            (step(20 * second, second), None),
        ] {
            assert_eq!(times(&step, earliest, now), expected, "{step:?}");
        }
    }

    #[test]
    fn known_steps_has_each_kind_once_however_many_are_reported() {
        let hostile = |kinds: &[i32]| {
            let steps = kinds.iter().map(|&kind| Step { kind, ..step(1, 1) });
            let steps: Vec<Step> = steps.collect();
            known_steps(&steps).count()
        };
        let every: Vec<i32> = (0..10_000).map(|n| n % 12 - 1).collect();
        assert_eq!(hostile(&every), KNOWN_STEPS.len());
        assert_eq!(hostile(&[StepKind::Init.into(); 10_000]), 1);
        assert_eq!(hostile(&[0, -1, 10, i32::MAX]), 0);
        let late = [vec![0; MAX_STEPS], vec![StepKind::Init.into()]].concat();
        assert_eq!(hostile(&late), 0);
    }

    #[test]
    fn every_kind_is_known_once() {
        let mut kinds: Vec<i32> = KNOWN_STEPS.iter().map(|known| known.kind.into()).collect();
        kinds.sort_unstable();
        assert_eq!(kinds, (1..=9).collect::<Vec<i32>>());
        assert!(StepKind::try_from(10).is_err(), "a kind is not recorded");
        assert!(KNOWN_STEPS.len() <= MAX_STEPS);
    }
}
