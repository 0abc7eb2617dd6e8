//! [`Steps`]: times of the agent's steps for the host's traces.
//!
//! The agent exports nothing itself: the VM has no network of its own, and the host does not trust what it says. It reports
//! kinds and durations in the answers of Init and Start, if the request asks for them.

use crate::system;
use boxlite_proto::boxlite::v1::{Step, StepKind};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

static BOOT: OnceLock<Boot> = OnceLock::new();
static READY: OnceLock<Instant> = OnceLock::new();

/// Start of the agent.
#[derive(Debug)]
struct Boot {
    at: Instant,
    /// Time since the start of the kernel.
    uptime: Duration,
}

/// Records the start of the agent.
pub(crate) fn agent_started() {
    BOOT.get_or_init(|| Boot {
        at: Instant::now(),
        uptime: Duration::from_millis(system::uptime_ms()),
    });
}

/// Records the readiness report.
pub(crate) fn agent_ready() {
    READY.get_or_init(Instant::now);
}

/// Steps of one request.
#[derive(Debug, Default)]
pub(crate) struct Steps(Vec<(StepKind, Instant, Instant)>);

impl Steps {
    /// Adds a step.
    pub(crate) fn add(&mut self, kind: StepKind, begin: Instant, end: Instant) {
        self.0.push((kind, begin, end));
    }

    /// Returns the message of the steps.
    pub(crate) fn report(&self) -> Vec<Step> {
        let now = Instant::now();
        let step = |&(kind, begin, end): &(StepKind, Instant, Instant)| Step {
            kind: kind.into(),
            begun_ns_ago: nanoseconds(now.saturating_duration_since(begin)),
            duration_ns: nanoseconds(end.saturating_duration_since(begin)),
        };
        self.0.iter().map(step).collect()
    }

    /// Returns the message of the boot and of the steps.
    pub(crate) fn report_with_boot(&self) -> Vec<Step> {
        let mut steps = self.report();
        if let Some(boot) = BOOT.get() {
            steps.push(Step {
                kind: StepKind::Kernel.into(),
                begun_ns_ago: nanoseconds(boot.at.elapsed() + boot.uptime),
                duration_ns: nanoseconds(boot.uptime),
            });
            let ready = READY.get().copied().unwrap_or_else(Instant::now);
            steps.push(Step {
                kind: StepKind::Agent.into(),
                begun_ns_ago: nanoseconds(boot.at.elapsed()),
                duration_ns: nanoseconds(ready.saturating_duration_since(boot.at)),
            });
        }
        steps
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_has_times_relative_to_the_answer() {
        let now = Instant::now();
        let (begin, end) = (
            now - Duration::from_millis(50),
            now - Duration::from_millis(20),
        );
        let mut steps = Steps::default();
        steps.add(StepKind::Init, begin, end);
        let step = steps.report()[0];
        assert_eq!(step.kind(), StepKind::Init);
        assert_eq!(step.duration_ns, 30_000_000);
        assert!(step.begun_ns_ago >= 50_000_000, "{step:?}");
        agent_started();
        let kinds: Vec<_> = steps.report_with_boot().iter().map(Step::kind).collect();
        assert_eq!(kinds, [StepKind::Init, StepKind::Kernel, StepKind::Agent]);
    }
}
