//! Failpoints: named steps at which a test injects a fault once, as an error, a delay, a panic or the death of the process.
//!
//! Programs contain none of it: without the feature `failpoints`, which only tests enable (`e2e/src/tidy/crates.rs`), a
//! failpoint compiles to nothing. Faults are armed by a call, not by the environment. The crate `fail` was not used: it
//! reads the environment, its delays block a runtime's threads, and it cannot kill the process.
//!
//! The plan is the process's, so a test that arms one runs in a process without other tests. The walks over all failpoints are
//! in cri-server's `service/tests/faults.rs` and, for images, in `images/tests/walk.rs`.

#[cfg(any(test, feature = "failpoints"))]
pub use armed::*;
#[cfg(not(any(test, feature = "failpoints")))]
pub use disarmed::*;

/// Programs: failpoints do nothing.
#[cfg(not(any(test, feature = "failpoints")))]
mod disarmed {
    /// Error of a fault, which has no value.
    #[derive(Debug)]
    pub enum Injected {}

    impl From<Injected> for std::io::Error {
        fn from(injected: Injected) -> Self {
            match injected {}
        }
    }

    impl std::fmt::Display for Injected {
        fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            match *self {}
        }
    }

    /// Marks a step of blocking code.
    ///
    /// # Errors
    /// None.
    #[inline(always)]
    pub fn hit(_: &'static str) -> Result<(), Injected> {
        Ok(())
    }

    /// Marks a step of async code.
    ///
    /// # Errors
    /// None.
    #[inline(always)]
    pub fn reach(_: &'static str) -> std::future::Ready<Result<(), Injected>> {
        std::future::ready(Ok(()))
    }
}

/// Tests: failpoints count their hits and inject the fault of the plan.
#[cfg(any(test, feature = "failpoints"))]
mod armed {
    use boxlite_sys::sync::Mutex;
    use std::collections::BTreeMap;
    use std::fmt;
    use std::time::Duration;

    /// Failpoints of pods, containers and recovery. A hit of an unlisted point panics.
    pub const POD_POINTS: [&str; 36] = [
        "network.record",
        "network.namespace",
        "network.add",
        "network.added",
        "network.del",
        "network.forget",
        "network.forgotten",
        "pod.files",
        "pod.written",
        "pod.unwrite",
        "pod.insert",
        "pod.inserted",
        "pod.image",
        "pod.bundle",
        "pod.spawn",
        "pod.spawned",
        "pod.create",
        "pod.boot",
        "pod.booted",
        "pod.stop",
        "pod.shutdown",
        "pod.clean",
        "pod.unbundle",
        "container.hold",
        "container.bundle",
        "container.create",
        "container.created",
        "container.start",
        "container.started",
        "container.delete",
        "container.deleted",
        "container.unbundle",
        "database.write",
        "database.copy",
        "database.delete",
        "database.deleted",
    ];

    /// Failpoints of a recovery that finds a running pod and an orphaned bundle.
    pub const RECOVERY_POINTS: [&str; 4] = [
        "recovery.load",
        "recovery.orphan",
        "recovery.adopt",
        "recovery.container",
    ];

    /// Failpoints of pulls and removals of images.
    pub const IMAGE_POINTS: [&str; 9] = [
        "image.download",
        "image.downloaded",
        "image.convert",
        "image.converted",
        "image.adopted",
        "image.commit",
        "image.record",
        "image.recorded",
        "image.remove",
    ];

    /// Fault to inject.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Action {
        Error,
        Delay(Duration),
        Panic,
        /// Kills the process by SIGKILL.
        Kill,
    }

    /// A fault at the `nth` hit of a point, counted from 1.
    #[derive(Debug, Clone, Copy)]
    pub struct Plan {
        pub point: &'static str,
        pub nth: u32,
        pub action: Action,
    }

    /// Error of an injected fault.
    #[derive(Debug)]
    pub struct Injected(&'static str);

    impl fmt::Display for Injected {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "fault injected at {}", self.0)
        }
    }

    impl From<Injected> for std::io::Error {
        fn from(injected: Injected) -> Self {
            Self::other(injected.to_string())
        }
    }

    #[derive(Default)]
    struct State {
        hits: BTreeMap<&'static str, u32>,
        plan: Option<Plan>,
    }

    static STATE: Mutex<State> = Mutex::new(State {
        hits: BTreeMap::new(),
        plan: None,
    });

    /// Resets the hits and sets the plan. Returns the hits so far by point.
    pub fn arm(plan: Option<Plan>) -> BTreeMap<&'static str, u32> {
        let mut state = STATE.lock();
        state.plan = plan;
        std::mem::take(&mut state.hits)
    }

    /// Returns true if the fault of the plan was injected, or there was no plan.
    pub fn fired() -> bool {
        STATE.lock().plan.is_none()
    }

    /// Returns the listed point of this name.
    pub fn named(name: &str) -> Option<&'static str> {
        let pods = POD_POINTS.iter().chain(&RECOVERY_POINTS);
        let mut all = pods.chain(&IMAGE_POINTS);
        all.find(|point| **point == name).copied()
    }

    /// Counts a hit; returns the fault to inject.
    fn next(point: &'static str) -> Option<Action> {
        assert!(named(point).is_some(), "failpoint {point} is not listed");
        let mut state = STATE.lock();
        let hits = state.hits.entry(point).or_default();
        *hits += 1;
        let hits = *hits;
        let plan = state
            .plan
            .take_if(|plan| plan.point == point && plan.nth == hits)?;
        Some(plan.action)
    }

    fn inject(point: &'static str, action: Action) -> Result<(), Injected> {
        match action {
            Action::Error => Err(Injected(point)),
            Action::Delay(_) => Ok(()),
            Action::Panic => panic!("fault injected at {point}"),
            Action::Kill => {
                let _ = nix::sys::signal::kill(
                    nix::unistd::getpid(),
                    nix::sys::signal::Signal::SIGKILL,
                );
                // The signal is delivered before the call returns to any thread's user code; not reached.
                std::process::abort()
            }
        }
    }

    /// Marks a step of blocking code.
    ///
    /// # Errors
    /// The injected fault.
    pub fn hit(point: &'static str) -> Result<(), Injected> {
        let Some(action) = next(point) else {
            return Ok(());
        };
        if let Action::Delay(delay) = action {
            std::thread::sleep(delay);
        }
        inject(point, action)
    }

    /// Marks a step of async code.
    ///
    /// # Errors
    /// The injected fault.
    pub async fn reach(point: &'static str) -> Result<(), Injected> {
        let Some(action) = next(point) else {
            return Ok(());
        };
        if let Action::Delay(delay) = action {
            tokio::time::sleep(delay).await;
        }
        inject(point, action)
    }
}
