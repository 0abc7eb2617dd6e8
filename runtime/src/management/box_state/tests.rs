//! Random histories of requests and events against a shadow model that knows only what callers were promised.

use super::*;
use proptest::prelude::*;

#[derive(Debug, Clone, Copy)]
enum Step {
    Ask(Request),
    Happens(Event),
}

fn step() -> impl Strategy<Value = Step> {
    use Event as E;
    prop_oneof![
        prop::sample::select(vec![Request::Start, Request::Stop, Request::Remove])
            .prop_map(Step::Ask),
        prop::sample::select(vec![
            E::Started,
            E::StartFailed,
            E::Stopped,
            E::StopFailed,
            E::RemoveDone,
            E::RemoveFailed,
            E::VmGone
        ])
        .prop_map(Step::Happens),
    ]
}

/// What outsiders rely on, kept without looking at the phase.
#[derive(Default)]
struct Shadow {
    /// A Stop or Remove was accepted, or the VM died: never again a start.
    ended: bool,
    /// A Remove was accepted.
    removal: bool,
    /// And carried out.
    gone: bool,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn promises_hold(steps in prop::collection::vec(step(), 0..60)) {
        let mut policy = BoxPolicy::at(Phase::Created);
        let mut shadow = Shadow::default();
        for step in steps {
            let before = policy.clone();
            match step {
                Step::Ask(Request::Start) => {
                    let answer = policy.request(Request::Start);
                    if shadow.gone {
                        prop_assert_eq!(answer, Err(Denied::Removed));
                    } else if shadow.ended && policy.phase() != Phase::Ready {
                        prop_assert!(answer.is_err(), "started after the end: {:?}", before);
                    }
                    if answer.is_err() {
                        prop_assert_eq!(&policy, &before);
                    }
                }
                Step::Ask(Request::Stop) => {
                    // Idempotent: never an error, and asking again is never new work.
                    prop_assert!(policy.request(Request::Stop).is_ok());
                    prop_assert_ne!(policy.clone().request(Request::Stop), Ok(Verdict::Begin));
                    prop_assert!(policy.admit_container().is_err(), "container admitted after stop");
                    shadow.ended = true;
                }
                Step::Ask(Request::Remove) => {
                    prop_assert!(policy.request(Request::Remove).is_ok());
                    prop_assert_ne!(policy.clone().request(Request::Remove), Ok(Verdict::Begin));
                    prop_assert!(policy.admit_container().is_err());
                    shadow.ended = true;
                    shadow.removal = true;
                }
                Step::Happens(event) => {
                    let changed = policy.event(event);
                    prop_assert_eq!(changed, policy != before);
                    if event == Event::VmGone && before.phase() == Phase::Ready {
                        shadow.ended = true;
                        prop_assert_eq!(policy.phase(), Phase::NotReady);
                    }
                    if event == Event::RemoveDone && shadow.removal && before.phase() == Phase::Removing {
                        shadow.gone = true;
                    }
                    // A stop that did not work leaves a VM that still runs.
                    if event == Event::StopFailed && changed {
                        shadow.ended = false;
                    }
                }
            }
            prop_assert_eq!(policy.phase() == Phase::Removed, shadow.gone);
            if shadow.ended {
                prop_assert!(!matches!(policy.phase(), Phase::Created | Phase::Starting), "{:?}", policy);
            }
        }
    }
}

#[test]
fn concurrent_first_users_join_and_a_failed_start_may_be_tried_again() {
    let mut policy = BoxPolicy::at(Phase::Created);
    assert_eq!(policy.request(Request::Start), Ok(Verdict::Begin));
    assert_eq!(policy.request(Request::Start), Ok(Verdict::Join));
    assert!(policy.event(Event::StartFailed));
    assert_eq!(policy.request(Request::Start), Ok(Verdict::Begin));
    assert!(policy.event(Event::Started));
    assert_eq!(policy.request(Request::Start), Ok(Verdict::Done));
}

#[test]
fn a_start_that_succeeds_after_stop_does_not_revive_the_box() {
    let mut policy = BoxPolicy::at(Phase::Starting);
    assert_eq!(policy.request(Request::Stop), Ok(Verdict::Begin));
    assert!(!policy.event(Event::Started));
    assert_eq!(policy.phase(), Phase::Stopping);
    assert!(policy.event(Event::Stopped));
    assert_eq!(policy.request(Request::Start), Err(Denied::Stopped));
}
