//! Tests of VM sizes and of updates to running pods.

use super::*;
use proptest::prelude::*;

fn limits(memory_bytes: i64, cpu_quota_us: i64, cpu_period_us: i64) -> Limits {
    Limits {
        memory_bytes,
        cpu_quota_us,
        cpu_period_us,
    }
}

fn request(memory: i64, quota: i64, period: i64) -> SizeRequest {
    SizeRequest {
        limits: limits(memory, quota, period),
        ..SizeRequest::default()
    }
}

fn size(request: &SizeRequest) -> Result<(u8, u32), SizeError> {
    vm_size(request, &PodDefaults::default()).map(|size| (size.vcpus, size.memory_mib))
}

#[test]
fn vm_size_follows_limits_and_defaults() {
    let mib = MIB as i64;
    let of = |memory, quota, period| size(&request(memory, quota, period));
    assert_eq!(of(0, 0, 0), Ok((1, 2048 + 160)));
    assert_eq!(of(256 * mib, 0, 0), Ok((1, 360)));
    assert_eq!(of(32 * mib, 0, 0), Ok((1, 129)));
    assert_eq!(of(512 * mib, 250_000, 100_000), Ok((3, 624)));
    assert_eq!(of(512 * mib + 1, 50_000, 100_000), Ok((1, 625)));
    assert_eq!(of(0, 200_000, 0), Ok((2, 2208)));
    assert_eq!(of(-5, -1, 0), Ok((1, 2208)));
    assert_eq!(size(&SizeRequest::default()), Ok((1, 2208)));
}

#[test]
fn containers_limit_is_the_pods_to_the_byte() {
    let defaults = PodDefaults::default();
    let bytes = |request: &SizeRequest| vm_size(request, &defaults).unwrap().containers_bytes;
    assert_eq!(bytes(&request((64 << 20) + 1, 0, 0)), (64 << 20) + 1);
    assert_eq!(bytes(&SizeRequest::default()), 2 << 30);
    let annotated = SizeRequest {
        memory_mib: Some(100),
        ..request(64 << 20, 0, 0)
    };
    assert_eq!(bytes(&annotated), 100 << 20);
}

#[test]
fn limit_above_the_node_is_the_nodes_memory() {
    let on_node = |memory| SizeRequest {
        node_mib: Some(1000),
        ..request(memory, 0, 0)
    };
    assert_eq!(size(&on_node(64 << 30)), Ok((1, 1127)));
    assert_eq!(size(&on_node(0)), Ok((1, 1127)));
    assert_eq!(size(&on_node(512 << 20)), Ok((1, 624)));
    let size = vm_size(&on_node(64 << 30), &PodDefaults::default()).unwrap();
    assert_eq!(size.containers_bytes, 1000 << 20);
}

#[test]
fn limit_of_an_exbibyte_is_no_limit() {
    assert_eq!(limits(1 << 60, 0, 0).memory_mib(), None);
    assert_eq!(limits(i64::MAX, 0, 0).memory_mib(), None);
    assert_eq!(limits((1 << 60) - 1, 0, 0).memory_mib(), Some(1 << 40));
    assert_eq!(size(&request(1 << 60, 0, 0)), Ok((1, 2208)));
    let error = size(&request((1 << 60) - 1, 0, 0));
    assert!(matches!(error, Err(SizeError::TooLarge(_))), "{error:?}");
}

#[test]
fn annotation_takes_precedence_over_limits() {
    let request = SizeRequest {
        vcpus: Some(3),
        memory_mib: Some(100),
        ..request(512 << 20, 200_000, 100_000)
    };
    assert_eq!(size(&request), Ok((3, 199)));
}

fn admit(memory_mib: i64, quota: i64, current_mib: i64) -> Result<(), String> {
    VmCapacity::new(360, 2, &PodDefaults::default())
        .admit(
            &limits(memory_mib << 20, quota, 0),
            Some(&limits(current_mib << 20, 0, 0)),
        )
        .map_err(|error| error.to_string())
}

#[test]
fn update_beyond_the_vm_is_refused() {
    assert_eq!(admit(256, 200_000, 0), Ok(()));
    assert_eq!(admit(-1, -1, 0), Ok(()));
    let refused = admit(257, 0, 0).unwrap_err();
    assert!(refused.contains("257 MiB"), "{refused}");
    assert!(
        refused.contains("256 MiB for containers (360 MiB - 104 MiB overhead)"),
        "{refused}"
    );
    assert_eq!(
        admit(512, 0, 512),
        Ok(()),
        "no higher than the current limit"
    );
    let refused = admit(0, 250_000, 0).unwrap_err();
    assert!(
        refused.contains("2.500 CPUs, and the pod's VM has 2"),
        "{refused}"
    );
}

#[test]
fn cap_lowers_limits_that_admit_rejects() {
    let vm = VmCapacity::new(360, 2, &PodDefaults::default());
    let within = limits(256 << 20, 200_000, 0);
    assert_eq!(vm.cap(&within, None), (within, vec![]));
    let (capped, reasons) = vm.cap(&limits(257 << 20, 125_000, 50_000), None);
    assert_eq!(capped, limits(256 << 20, 100_000, 50_000));
    assert!(reasons[0].contains("257 MiB") && reasons[1].contains("2.500 CPUs"));
    let current = limits(512 << 20, 0, 0);
    assert_eq!(vm.cap(&current, Some(&current)), (current, vec![]));
}

proptest! {
    #[test]
    fn capped_limits_are_admitted(memory: i64, quota: i64, period: i64, vm: u32, vcpus in 1u8..=64) {
        let update = limits(memory, quota, period);
        let vm = VmCapacity::new(vm, vcpus, &PodDefaults::default());
        let (capped, reasons) = vm.cap(&update, None);
        prop_assert_eq!(vm.admit(&capped, None), Ok(()));
        prop_assert_eq!(reasons.is_empty(), vm.admit(&update, None).is_ok());
    }

    #[test]
    fn no_update_panics(memory: i64, quota: i64, period: i64, vm: u32) {
        let update = limits(memory, quota, period);
        let _ = VmCapacity::new(vm, 1, &PodDefaults::default()).admit(&update, None);
    }

    #[test]
    fn no_numbers_panic(memory: i64, quota: i64, period: i64, node_mib: Option<u64>) {
        let request = SizeRequest { node_mib, ..request(memory, quota, period) };
        if let Ok((vcpus, _)) = size(&request) {
            prop_assert!((1..=64).contains(&vcpus));
        }
    }
}
