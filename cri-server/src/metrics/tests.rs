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
    let page = page::render(&metrics.registry, &totals, &[pod()], &[], 2).unwrap();
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
