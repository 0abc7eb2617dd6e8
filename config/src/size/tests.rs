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

fn request(memory: i64, quota: i64, period: i64, overhead: i64) -> SizeRequest<'static> {
    SizeRequest {
        limits: limits(memory, quota, period),
        overhead: limits(overhead, 0, 0),
        cgroup: "/kubepods/podx",
        ..SizeRequest::default()
    }
}

fn size(request: &SizeRequest<'_>, limit: Option<u64>) -> Result<(u8, u32), SizeError> {
    let request = SizeRequest {
        cgroup_limit: limit,
        ..request.clone()
    };
    vm_size(&request, &PodDefaults::default()).map(|size| (size.vcpus, size.memory_mib))
}

#[test]
fn vm_size_follows_limits_overhead_and_defaults() {
    let mib = MIB as i64;
    let of =
        |memory, quota, period, overhead| size(&request(memory, quota, period, overhead), None);
    assert_eq!(of(0, 0, 0, 0), Ok((1, 320)));
    assert_eq!(of(512 * mib, 250_000, 100_000, 0), Ok((3, 576)));
    assert_eq!(of(512 * mib + 1, 50_000, 100_000, 128 * mib), Ok((1, 641)));
    assert_eq!(of(0, 200_000, 0, 0), Ok((2, 320)));
    assert_eq!(of(-5, -1, 0, -9), Ok((1, 320)));
    assert_eq!(size(&SizeRequest::default(), None), Ok((1, 320)));
}

#[test]
fn limit_of_an_exbibyte_is_no_limit() {
    assert_eq!(limits(1 << 60, 0, 0).memory_mib(), None);
    assert_eq!(limits(i64::MAX, 0, 0).memory_mib(), None);
    assert_eq!(limits((1 << 60) - 1, 0, 0).memory_mib(), Some(1 << 40));
    assert_eq!(size(&request(1 << 60, 0, 0, 1 << 60), None), Ok((1, 320)));
    assert_eq!(
        size(&request((1 << 60) - 1, 0, 0, 0), None),
        Err(SizeError::TooLarge((1 << 40) + 64))
    );
}

#[test]
fn annotation_takes_precedence_over_limits() {
    let request = SizeRequest {
        vcpus: Some(3),
        memory_mib: Some(100),
        ..request(512 << 20, 200_000, 100_000, 0)
    };
    assert_eq!(size(&request, None), Ok((3, 164)));
}

#[test]
fn vm_above_cgroup_limit_is_refused_with_arithmetic() {
    let request = request(256 << 20, 0, 0, 0);
    let text = size(&request, Some(300 << 20)).unwrap_err().to_string();
    assert!(
        text.contains("320 MiB (256 MiB for containers + 64 MiB overhead)"),
        "{text}"
    );
    assert!(text.contains("/kubepods/podx allows 300 MiB"), "{text}");
    assert!(size(&request, Some(320 << 20)).is_ok());
}

fn admit(memory_mib: i64, quota: i64, current_mib: i64) -> Result<(), String> {
    let size = VmSize {
        vcpus: 2,
        memory_mib: 320,
    };
    VmCapacity::new(size, &Limits::default(), &PodDefaults::default())
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
        refused.contains("256 MiB for containers (320 MiB - 64 MiB overhead)"),
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

proptest! {
    #[test]
    fn no_update_panics(memory: i64, quota: i64, period: i64) {
        let update = limits(memory, quota, period);
        let size = VmSize { vcpus: 1, memory_mib: 1 };
        let capacity = VmCapacity::new(size, &update, &PodDefaults::default());
        let _ = capacity.admit(&update, None);
    }

    #[test]
    fn no_numbers_panic(memory: i64, quota: i64, period: i64, overhead: i64, limit: Option<u64>) {
        if let Ok((vcpus, _)) = size(&request(memory, quota, period, overhead), limit) {
            prop_assert!((1..=64).contains(&vcpus));
        }
    }
}
