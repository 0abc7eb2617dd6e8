//! Tests of the metrics page.

use super::*;
use boxlite_proto::cri::v1::{PodSandboxConfig, PodSandboxMetadata};
use boxlite_runtime::pool::{PoolCounters, PoolStatus, Removal, Shape};
use boxlite_runtime::{
    BoxMetricsSnapshot, BoxOptions, BoxState, ContainerSnapshot, ContainerState,
    RuntimeMetricsSnapshot, StageTimers,
};
use std::collections::{BTreeMap, BTreeSet};

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

fn pool() -> PoolStatus {
    let shape = Shape {
        vcpus: 1,
        memory_mib: 256,
    };
    PoolStatus {
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
    }
}

#[test]
fn the_page_has_the_pool_only_if_it_is_on() {
    let metrics = Metrics::new().unwrap();
    let totals = RuntimeMetricsSnapshot::default();
    let page = |pool| page::render(&metrics.registry, &totals, &[], &[], 0, pool).unwrap();
    assert!(!page(None).contains("boxlite_pool"));
    let page = page(Some(&pool()));
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

/// Returns a page with every metric.
fn whole_page() -> String {
    let metrics = Metrics::new().unwrap();
    metrics.started(&pod());
    metrics.rpc().observe("Version", Code::Ok, Duration::ZERO);
    let container = ContainerSnapshot {
        id: "c".into(),
        box_id: "ab".into(),
        name: "c".into(),
        image_id: "i".into(),
        image_volumes: Vec::new(),
        state: ContainerState::Running,
        created_at_ns: 1,
        started_at_ns: 2,
        finished_at_ns: 0,
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
        metadata: Vec::new(),
        log_path: None,
        tty: false,
        stdin: false,
        stdin_once: false,
        user: None,
    };
    page::render(
        &metrics.registry,
        &RuntimeMetricsSnapshot::default(),
        &[pod()],
        &[container],
        0,
        Some(&pool()),
    )
    .unwrap()
}

/// Returns the names of labels of a selector or sample.
fn label_names(labels: &str) -> BTreeSet<String> {
    let names = labels.split(',').filter_map(|label| {
        let (name, _) = label.split_once('=')?;
        Some(name.trim_end_matches('!').trim().to_owned())
    });
    names.collect()
}

#[test]
fn dashboard_and_rules_name_exported_metrics() {
    let page = whole_page();
    let mut exported: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for line in page.lines() {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            // Texts name a histogram without the suffixes of its samples.
            let name = family.split(' ').next().unwrap_or_default();
            exported.entry(name).or_default();
        }
        if line.starts_with('#') {
            continue;
        }
        let name = line.split(['{', ' ']).next().unwrap_or_default();
        let labels = line.split(['{', '}']).nth(1).unwrap_or_default();
        exported.insert(name, label_names(labels));
    }
    for file in ["dashboard.json", "rules.yaml"] {
        let path = format!(
            "{}/../charts/boxlite/files/{file}",
            env!("CARGO_MANIFEST_DIR")
        );
        let text = std::fs::read_to_string(path).unwrap();
        let mut selectors = 0;
        for (at, _) in text.match_indices("boxlite_") {
            let rest = &text[at..];
            let is_end = |c: char| !c.is_ascii_alphanumeric() && c != '_';
            let (name, rest) = rest.split_at(rest.find(is_end).unwrap_or(rest.len()));
            let Some(labels) = exported.get(name) else {
                panic!("{file} has {name}, which the daemon does not export");
            };
            let Some((selector, _)) = rest.strip_prefix('{').and_then(|r| r.split_once('}')) else {
                continue;
            };
            selectors += 1;
            for label in label_names(selector) {
                let of_target = ["job", "instance"].contains(&label.as_str());
                assert!(
                    of_target || labels.contains(&label),
                    "{file}: {name} has no label {label}"
                );
            }
        }
        assert!(selectors > 5, "{file} has {selectors} selectors");
    }
}

#[test]
fn documentation_has_every_exported_metric() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    let documentation = std::fs::read_to_string(path).unwrap();
    let page = whole_page();
    let families = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let mut count = 0;
    for family in families {
        let name = family.split(' ').next().unwrap_or_default();
        let row = format!("| `{name}`");
        assert!(documentation.contains(&row), "docs/metrics.md lacks {name}");
        count += 1;
    }
    assert!(count > 20, "{count} families");
}
