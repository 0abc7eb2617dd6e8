//! Tests of the metrics page.

use super::*;
use boxlite_proto::cri::v1::{PodSandboxConfig, PodSandboxMetadata};
use boxlite_runtime::{
    BoxMetricsSnapshot, BoxOptions, BoxState, RuntimeMetricsSnapshot, StageTimers,
};

fn pod() -> BoxSnapshot {
    let config = PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: "we\"b".into(),
            namespace: "ns".into(),
            uid: "u".into(),
            attempt: 0,
        }),
        ..Default::default()
    };
    let mut record = PodMetadata::new(config, String::new()).unwrap();
    record.network_ms = 20;
    let options: BoxOptions = record
        .box_options("ab", None, &crate::config::Config::default().pod)
        .unwrap();
    BoxSnapshot {
        id: "ab".into(),
        name: options.name.clone(),
        state: BoxState::Ready,
        reason: String::new(),
        created_at_ns: 1,
        metadata: record.encoded(),
        timers: StageTimers {
            stages: vec![("spawn".into(), 500)],
        },
        options,
        vmm: boxlite_proto::vmm::VmmKind::Qemu,
        shim_pid: None,
        metrics: BoxMetricsSnapshot {
            cpu_time_ms: 1500,
            stale: true,
            ..Default::default()
        },
    }
}

#[test]
fn the_page_has_labels_totals_and_stages() {
    let metrics = Metrics::new().unwrap();
    metrics.started(&pod());
    metrics
        .rpc()
        .observe("Version", Code::Ok, Duration::from_millis(2));
    let totals = RuntimeMetricsSnapshot {
        boxes_created: 3,
        ..Default::default()
    };
    let page = page::render(&metrics.registry, &totals, &[pod()], &[], 2, None).unwrap();
    for line in [
        "boxlite_boxes_created_total 3",
        "boxlite_shared_volume_writers 2",
        r#"boxlite_box_cpu_seconds_total{id="ab",namespace="ns",pod="we\"b",uid="u"} 1.5"#,
        r#"boxlite_box_stale{id="ab",namespace="ns",pod="we\"b",uid="u"} 1"#,
        r#"boxlite_start_stage_duration_seconds_sum{stage="cni"} 0.02"#,
        r#"boxlite_start_stage_duration_seconds_sum{stage="spawn"} 0.5"#,
        r#"boxlite_cri_request_duration_seconds_count{code="Ok",method="Version"} 1"#,
    ] {
        assert!(
            page.lines().any(|have| have == line),
            "{line} is not in\n{page}"
        );
    }
}

#[test]
fn the_page_has_the_pool_only_if_it_is_on() {
    use boxlite_runtime::pool::{PoolCounters, PoolStatus, Removal, Shape};
    let metrics = Metrics::new().unwrap();
    let totals = RuntimeMetricsSnapshot::default();
    let page = |pool| page::render(&metrics.registry, &totals, &[], &[], 0, pool).unwrap();
    assert!(!page(None).contains("boxlite_pool"));
    let shape = Shape {
        vcpus: 1,
        memory_mib: 256,
    };
    let status = PoolStatus {
        size: 3,
        warm: vec![(shape, Duration::from_secs(9)), (shape, Duration::ZERO)],
        filling: true,
        bytes: 400,
        held: Some("memory pressure"),
        counters: PoolCounters {
            hits: 5,
            misses: 2,
            failed_claims: 1,
            fills: 7,
            fill_time: Duration::from_secs(14),
            failed_fills: 4,
            removals: [(Removal::Pressure, 6)].into(),
        },
    };
    let page = page(Some(&status));
    for line in [
        "boxlite_pool_size 3",
        "boxlite_pool_warm_vms 2",
        "boxlite_pool_memory_bytes 400",
        "boxlite_pool_oldest_age_seconds 9",
        "boxlite_pool_held 1",
        r#"boxlite_pool_claims_total{result="hit"} 5"#,
        r#"boxlite_pool_claims_total{result="miss"} 2"#,
        r#"boxlite_pool_claims_total{result="failed"} 1"#,
        r#"boxlite_pool_fills_total{result="ok"} 7"#,
        r#"boxlite_pool_fills_total{result="failed"} 4"#,
        r#"boxlite_pool_removals_total{reason="pressure"} 6"#,
        "boxlite_pool_fill_seconds_total 14",
    ] {
        assert!(
            page.lines().any(|have| have == line),
            "{line} is not in\n{page}"
        );
    }
}
