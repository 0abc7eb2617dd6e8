//! Compares descriptors with metrics of an answer that has all values.

use super::*;
use boxlite_proto::boxlite::v1::{
    BlkioStats, HugetlbStats, NetworkStats, PressureLine, ProcessStats,
};
use boxlite_proto::cri::v1::{ContainerConfig, LinuxContainerConfig, PodSandboxConfig};
use boxlite_proto::cri::v1::{LinuxPodSandboxConfig, PodSandboxMetadata};
use boxlite_proto::vmm::VmmKind;
use boxlite_runtime::{BoxOptions, BoxState, ContainerState, StageTimers};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};

fn sandbox() -> BoxSnapshot {
    let record = PodMetadata {
        config: Some(PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: "web".into(),
                namespace: "ns".into(),
                ..Default::default()
            }),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/podx".into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let options = BoxOptions {
        pod: None,
        id: "p".into(),
        name: "p".into(),
        metadata: record.encoded(),
        vcpus: 1,
        memory_mib: 320,
        containers_bytes: 0,
        scratch_bytes: 0,
        hostname: String::new(),
        netns: None,
        host_network: false,
        passt: false,
        sysctls: BTreeMap::new(),
        cgroup_parent: String::new(),
        vmm: None,
        debug_console: false,
        shared_volume_writers: Default::default(),
        vmm_ids: None,
    };
    BoxSnapshot {
        id: "p".into(),
        name: "p".into(),
        state: BoxState::Ready,
        reason: String::new(),
        created_at_ns: 5_000_000_000,
        metadata: options.metadata.clone(),
        timers: StageTimers::default(),
        vmm: VmmKind::Qemu,
        shim_pid: None,
        metrics: Default::default(),
        options,
    }
}

fn started() -> ContainerSnapshot {
    let record = ContainerMetadata {
        config: Some(ContainerConfig {
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources {
                    cpu_quota: 20_000,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    ContainerSnapshot {
        id: "c".into(),
        box_id: "p".into(),
        name: "c/0".into(),
        image_id: String::new(),
        state: ContainerState::Running,
        created_at_ns: 0,
        started_at_ns: 7_000_000_000,
        finished_at_ns: 0,
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
        metadata: record.encode_to_vec(),
        log_path: None,
        tty: false,
        stdin: false,
        stdin_once: false,
        image_volumes: Vec::new(),
        user: None,
    }
}

fn cgroup() -> CgroupStats {
    let pressure = Some(Pressure {
        some: Some(PressureLine {
            total_usec: 3_000_000,
            ..Default::default()
        }),
        full: Some(PressureLine::default()),
    });
    CgroupStats {
        cpu_usage_usec: 9_900_000,
        memory_max: u64::MAX,
        pids_max: u64::MAX,
        io: vec![BlkioStats {
            major: 254,
            minor: 16,
            rbytes: 11,
            device: "/dev/vdb".into(),
            ..Default::default()
        }],
        cpu_pressure: pressure,
        memory_pressure: pressure,
        io_pressure: pressure,
        hugetlb: vec![HugetlbStats {
            page_size: "2MB".into(),
            current: 0,
        }],
        ..Default::default()
    }
}

fn whole() -> PodSandboxMetrics {
    let scratch = FilesystemStats {
        device: "/dev/vdb".into(),
        ..Default::default()
    };
    let inside = ContainerStatsResponse {
        cgroup: Some(cgroup()),
        processes: Some(ProcessStats {
            max_open_files: 1024,
            ..Default::default()
        }),
        ..Default::default()
    };
    let answer = GuestStatsResponse {
        pod: Some(cgroup()),
        networks: vec![NetworkStats {
            interface: "eth0".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let now = 9_000_000_000;
    let one = container(&sandbox(), &started(), &inside, Some(&scratch), now);
    pod(&sandbox(), &answer, vec![one], now)
}

fn all(pod: &PodSandboxMetrics) -> Vec<Metric> {
    let containers = pod.container_metrics.iter().flat_map(|c| c.metrics.clone());
    pod.metrics.iter().cloned().chain(containers).collect()
}

#[test]
fn every_metric_has_values_with_matching_labels() {
    let descriptors = descriptors();
    let keys: BTreeMap<_, _> = descriptors
        .iter()
        .map(|d| (d.name.as_str(), d.label_keys.len()))
        .collect();
    assert_eq!(keys.len(), 56, "a name is there twice");
    assert!(descriptors.iter().all(|d| !d.help.is_empty()));
    let metrics = all(&whole());
    for metric in &metrics {
        assert_eq!(
            metric.label_values.len(),
            keys[metric.name.as_str()],
            "{}",
            metric.name
        );
        assert_eq!(metric.timestamp, 9_000_000_000);
    }
    let names: BTreeSet<_> = metrics.iter().map(|metric| metric.name.as_str()).collect();
    let missing: Vec<_> = keys.keys().filter(|name| !names.contains(**name)).collect();
    // The only metric without a file in cgroup v2.
    assert_eq!(missing, [&"container_hugetlb_max_usage_bytes"]);
}

#[test]
fn values_and_labels_of_a_container() {
    let pod = whole();
    let metrics = &pod.container_metrics[0].metrics;
    let find = |name: &str| metrics.iter().find(|metric| metric.name == name).unwrap();
    let value = |name: &str| find(name).value.unwrap().value;
    assert_eq!(value("container_cpu_usage_seconds_total"), 9);
    assert_eq!(value("container_spec_memory_limit_bytes"), 0);
    assert_eq!(value("container_threads_max"), 0);
    assert_eq!(value("container_spec_cpu_quota"), 20_000);
    assert_eq!(value("container_spec_cpu_period"), 100_000);
    assert_eq!(value("container_start_time_seconds"), 7);
    assert_eq!(value("container_pressure_io_waiting_seconds_total"), 3);
    let usage = find("container_blkio_device_usage_total");
    assert_eq!(
        usage.label_values,
        [
            "/kubepods/podx/c",
            "c",
            "",
            "",
            "ns",
            "web",
            "/dev/vdb",
            "254",
            "16",
            "Read"
        ]
    );
}

#[test]
fn missing_features_have_no_value_and_lists_are_bounded() {
    let mut stats = cgroup();
    stats.io_pressure = None;
    stats.io = vec![BlkioStats::default(); 5000];
    let inside = ContainerStatsResponse {
        cgroup: Some(stats),
        ..Default::default()
    };
    let one = container(&sandbox(), &started(), &inside, None, -1);
    let of = |name: &str| {
        one.metrics
            .iter()
            .filter(|metric| metric.name == name)
            .count()
    };
    assert_eq!(of("container_pressure_io_waiting_seconds_total"), 0);
    assert_eq!(of("container_fs_limit_bytes"), 0);
    assert_eq!(of("container_fs_reads_total"), MAX_ENTRIES);
}
