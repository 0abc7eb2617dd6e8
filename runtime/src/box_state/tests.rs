//! Random histories of requests and events, checked against a model of the guarantees given to callers.

use super::*;
use proptest::prelude::*;

#[derive(Debug, Clone, Copy)]
enum Step {
    Request(Request),
    Event(Event),
}

fn step() -> impl Strategy<Value = Step> {
    use Event as E;
    prop_oneof![
        prop::sample::select(vec![Request::Start, Request::Stop, Request::Remove])
            .prop_map(Step::Request),
        prop::sample::select(vec![
            E::Started,
            E::StartFailed,
            E::Stopped,
            E::StopFailed,
            E::RemoveDone,
            E::RemoveFailed,
            E::VmGone
        ])
        .prop_map(Step::Event),
    ]
}

/// Guarantees to callers, tracked without looking at the phase.
#[derive(Default)]
struct Model {
    /// A Stop or Remove was accepted, or the VM died: the box must not start again.
    ended: bool,
    /// A Remove was accepted.
    removal: bool,
    /// The removal has completed.
    gone: bool,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn policy_keeps_guarantees_for_any_history(steps in prop::collection::vec(step(), 0..60)) {
        let mut policy = BoxPolicy::at(Phase::Created);
        let mut model = Model::default();
        for step in steps {
            let before = policy.clone();
            match step {
                Step::Request(Request::Start) => {
                    let answer = policy.request(Request::Start);
                    if model.gone {
                        prop_assert_eq!(answer, Err(Denied::Removed));
                    } else if model.ended && policy.phase() != Phase::Ready {
                        prop_assert!(answer.is_err(), "started after the end: {:?}", before);
                    }
                    if answer.is_err() {
                        prop_assert_eq!(&policy, &before);
                    }
                }
                Step::Request(Request::Stop) => {
                    // Idempotent: a repeated Stop succeeds and starts no job.
                    prop_assert!(policy.request(Request::Stop).is_ok());
                    prop_assert_ne!(policy.clone().request(Request::Stop), Ok(Verdict::Begin));
                    prop_assert!(policy.admit_container().is_err(), "container admitted after stop");
                    model.ended = true;
                }
                Step::Request(Request::Remove) => {
                    prop_assert!(policy.request(Request::Remove).is_ok());
                    prop_assert_ne!(policy.clone().request(Request::Remove), Ok(Verdict::Begin));
                    prop_assert!(policy.admit_container().is_err());
                    model.ended = true;
                    model.removal = true;
                }
                Step::Event(event) => {
                    let changed = policy.event(event);
                    prop_assert_eq!(changed, policy != before);
                    if event == Event::VmGone && before.phase() == Phase::Ready {
                        model.ended = true;
                        prop_assert_eq!(policy.phase(), Phase::NotReady);
                    }
                    if event == Event::RemoveDone && model.removal && before.phase() == Phase::Removing {
                        model.gone = true;
                    }
                    // After a failed stop the VM is still running.
                    if event == Event::StopFailed && changed {
                        model.ended = false;
                    }
                }
            }
            prop_assert_eq!(policy.phase() == Phase::Removed, model.gone);
            if model.ended {
                prop_assert!(!matches!(policy.phase(), Phase::Created | Phase::Starting), "{:?}", policy);
            }
        }
    }
}

#[test]
fn start_joins_concurrent_callers_and_allows_retry() {
    let mut policy = BoxPolicy::at(Phase::Created);
    assert_eq!(policy.request(Request::Start), Ok(Verdict::Begin));
    assert_eq!(policy.request(Request::Start), Ok(Verdict::Join));
    assert!(policy.event(Event::StartFailed));
    assert_eq!(policy.request(Request::Start), Ok(Verdict::Begin));
    assert!(policy.event(Event::Started));
    assert_eq!(policy.request(Request::Start), Ok(Verdict::Done));
}

#[test]
fn started_event_after_stop_keeps_stopping() {
    let mut policy = BoxPolicy::at(Phase::Starting);
    assert_eq!(policy.request(Request::Stop), Ok(Verdict::Begin));
    assert!(!policy.event(Event::Started));
    assert_eq!(policy.phase(), Phase::Stopping);
    assert!(policy.event(Event::Stopped));
    assert_eq!(policy.request(Request::Start), Err(Denied::Stopped));
}
