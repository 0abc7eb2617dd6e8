//! A pod's life as a kubelet drives it, call by call, each measured: time, and the guest's work if it is counted.

use super::work::{Counters, Work};
use crate::failure::{During, Result};
use crate::node::Node;
use crate::pod::Pod;
use crate::same;
use k8s_cri::v1::{ContainerStatusRequest, PodSandboxStatusRequest};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The calls in the order in which they are made.
pub(crate) const CALLS: [&str; 15] = [
    "RunPodSandbox",
    "CreateContainer, first of a pod",
    "StartContainer",
    "ExecSync true, first of a pod",
    "ExecSync true",
    "ContainerStatus, verbose",
    "PodSandboxStatus, verbose",
    "CreateContainer",
    "StartContainer, second of a pod",
    "StopContainer",
    "RemoveContainer",
    "CreateContainer, third of a pod",
    "StartContainer, third of a pod",
    "StopPodSandbox",
    "RemovePodSandbox",
];

/// The recorded numbers: a line for each of [`CALLS`] with the instructions and the name.
const RECORDED: &str = include_str!("../../bench/instructions");

/// Cost of one call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    /// Time until the answer.
    pub time: Duration,
    /// The guest's work until it is idle again; `None` if it is not counted.
    pub work: Option<Work>,
}

/// Returns the recorded instructions in the order of [`CALLS`].
pub(crate) fn recorded() -> Result<Vec<u64>> {
    let lines = RECORDED.lines().filter(|line| !line.starts_with('#'));
    let mut numbers = Vec::new();
    for (call, line) in CALLS.iter().zip(lines) {
        let number = line.strip_suffix(call).unwrap_or_default().trim();
        numbers.push(
            number
                .parse()
                .during(format!("recorded {line:?}, {call}"))?,
        );
    }
    same!(numbers.len(), CALLS.len(), "recorded calls");
    Ok(numbers)
}

/// Measures calls of one pod.
struct Meter {
    /// Counters of the guest, and their state when it was last idle.
    counted: Option<(Counters, Work)>,
    costs: Vec<Cost>,
}

impl Meter {
    async fn of<T>(&mut self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let start = Instant::now();
        let value = call.await?;
        let time = start.elapsed();
        let mut work = None;
        if let Some((counters, before)) = &mut self.counted {
            let now = counters.idle().await?;
            work = Some(now.since(*before));
            *before = now;
        }
        self.costs.push(Cost { time, work });
        Ok(value)
    }
}

/// Runs one pod and returns the costs in the order of [`CALLS`]. The guest's work is counted if `counted` is set, for which
/// the node needs a counting QEMU.
pub(crate) async fn run(node: &Arc<Node>, image: &str, counted: bool) -> Result<Vec<Cost>> {
    let mut meter = Meter {
        counted: None,
        costs: Vec::new(),
    };
    let start = Instant::now();
    let pod = Pod::run(node, "life").await?;
    let time = start.elapsed();
    let work = if counted {
        let counters = Counters::open(&pod)?;
        let work = counters.idle().await?;
        meter.counted = Some((counters, work));
        Some(work)
    } else {
        None
    };
    meter.costs.push(Cost { time, work });
    let argv = ["sleep", "1000"];
    let first = meter.of(pod.create("c1", image, &argv)).await?;
    meter.of(first.start()).await?;
    meter.of(first.out(&["true"])).await?;
    meter.of(first.out(&["true"])).await?;
    let request = ContainerStatusRequest {
        container_id: first.id.clone(),
        verbose: true,
    };
    let mut cri = node.cri.runtime();
    let status = async { Ok(cri.container_status(request).await?) };
    meter.of(status).await?;
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    };
    let mut cri = node.cri.runtime();
    let status = async { Ok(cri.pod_sandbox_status(request).await?) };
    meter.of(status).await?;
    let second = meter.of(pod.create("c2", image, &argv)).await?;
    meter.of(second.start()).await?;
    meter.of(second.stop(0)).await?;
    meter.of(second.remove()).await?;
    let third = meter.of(pod.create("c3", image, &argv)).await?;
    meter.of(third.start()).await?;
    meter.of(pod.stop()).await?;
    meter.of(pod.remove()).await?;
    Ok(meter.costs)
}
