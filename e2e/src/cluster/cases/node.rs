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

/// Difference in memory between two looks at a busy container.
const MEMORY_SLACK_BYTES: u64 = 16 << 20;

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
    let number = |value: &Value| value.as_u64().unwrap_or_default();
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
        let main = &pod["containers"][0];
        let guest = ctx
            .exec(
                "measured",
                "cat /sys/fs/cgroup/memory.current; grep ^usage_usec /sys/fs/cgroup/cpu.stat",
            )
            .await?;
        let current: u64 = guest
            .lines()
            .next()
            .and_then(|l| l.parse().ok())
            .unwrap_or_default();
        let usage = number(&main["memory"]["usageBytes"]);
        ensure!(
            usage.abs_diff(current) < MEMORY_SLACK_BYTES,
            "usage {usage}, in the guest {current}: {pod}"
        );
        for of in [main, pod] {
            for field in ["usageBytes", "workingSetBytes", "rssBytes", "pageFaults"] {
                ensure!(number(&of["memory"][field]) > 0, "{field}: {of}");
            }
            let cpu = number(&of["cpu"]["usageCoreNanoSeconds"]);
            ensure!(cpu > 10_000_000, "CPU time: {of}");
        }
        let written = number(&main["rootfs"]["usedBytes"]);
        ensure!(written >= 20 << 20, "bytes written to the root: {main}");
        let storage = number(&pod["ephemeral-storage"]["usedBytes"]);
        ensure!(storage >= written, "storage of the pod: {pod}");
        ensure!(
            number(&pod["network"]["rxBytes"]) > 0,
            "network: {}",
            pod["network"]
        );
        ensure!(
            number(&pod["process_stats"]["process_count"]) > 0,
            "processes: {pod}"
        );
        Ok(())
    })
    .await
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
