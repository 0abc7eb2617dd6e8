//! Life of pods: limits, probes, hooks, init containers and sidecars, jobs, resize.

use crate::cluster::context::{ClusterContext, POD_TIMEOUT, container, memory, phase, restarts};
use crate::cluster::images::AGNHOST;
use crate::cluster::pods::{self, IDLE, pod, script};
use crate::cluster::until;
use crate::failure::Result;
use crate::runner::Case;
use crate::{case, ensure, same};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

type Context = Arc<ClusterContext>;

pub(super) fn cases() -> Vec<Case<ClusterContext>> {
    vec![
        case!(memory_limit_without_runtime_class_starts, 240),
        case!(container_above_its_limit_is_oom_killed, 240),
        case!(init_containers_and_sidecars_run_in_order, 240),
        case!(probes_restart_and_gate_a_container, 300),
        case!(grpc_probe_makes_a_pod_ready, 240),
        case!(probes_succeed_beside_busy_pods, 400),
        case!(pre_stop_hook_runs_within_the_grace_period, 240),
        case!(job_with_a_failing_pod_is_retried, 300),
        case!(cron_job_runs_at_its_time, 300),
        case!(memory_resize_reaches_the_guest, 240),
        case!(resize_beyond_the_vm_reports_its_capacity, 240),
    ]
}

/// Message of the runtime's log for every limit that it lowers.
const LOWERED: &str = "resize exceeds the VM";
/// Exec probes to wait for under load.
const PROBES: usize = 15;

/// The limit is the cgroup's of the guest, and the pod needs no declared overhead.
async fn memory_limit_without_runtime_class_starts(ctx: Context) -> Result {
    let mut main = pods::container("main", "cat /sys/fs/cgroup/memory.max; nproc");
    main["resources"] = json!({"limits": {"memory": "64Mi", "cpu": "500m"}});
    let done = ctx.finish_pod(&pod("limited", &[main])).await?;
    same!(phase(&done), "Succeeded", "{}", done["status"]);
    let log = ctx.logs("limited").await?;
    same!(
        log.lines().next(),
        Some("67108864"),
        "memory.max in the guest"
    );
    Ok(())
}

async fn container_above_its_limit_is_oom_killed(ctx: Context) -> Result {
    let mut eater = pods::container("eater", "tail /dev/zero");
    eater["resources"] = json!({"limits": {"memory": "48Mi"}});
    let mut neighbor = pods::container("neighbor", IDLE);
    neighbor["resources"] = json!({"limits": {"memory": "32Mi"}});
    ctx.kubectl.apply(&pod("oom", &[eater, neighbor])).await?;
    let seen = ctx
        .wait("oom", "has an ended container", |pod| {
            container(pod, "eater")["state"]["terminated"].is_object()
        })
        .await?;
    let ended = &container(&seen, "eater")["state"]["terminated"];
    same!(ended["reason"], "OOMKilled", "{ended}");
    same!(ended["exitCode"], 137, "{ended}");
    ensure!(
        container(&seen, "neighbor")["state"]["running"].is_object(),
        "the neighbor does not run: {}",
        seen["status"]
    );
    same!(
        ctx.kubectl
            .run(&["exec", "oom", "-c", "neighbor", "--", "echo", "here"])
            .await?,
        "here\n",
        "exec"
    );
    Ok(())
}

async fn init_containers_and_sidecars_run_in_order(ctx: Context) -> Result {
    let mount = json!([{"name": "shared", "mountPath": "/shared"}]);
    let with = |mut c: Value| {
        c["volumeMounts"] = mount.clone();
        c
    };
    let mut sidecar = with(pods::container(
        "sidecar",
        "echo sidecar >> /shared/order; trap 'echo sidecar ends; exit 0' TERM; sleep infinity & wait",
    ));
    sidecar["restartPolicy"] = json!("Always");
    sidecar["startupProbe"] =
        json!({"exec": {"command": ["test", "-e", "/shared/order"]}, "periodSeconds": 1});
    let second = with(pods::container("second", "echo second >> /shared/order"));
    let main = with(pods::container(
        "main",
        "echo main >> /shared/order; cat /shared/order",
    ));
    let mut object = pod("ordered", &[main]);
    object["spec"]["initContainers"] = json!([sidecar, second]);
    object["spec"]["volumes"] = json!([{"name": "shared", "emptyDir": {}}]);
    let done = ctx.finish_pod(&object).await?;
    same!(phase(&done), "Succeeded", "{}", done["status"]);
    let log = ctx.kubectl.run(&["logs", "ordered", "-c", "main"]).await?;
    same!(log, "sidecar\nsecond\nmain\n", "order of the containers");
    let log = ctx
        .kubectl
        .run(&["logs", "ordered", "-c", "sidecar"])
        .await?;
    same!(
        log,
        "sidecar ends\n",
        "log of the sidecar, which ends after the main container"
    );
    Ok(())
}

/// An exec liveness probe restarts a container, and an HTTP readiness probe takes it out of the Ready state.
async fn probes_restart_and_gate_a_container(ctx: Context) -> Result {
    let serve =
        "mkdir -p /www; echo ok > /www/ready; touch /tmp/alive; exec httpd -f -p 8080 -h /www";
    let mut main = pods::container("main", serve);
    main["startupProbe"] =
        json!({"tcpSocket": {"port": 8080}, "periodSeconds": 1, "failureThreshold": 60});
    main["livenessProbe"] = json!({"exec": {"command": ["test", "-e", "/tmp/alive"]},
        "periodSeconds": 2, "failureThreshold": 2, "timeoutSeconds": 10});
    main["readinessProbe"] = json!({"httpGet": {"path": "/ready", "port": 8080},
        "periodSeconds": 1, "failureThreshold": 2, "timeoutSeconds": 10});
    let mut object = pod("probed", &[main]);
    object["spec"]["restartPolicy"] = json!("Always");
    let ready = ctx.run_pod(&object).await?;
    same!(restarts(&ready), 0, "restarts before a probe failed");
    ctx.exec("probed", "rm /www/ready").await?;
    ctx.wait("probed", "is not Ready", |pod| {
        crate::cluster::condition(pod, "Ready") == "False"
    })
    .await?;
    ctx.exec("probed", "echo ok > /www/ready").await?;
    ctx.ready("probed").await?;
    ctx.exec("probed", "rm /tmp/alive").await?;
    ctx.wait("probed", "was restarted and is Ready", |pod| {
        restarts(pod) == 1 && crate::cluster::condition(pod, "Ready") == "True"
    })
    .await?;
    let events = ctx.events("probed").await?;
    ensure!(events.contains("Liveness probe failed"), "{events}");
    Ok(())
}

async fn grpc_probe_makes_a_pod_ready(ctx: Context) -> Result {
    let main = json!({"name": "main", "image": AGNHOST, "args": ["grpc-health-checking"],
        "readinessProbe": {"grpc": {"port": 5000}, "periodSeconds": 1, "timeoutSeconds": 10}});
    ctx.run_pod(&pod("grpc", &[main])).await.map(drop)
}

/// Probes do not fail because the CPUs are busy: those of the node by other pods, that of the VM by a container of the same pod.
async fn probes_succeed_beside_busy_pods(ctx: Context) -> Result {
    let burn = "while :; do :; done";
    for name in ["busy-0", "busy-1"] {
        ctx.run_pod(&script(name, burn)).await?;
    }
    let probe = |mut probe: Value| {
        probe["periodSeconds"] = json!(2);
        probe["timeoutSeconds"] = json!(10);
        probe
    };
    // agnhost's server of the gRPC probe also listens on port 8080.
    let serve = "mkdir -p /www; echo ok > /www/ready; exec httpd -f -p 8090 -h /www";
    let mut web = pods::container("web", serve);
    web["startupProbe"] =
        json!({"tcpSocket": {"port": 8090}, "periodSeconds": 1, "failureThreshold": 60});
    web["readinessProbe"] = probe(json!({"httpGet": {"path": "/ready", "port": 8090}}));
    web["livenessProbe"] = probe(json!({"tcpSocket": {"port": 8090}}));
    let mut counter = pods::container("counter", IDLE);
    counter["livenessProbe"] =
        probe(json!({"exec": {"command": ["sh", "-c", "echo probed >> /probes"]}}));
    let grpc = json!({"name": "grpc", "image": AGNHOST, "args": ["grpc-health-checking"],
        "startupProbe": {"grpc": {"port": 5000}, "periodSeconds": 1, "timeoutSeconds": 10, "failureThreshold": 60},
        "livenessProbe": probe(json!({"grpc": {"port": 5000}}))});
    let burner = pods::container("burner", burn);
    let mut object = pod("probed", &[web, counter, grpc, burner]);
    object["spec"]["restartPolicy"] = json!("Always");
    ctx.run_pod(&object).await?;
    let look = ["exec", "probed", "-c", "counter", "--", "cat", "/probes"];
    until("exec probes", POD_TIMEOUT, || async {
        let count = ctx.kubectl.run(&look).await?.lines().count();
        ensure!(count >= PROBES, "{count} exec probes");
        Ok(())
    })
    .await?;
    let seen = ctx.pod("probed").await?;
    same!(restarts(&seen), 0, "restarts: {}", seen["status"]);
    let events = ctx.events("probed").await?;
    for kind in ["Liveness", "Readiness"] {
        let failed = format!("{kind} probe failed");
        ensure!(!events.contains(&failed), "{events}");
    }
    Ok(())
}

async fn pre_stop_hook_runs_within_the_grace_period(ctx: Context) -> Result {
    let mut main = pods::container(
        "main",
        "trap 'echo term; exit 0' TERM; while :; do sleep 1 & wait; done",
    );
    main["lifecycle"] = json!({"preStop": {"exec": {"command":
        ["sh", "-c", "echo hook > /proc/1/fd/1; sleep 3; echo hook ends > /proc/1/fd/1"]}}});
    let mut object = pod("stopped", &[main]);
    object["spec"]["terminationGracePeriodSeconds"] = json!(30);
    ctx.run_pod(&object).await?;
    let mut follow = ctx
        .kubectl
        .command()
        .args(["logs", "-f", "stopped"])
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let stdout = follow.stdout.take();
    let reader = tokio::spawn(async move {
        let mut text = String::new();
        if let Some(mut stdout) = stdout {
            let _ = tokio::io::AsyncReadExt::read_to_string(&mut stdout, &mut text).await;
        }
        text
    });
    let begun = Instant::now();
    ctx.kubectl.run(&["delete", "pod", "stopped"]).await?;
    let took = begun.elapsed();
    ensure!(
        took >= Duration::from_secs(3),
        "deleted after {took:?}, before the hook's end"
    );
    ensure!(
        took < Duration::from_secs(28),
        "deleted after {took:?}: killed after the grace period"
    );
    let log = tokio::time::timeout(POD_TIMEOUT, reader).await??;
    same!(
        log,
        "hook\nhook ends\nterm\n",
        "order of hook and signal in the log"
    );
    Ok(())
}

/// The first pod of the job fails and leaves a mark in a directory of the node, so that the second succeeds.
async fn job_with_a_failing_pod_is_retried(ctx: Context) -> Result {
    let mut main = pods::container(
        "main",
        "if [ -e /state/first ]; then echo second; else touch /state/first; exit 3; fi",
    );
    main["volumeMounts"] = json!([{"name": "state", "mountPath": "/state"}]);
    let mut spec = pod("unused", &[main])["spec"].clone();
    let dir = ctx.cluster.dir.join("job-state");
    spec["volumes"] =
        json!([{"name": "state", "hostPath": {"path": dir, "type": "DirectoryOrCreate"}}]);
    ctx.kubectl
        .apply(
            &json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "retried"},
            "spec": {"backoffLimit": 3, "template": {"spec": spec}}}),
        )
        .await?;
    let job = until("the job is complete", POD_TIMEOUT, || async {
        let job = ctx.kubectl.json(&["get", "job", "retried"]).await?;
        ensure!(
            crate::cluster::condition(&job, "Complete") == "True",
            "{}",
            job["status"]
        );
        Ok(job)
    })
    .await?;
    same!(job["status"]["failed"], 1, "{}", job["status"]);
    same!(job["status"]["succeeded"], 1, "{}", job["status"]);
    let log = ctx
        .kubectl
        .run(&["logs", "-l", "job-name=retried", "--prefix"])
        .await?;
    ensure!(
        log.trim_end().ends_with("] second"),
        "log of the job: {log}"
    );
    Ok(())
}

async fn cron_job_runs_at_its_time(ctx: Context) -> Result {
    let spec = pod("unused", &[pods::container("main", "date +%s")])["spec"].clone();
    let template = json!({"spec": {"template": {"spec": spec}}});
    ctx.kubectl
        .apply(
            &json!({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "clock"},
            "spec": {"schedule": "* * * * *", "jobTemplate": template}}),
        )
        .await?;
    until("a completed job", POD_TIMEOUT, || async {
        let jobs = ctx.kubectl.json(&["get", "jobs"]).await?;
        let done = |job: &Value| crate::cluster::condition(job, "Complete") == "True";
        ensure!(
            jobs["items"]
                .as_array()
                .is_some_and(|jobs| jobs.iter().any(done)),
            "{}",
            jobs["items"]
        );
        Ok(())
    })
    .await
}

async fn memory_resize_reaches_the_guest(ctx: Context) -> Result {
    let mut main = pods::container("main", IDLE);
    main["resources"] = memory("96Mi");
    ctx.run_pod(&pod("resized", &[main])).await?;
    let before = ctx.pod("resized").await?;
    let patch = json!({"spec": {"containers": [{"name": "main", "resources": memory("64Mi")}]}});
    resize(&ctx, "resized", &patch).await?;
    ctx.wait("resized", "has the new limit", |pod| {
        container(pod, "main")["resources"]["limits"]["memory"] == "64Mi"
    })
    .await?;
    let limit = ctx.exec("resized", "cat /sys/fs/cgroup/memory.max").await?;
    same!(limit.trim(), "67108864", "memory.max in the guest");
    let after = ctx.pod("resized").await?;
    same!(
        container(&after, "main")["containerID"],
        container(&before, "main")["containerID"],
        "the container was replaced"
    );
    Ok(())
}

/// A VM does not grow: the limits are lowered to its capacity, the status shows the applied ones, and the kubelet considers
/// the resize done instead of repeating it.
async fn resize_beyond_the_vm_reports_its_capacity(ctx: Context) -> Result {
    let mut main = pods::container("main", IDLE);
    main["resources"] = memory("64Mi");
    ctx.run_pod(&pod("greedy", &[main])).await?;
    let mark = ctx.cluster.worker.node.service().length();
    let patch = json!({"spec": {"containers": [{"name": "main", "resources": memory("1Gi")}]}});
    resize(&ctx, "greedy", &patch).await?;
    ctx.wait("greedy", "has an applied resize", |pod| {
        pod["status"]["observedGeneration"] == pod["metadata"]["generation"]
            && container(pod, "main")["allocatedResources"]["memory"] == "1Gi"
            && !conditions(pod)
                .any(|c| c["type"] == "PodResizePending" || c["type"] == "PodResizeInProgress")
    })
    .await?;
    let limit = ctx.exec("greedy", "cat /sys/fs/cgroup/memory.max").await?;
    same!(limit.trim(), "67108864", "memory.max in the guest");
    let seen = ctx.pod("greedy").await?;
    let applied = &container(&seen, "main")["resources"]["limits"]["memory"];
    same!(
        applied,
        "64Mi",
        "applied limit in the status: {}",
        seen["status"]
    );
    // One call for the container; a kubelet that was not satisfied would repeat it every second.
    let asked = |text: &str| text.matches(LOWERED).count();
    let first = asked(&ctx.cluster.worker.node.service().tail(mark, usize::MAX));
    ensure!(first > 0, "no limit was lowered");
    ctx.run_pod(&script("later", IDLE)).await?;
    same!(
        asked(&ctx.cluster.worker.node.service().tail(mark, usize::MAX)),
        first,
        "calls after a pod's start"
    );
    Ok(())
}

fn conditions(pod: &Value) -> impl Iterator<Item = &Value> {
    pod["status"]["conditions"].as_array().into_iter().flatten()
}

async fn resize(ctx: &Context, pod: &str, patch: &Value) -> Result {
    let text = patch.to_string();
    ctx.kubectl
        .run(&[
            "patch",
            "pod",
            pod,
            "--subresource=resize",
            "--patch",
            &text,
        ])
        .await
        .map(drop)
}
