//! The kubelet's management of the node's resources: statistics, eviction by ephemeral storage, garbage collection of images,
//! the limit of processes per pod.

use crate::cluster::NODE;
use crate::cluster::context::{ClusterContext, POD_TIMEOUT, container, phase};
use crate::cluster::images::{AGNHOST, BUSYBOX};
use crate::cluster::pods::{self, IDLE, pod, script};
use crate::cluster::until;
use crate::failure::Result;
use crate::pod::pull;
use crate::runner::Case;
use crate::{bail, case, ensure, same};
use k8s_cri::v1::ListImagesRequest;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

type Context = Arc<ClusterContext>;

pub(super) fn cases() -> Vec<Case<ClusterContext>> {
    vec![
        case!(stats_summary_agrees_with_the_guest, 300),
        case!(pod_above_its_ephemeral_storage_is_evicted, 400),
        case!(unused_images_are_collected, 600),
        case!(process_limit_of_pods_reaches_the_guest, 300),
    ]
}

/// Allowed difference between a figure of the kubelet and one of the guest, since both are read at different times.
const MEMORY_SLACK_BYTES: u64 = 16 << 20;
const CPU_SLACK_NS: u64 = 2_000_000_000;
const PAGE_FAULT_SLACK: u64 = 5_000;
const NETWORK_SLACK_BYTES: u64 = 64 << 10;
const PROCESS_SLACK: u64 = 4;

/// Prints figures of the guest, a name and a value per line.
const FIGURES: &str = "cd /sys/fs/cgroup; echo current $(cat memory.current); cat memory.stat cpu.stat; \
    echo pids $(cat pids.current); cd /sys/class/net/eth0/statistics; \
    echo received $(cat rx_bytes); echo sent $(cat tx_bytes); echo written $(du -sk /file | cut -f 1)";

/// With the feature gate the kubelet takes the figures of pods, too, from the runtime instead of the node's cgroups.
async fn stats_summary_agrees_with_the_guest(ctx: Context) -> Result {
    let gates = json!({"featureGates": {"PodAndContainerStatsFromCRI": true}});
    ctx.cluster.worker.restart_kubelet(&gates).await?;
    let hold = "head -c 40000000 /dev/zero | tail & i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; sleep infinity";
    ctx.run_pod(&script(
        "measured",
        &format!("dd if=/dev/zero of=/file bs=1M count=20 2>/dev/null; {hold}"),
    ))
    .await?;
    let path = format!("/api/v1/nodes/{NODE}/proxy/stats/summary");
    until("statistics of the pod", POD_TIMEOUT, || async {
        let text = ctx.kubectl.run(&["get", "--raw", &path]).await?;
        let summary: Value = serde_json::from_str(&text)?;
        let pods = summary["pods"].as_array();
        let pod = pods
            .into_iter()
            .flatten()
            .find(|p| p["podRef"]["name"] == "measured");
        let Some(pod) = pod else {
            bail!("no such pod: {summary}")
        };
        agrees(pod, &ctx.exec("measured", FIGURES).await?)
    })
    .await
}

/// Compares a pod of the summary with [`FIGURES`] of its only container.
fn agrees(pod: &Value, figures: &str) -> Result {
    let guest: HashMap<&str, u64> = figures
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
        .collect();
    let of = |name: &str| guest.get(name).copied().unwrap_or_default();
    let main = &pod["containers"][0];
    let number = |object: &Value, field: &str| object[field].as_u64().unwrap_or_default();
    let working_set = of("current").saturating_sub(of("inactive_file"));
    for (name, object, field, inside, slack) in [
        (
            "memory",
            &main["memory"],
            "usageBytes",
            of("current"),
            MEMORY_SLACK_BYTES,
        ),
        (
            "memory",
            &main["memory"],
            "workingSetBytes",
            working_set,
            MEMORY_SLACK_BYTES,
        ),
        (
            "memory",
            &main["memory"],
            "rssBytes",
            of("anon"),
            MEMORY_SLACK_BYTES,
        ),
        (
            "memory",
            &main["memory"],
            "pageFaults",
            of("pgfault"),
            PAGE_FAULT_SLACK,
        ),
        (
            "memory",
            &main["memory"],
            "majorPageFaults",
            of("pgmajfault"),
            PAGE_FAULT_SLACK,
        ),
        (
            "CPU",
            &main["cpu"],
            "usageCoreNanoSeconds",
            of("usage_usec") * 1000,
            CPU_SLACK_NS,
        ),
        (
            "root",
            &main["rootfs"],
            "usedBytes",
            of("written") << 10,
            MEMORY_SLACK_BYTES,
        ),
        (
            "network",
            &pod["network"],
            "rxBytes",
            of("received"),
            NETWORK_SLACK_BYTES,
        ),
        (
            "network",
            &pod["network"],
            "txBytes",
            of("sent"),
            NETWORK_SLACK_BYTES,
        ),
        (
            "processes",
            &pod["process_stats"],
            "process_count",
            of("pids"),
            PROCESS_SLACK,
        ),
    ] {
        let outside = number(object, field);
        ensure!(
            outside.abs_diff(inside) < slack,
            "{name} {field} {outside}, in the guest {inside}: {pod}"
        );
    }
    used_enough(&guest)?;
    pod_contains_its_container(pod)
}

/// Fails unless the container's script has used what it must, so that the comparison is not one of zeros.
fn used_enough(guest: &HashMap<&str, u64>) -> Result {
    for (name, least) in [
        ("anon", 40_000_000),
        ("pgfault", 9_000),
        ("usage_usec", 10_000),
        ("received", 1),
        ("pids", 3),
    ] {
        ensure!(
            guest.get(name).is_some_and(|value| *value >= least),
            "{name} in the guest: {guest:?}"
        );
    }
    Ok(())
}

/// Fails unless the figures of a pod include those of its only container.
fn pod_contains_its_container(pod: &Value) -> Result {
    let main = &pod["containers"][0];
    let number = |object: &Value, field: &str| object[field].as_u64().unwrap_or_default();
    for field in ["usageBytes", "workingSetBytes", "rssBytes", "pageFaults"] {
        let (all, one) = (
            number(&pod["memory"], field),
            number(&main["memory"], field),
        );
        ensure!(all >= one / 2 && all > 0, "{field} of the pod: {pod}");
    }
    let cpu = number(&pod["cpu"], "usageCoreNanoSeconds");
    ensure!(cpu > 10_000_000, "CPU time of the pod: {pod}");
    let written = number(&main["rootfs"], "usedBytes");
    ensure!(written >= 20 << 20, "bytes written to the root: {main}");
    let storage = number(&pod["ephemeral-storage"], "usedBytes");
    ensure!(storage >= written, "storage of the pod: {pod}");
    Ok(())
}

/// Two pods write as much, one of them to its root and the other to an emptyDir: each is evicted for its own limit, and their
/// neighbor, which wrote less than its limit, is not.
async fn pod_above_its_ephemeral_storage_is_evicted(ctx: Context) -> Result {
    // Ends by a signal: a pod whose container exits with 0 has succeeded, evicted or not.
    let fill = |path: &str, mib: u32| {
        format!(
            "dd if=/dev/zero of={path} bs=1M count={mib} 2>/dev/null; sync; exec sleep infinity"
        )
    };
    let limited = |script: &str, limit: &str| {
        let mut main = pods::container("main", script);
        main["resources"] = json!({"limits": {"ephemeral-storage": limit}});
        main
    };
    ctx.run_pod(&pod("modest", &[limited(&fill("/file", 20), "200Mi")]))
        .await?;
    let mut main = pods::container("main", &fill("/data/file", 60));
    main["volumeMounts"] = json!([{"name": "data", "mountPath": "/data"}]);
    let mut object = pod("volume", &[main]);
    object["spec"]["volumes"] = json!([{"name": "data", "emptyDir": {"sizeLimit": "30Mi"}}]);
    ctx.kubectl.apply(&object).await?;
    ctx.kubectl
        .apply(&pod("root", &[limited(&fill("/file", 60), "30Mi")]))
        .await?;
    for (name, reason) in [
        (
            "root",
            "Pod ephemeral local storage usage exceeds the total limit of containers 30Mi",
        ),
        ("volume", "exceeds the limit \"30Mi\""),
    ] {
        let seen = ctx
            .wait(name, "was evicted", |pod| phase(pod) == "Failed")
            .await?;
        same!(seen["status"]["reason"], "Evicted", "{}", seen["status"]);
        let message = seen["status"]["message"].as_str().unwrap_or_default();
        ensure!(message.contains(reason), "message of {name}: {message}");
    }
    let seen = ctx.pod("modest").await?;
    same!(phase(&seen), "Running", "{}", seen["status"]);
    Ok(())
}

/// The kubelet looks for images to remove when it starts, which none is old enough for, and every five minutes.
const GC_TIMEOUT: Duration = Duration::from_secs(420);

/// Returns the tags of the runtime's images.
async fn tags(ctx: &Context) -> Result<Vec<String>> {
    let mut client = ctx.cluster.worker.node.cri.image();
    let list = client.list_images(ListImagesRequest::default()).await?;
    let images = list.into_inner().images;
    Ok(images.into_iter().flat_map(|i| i.repo_tags).collect())
}

/// A kubelet above its threshold removes the images that no container uses. The image of a running container remains.
async fn unused_images_are_collected(ctx: Context) -> Result {
    pull(&ctx.cluster.worker.node, AGNHOST).await?;
    ctx.run_pod(&script("user", IDLE)).await?;
    let thresholds = json!({"imageGCHighThresholdPercent": 1, "imageGCLowThresholdPercent": 0, "imageMinimumGCAge": "1ms"});
    ctx.cluster.worker.restart_kubelet(&thresholds).await?;
    until("the unused image is removed", GC_TIMEOUT, || async {
        let present = tags(&ctx).await?;
        ensure!(present.iter().all(|tag| tag != AGNHOST), "{present:?}");
        Ok(())
    })
    .await?;
    let present = tags(&ctx).await?;
    ensure!(
        present.iter().any(|tag| tag == BUSYBOX),
        "images: {present:?}"
    );
    same!(ctx.exec("user", "echo here").await?, "here\n", "exec");
    Ok(())
}

/// The kubelet sets podPidsLimit on the pod's cgroup of the node. The pod's processes are in the guest, which enforces it.
async fn process_limit_of_pods_reaches_the_guest(ctx: Context) -> Result {
    ctx.cluster
        .worker
        .restart_kubelet(&json!({"podPidsLimit": 64}))
        .await?;
    let fork = "i=0; while [ $i -lt 200 ]; do sleep 1000 & i=$((i+1)); done; wait";
    ctx.kubectl
        .apply(&pod(
            "forker",
            &[
                pods::container("bomb", fork),
                pods::container("other", IDLE),
            ],
        ))
        .await?;
    let seen = ctx
        .wait("forker", "has an ended container", |pod| {
            container(pod, "bomb")["state"]["terminated"].is_object()
        })
        .await?;
    let log = ctx.kubectl.run(&["logs", "forker", "-c", "bomb"]).await?;
    ensure!(log.contains("can't fork"), "log: {log}");
    ensure!(
        container(&seen, "other")["state"]["running"].is_object(),
        "{}",
        seen["status"]
    );
    let look = ["exec", "forker", "-c", "other", "--", "echo", "here"];
    same!(
        ctx.kubectl.run(&look).await?,
        "here\n",
        "exec after the bomb"
    );
    Ok(())
}
