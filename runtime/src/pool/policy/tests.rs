//! Tests of the policy: every transition, and under random events that no VM is given out twice.

use super::*;
use proptest::prelude::*;
use std::collections::HashSet;

const GIB: u64 = 1 << 30;
const SMALL: Shape = Shape {
    vcpus: 1,
    memory_mib: 256,
};
const LARGE: Shape = Shape {
    vcpus: 2,
    memory_mib: 2048,
};

fn settings() -> PoolSettings {
    PoolSettings {
        size: 2,
        max_bytes: 4 * GIB,
        min_available_bytes: GIB,
        idle: Duration::from_secs(2),
        shapes: Vec::new(),
        default_shape: SMALL,
        scratch_bytes: GIB,
        debug_console: false,
        vmm_ids: None,
    }
}

/// A policy with a clock and a node's memory.
struct Node {
    policy: Policy,
    now: Instant,
    available: u64,
    serial: u32,
}

impl Node {
    fn new(settings: PoolSettings) -> Self {
        Self {
            policy: Policy::new(settings),
            now: Instant::now(),
            available: 64 * GIB,
            serial: 0,
        }
    }

    fn pass(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }

    fn step(&mut self) -> Step {
        self.policy.step(self.now, self.available)
    }

    fn claim(&mut self, shape: Shape) -> Option<String> {
        self.policy.claim(Some(shape), self.now)
    }

    /// Performs fills until another step is due, and returns that step.
    fn settle(&mut self) -> Step {
        loop {
            let step = self.step();
            let Step::Fill(shape) = step else {
                return step;
            };
            self.fill(shape, GIB / 4);
        }
    }

    fn fill(&mut self, shape: Shape, bytes: u64) -> String {
        self.serial += 1;
        let id = format!("vm{:04}", self.serial);
        self.policy.begin(id.clone(), shape);
        self.policy
            .filled(&id, bytes, Duration::from_secs(1), self.now);
        id
    }

    fn shapes(&self) -> Vec<Shape> {
        let mut shapes: Vec<Shape> = self.policy.members.values().map(|m| m.shape).collect();
        shapes.sort();
        shapes
    }
}

#[test]
fn step_fills_to_size_with_the_default_shape() {
    let mut node = Node::new(settings());
    assert!(matches!(node.settle(), Step::Wait(_)));
    assert_eq!(node.shapes(), [SMALL, SMALL]);
    let counters = node.policy.status(node.now).counters;
    assert_eq!(
        (counters.fills, counters.fill_time),
        (2, Duration::from_secs(2))
    );
}

#[test]
fn step_while_a_fill_runs_starts_no_more_than_size() {
    let mut node = Node::new(settings());
    for id in ["a", "b"] {
        assert_eq!(node.step(), Step::Fill(SMALL));
        node.policy.begin(id.into(), SMALL);
    }
    assert!(matches!(node.step(), Step::Wait(_)));
    assert_eq!(node.claim(SMALL), None, "neither has booted");
}

#[test]
fn step_after_a_start_waits_until_idle() {
    let mut node = Node::new(settings());
    node.claim(SMALL);
    assert_eq!(node.step(), Step::Wait(Duration::from_secs(2)));
    node.pass(1);
    // A pod that the pool cannot serve loads the node, too.
    node.policy.claim(None, node.now);
    node.pass(1);
    assert_eq!(node.step(), Step::Wait(Duration::from_secs(1)));
    node.pass(1);
    assert_eq!(node.step(), Step::Fill(SMALL));
}

#[test]
fn claim_takes_the_oldest_of_its_shape_once() {
    let mut node = Node::new(settings());
    let first = node.fill(SMALL, 0);
    node.pass(1);
    let second = node.fill(SMALL, 0);
    assert_eq!(node.claim(LARGE), None);
    assert_eq!(node.claim(SMALL), Some(first.clone()));
    assert_eq!(node.claim(SMALL), Some(second));
    assert_eq!(node.claim(SMALL), None);
    assert!(!node.policy.died(&first), "no member any more");
    node.policy.claimed(true, node.now);
    let counters = node.policy.status(node.now).counters;
    assert_eq!((counters.hits, counters.misses), (1, 2));
}

#[test]
fn step_learns_shapes_in_proportion() {
    let mut node = Node::new(PoolSettings {
        size: 4,
        ..settings()
    });
    for shape in [LARGE, SMALL, LARGE, LARGE] {
        node.claim(shape);
    }
    node.pass(3);
    node.settle();
    assert_eq!(node.shapes(), [SMALL, LARGE, LARGE, LARGE]);
    // The window forgets: only the last starts count.
    for _ in 0..LEARNING_WINDOW {
        node.claim(SMALL);
    }
    node.pass(3);
    while !matches!(node.settle(), Step::Wait(_)) {}
    assert_eq!(node.shapes(), [SMALL; 4]);
    let removals = node.policy.status(node.now).counters.removals;
    assert_eq!(removals.get(&Removal::Obsolete), Some(&3));
}

#[test]
fn step_with_configured_shapes_ignores_pods() {
    let mut node = Node::new(PoolSettings {
        size: 3,
        shapes: vec![LARGE, SMALL],
        ..settings()
    });
    for _ in 0..5 {
        node.claim(SMALL);
    }
    node.pass(3);
    node.settle();
    assert_eq!(node.shapes(), [SMALL, LARGE, LARGE]);
}

#[test]
fn step_under_memory_pressure_removes_all_and_waits() {
    let mut node = Node::new(settings());
    node.settle();
    node.available = GIB - 1;
    for _ in 0..2 {
        assert!(matches!(node.step(), Step::Remove(_, Removal::Pressure)));
    }
    assert!(matches!(node.step(), Step::Wait(_)));
    assert_eq!(node.policy.status(node.now).held, Some("memory pressure"));
    // Just above the minimum the next VM would be removed again.
    node.available = GIB + GIB / 4;
    assert!(matches!(node.step(), Step::Wait(_)));
    node.available = 2 * GIB;
    assert_eq!(node.step(), Step::Fill(SMALL));
    assert_eq!(node.policy.status(node.now).held, None);
}

#[test]
fn step_stays_below_the_ceiling_as_measured() {
    let mut node = Node::new(PoolSettings {
        size: 8,
        max_bytes: GIB,
        ..settings()
    });
    node.settle();
    assert_eq!(node.shapes().len(), 4, "of 256 MiB each");
    // A VM that turned out larger than estimated.
    node.fill(SMALL, GIB / 2);
    assert!(matches!(node.step(), Step::Remove(_, Removal::Ceiling)));
}

#[test]
fn failed_fills_are_retried_with_growing_delays() {
    let mut node = Node::new(settings());
    let mut delays = Vec::new();
    for round in 0..8 {
        while !matches!(node.step(), Step::Fill(_)) {
            node.pass(1);
            delays[round - 1] += 1;
        }
        node.policy.begin("x".into(), SMALL);
        node.policy.fill_failed("x", node.now);
        delays.push(0);
    }
    assert_eq!(delays[..7], [1, 2, 4, 8, 16, 32, 60]);
    assert_eq!(node.policy.status(node.now).counters.failed_fills, 8);
}

#[test]
fn failed_claims_in_a_row_pause_the_pool() {
    let mut node = Node::new(settings());
    for turn in 0..MAX_FAILED_CLAIMS {
        node.fill(SMALL, 0);
        assert!(node.claim(SMALL).is_some(), "turn {turn}");
        node.policy.claimed(false, node.now);
    }
    node.fill(SMALL, 0);
    assert_eq!(node.claim(SMALL), None, "paused");
    assert_eq!(node.policy.status(node.now).held, Some("claims failed"));
    node.pass(PAUSE_TIME.as_secs());
    assert!(node.claim(SMALL).is_some());
    node.policy.claimed(true, node.now);
    assert_eq!(node.policy.failed_claims, 0);
}

#[test]
fn died_vm_is_replaced() {
    let mut node = Node::new(settings());
    let id = node.fill(SMALL, 0);
    assert!(node.policy.died(&id));
    assert!(!node.policy.died(&id), "reported once");
    node.settle();
    assert_eq!(node.shapes().len(), 2);
}

/// An event of the model.
#[derive(Debug, Clone)]
enum Event {
    Claim(Shape, bool),
    Step,
    Pass(u64),
    Available(u64),
    Die(usize),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let shape = prop_oneof![Just(SMALL), Just(LARGE)];
    let event = prop_oneof![
        (shape, any::<bool>()).prop_map(|(shape, succeeded)| Event::Claim(shape, succeeded)),
        Just(Event::Step),
        (0u64..700).prop_map(Event::Pass),
        (0u64..8).prop_map(|gib| Event::Available(gib * GIB)),
        (0usize..8).prop_map(Event::Die),
    ];
    prop::collection::vec(event, 0..200)
}

proptest! {
    #[test]
    fn no_vm_is_given_out_twice(events in events()) {
        let mut node = Node::new(settings());
        let mut gone = HashSet::new();
        for event in events {
            match event {
                Event::Claim(shape, succeeded) => {
                    if let Some(id) = node.claim(shape) {
                        prop_assert!(gone.insert(id), "given out before");
                        node.policy.claimed(succeeded, node.now);
                    }
                }
                Event::Step => match node.step() {
                    Step::Fill(shape) => drop(node.fill(shape, GIB / 4)),
                    Step::Remove(id, _) => prop_assert!(gone.insert(id), "given out before"),
                    Step::Wait(limit) => prop_assert!(limit > Duration::ZERO, "busy loop"),
                },
                Event::Pass(seconds) => node.pass(seconds),
                Event::Available(bytes) => node.available = bytes,
                Event::Die(index) => {
                    let id = node.policy.members.keys().nth(index).cloned();
                    if let Some(id) = id {
                        node.policy.died(&id);
                        prop_assert!(gone.insert(id), "given out before");
                    }
                }
            }
            prop_assert!(node.policy.members.len() <= 2);
            prop_assert!(node.policy.members.keys().all(|id| !gone.contains(id)));
        }
    }
}
