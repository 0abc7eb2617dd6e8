//! Volumes as a kubelet makes them: configMap, secret, projected, downwardAPI, emptyDir of both media, subPath, hostPath,
//! persistent volumes.

use crate::cluster::context::{ClusterContext, POD_TIMEOUT, phase};
use crate::cluster::images::BUSYBOX;
use crate::cluster::pods::{self, IDLE, pod};
use crate::cluster::until;
use crate::failure::Result;
use crate::runner::Case;
use crate::{case, ensure, same};
use serde_json::{Value, json};
use std::sync::Arc;

type Context = Arc<ClusterContext>;

pub(super) fn cases() -> Vec<Case<ClusterContext>> {
    vec![
        case!(config_map_and_secret_are_mounted_and_updated, 300),
        case!(projected_volume_has_token_and_labels, 240),
        case!(memory_medium_is_a_tmpfs_with_its_limit, 240),
        case!(sub_path_and_host_path_are_shared_with_the_node, 240),
        case!(fs_group_owns_the_volume, 240),
        case!(image_volume_and_expanded_sub_path_are_mounted, 240),
        case!(recursive_read_only_covers_mounts_of_the_node, 240),
        case!(stateful_set_keeps_name_and_volume, 300),
    ]
}

fn config_map(name: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"e2e": "case"}},
        "data": {"key": value}})
}

async fn config_map_and_secret_are_mounted_and_updated(ctx: Context) -> Result {
    ctx.kubectl.apply(&config_map("settings", "one")).await?;
    ctx.kubectl
        .apply(
            &json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "password"},
            "stringData": {"word": "sesame"}}),
        )
        .await?;
    let mut main = pods::container("main", IDLE);
    main["env"] = json!([{"name": "FROM_MAP", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "key"}}}]);
    main["volumeMounts"] = json!([{"name": "settings", "mountPath": "/settings"},
        {"name": "password", "mountPath": "/password", "readOnly": true}]);
    let mut object = pod("configured", &[main]);
    object["spec"]["volumes"] = json!([{"name": "settings", "configMap": {"name": "settings"}},
        {"name": "password", "secret": {"secretName": "password", "defaultMode": 0o400}}]);
    ctx.run_pod(&object).await?;
    let look = "echo $FROM_MAP; cat /settings/key; echo; cat /password/word; echo; stat -Lc %a /password/word; touch /password/x || echo refused";
    let seen = ctx.exec("configured", look).await?;
    same!(
        seen,
        "one\none\nsesame\n400\nrefused\n",
        "configuration in the container"
    );
    ctx.kubectl.apply(&config_map("settings", "two")).await?;
    // A kubelet updates volumes when it syncs the pod, which it does once a minute.
    until("the updated value", POD_TIMEOUT, || async {
        same!(
            ctx.exec("configured", "cat /settings/key").await?,
            "two",
            "value"
        );
        Ok(())
    })
    .await
}

async fn projected_volume_has_token_and_labels(ctx: Context) -> Result {
    ctx.kubectl
        .apply(&config_map("part", "from the map"))
        .await?;
    let look = "cat /all/map/key; echo; cat /all/labels; echo; wc -c < /all/token; \
        test -s /var/run/secrets/kubernetes.io/serviceaccount/ca.crt && echo ca";
    let mut main = pods::container("main", look);
    main["volumeMounts"] = json!([{"name": "all", "mountPath": "/all", "readOnly": true}]);
    let mut object = pod("projected", &[main]);
    object["spec"]["volumes"] = json!([{"name": "all", "projected": {"sources": [
        {"configMap": {"name": "part", "items": [{"key": "key", "path": "map/key"}]}},
        {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}}]}}]);
    let done = ctx.finish_pod(&object).await?;
    same!(phase(&done), "Succeeded", "{}", done["status"]);
    let log = ctx.logs("projected").await?;
    let lines: Vec<_> = log.lines().collect();
    same!(
        lines[..2],
        ["from the map", "app=\"projected\""],
        "projected files"
    );
    let length: usize = lines
        .get(2)
        .and_then(|l| l.trim().parse().ok())
        .unwrap_or_default();
    ensure!(length > 100, "token of {length} bytes: {log}");
    same!(lines.last(), Some(&"ca"), "service account");
    Ok(())
}

async fn memory_medium_is_a_tmpfs_with_its_limit(ctx: Context) -> Result {
    let mount = json!([{"name": "memory", "mountPath": "/memory"}]);
    let mut writer = pods::container(
        "writer",
        "echo shared > /memory/file; df -k /memory | tail -n1; stat -f -c %T /memory",
    );
    writer["volumeMounts"] = mount.clone();
    let mut reader = pods::container(
        "reader",
        "until [ -s /memory/file ]; do sleep 0.2; done; cat /memory/file; \
         dd if=/dev/zero of=/memory/big bs=1M count=24 2>/dev/null || echo full",
    );
    reader["volumeMounts"] = mount;
    let mut object = pod("memory", &[writer, reader]);
    object["spec"]["volumes"] =
        json!([{"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}}]);
    let done = ctx.finish_pod(&object).await?;
    same!(phase(&done), "Succeeded", "{}", done["status"]);
    let log = ctx.kubectl.run(&["logs", "memory", "-c", "writer"]).await?;
    ensure!(
        log.contains("tmpfs") && log.contains(" 16384 "),
        "file system of the volume: {log}"
    );
    let log = ctx.kubectl.run(&["logs", "memory", "-c", "reader"]).await?;
    same!(log, "shared\nfull\n", "the other container");
    Ok(())
}

async fn sub_path_and_host_path_are_shared_with_the_node(ctx: Context) -> Result {
    let dir = ctx.cluster.dir.join("host-path");
    std::fs::create_dir_all(dir.join("sub"))?;
    std::fs::write(dir.join("sub/from-node"), "node")?;
    let mut main = pods::container(
        "main",
        "cat /sub/from-node; echo pod > /sub/from-pod; cat /whole/sub/from-pod",
    );
    main["volumeMounts"] = json!([{"name": "host", "mountPath": "/sub", "subPath": "sub"},
        {"name": "host", "mountPath": "/whole"}]);
    let mut object = pod("shared", &[main]);
    object["spec"]["volumes"] =
        json!([{"name": "host", "hostPath": {"path": dir, "type": "Directory"}}]);
    let done = ctx.finish_pod(&object).await?;
    same!(phase(&done), "Succeeded", "{}", done["status"]);
    same!(
        ctx.logs("shared").await?,
        "nodepod\n",
        "files in the container"
    );
    same!(
        std::fs::read_to_string(dir.join("sub/from-pod"))?,
        "pod\n",
        "file on the node"
    );
    Ok(())
}

async fn fs_group_owns_the_volume(ctx: Context) -> Result {
    let mut main = pods::container(
        "main",
        "stat -c %g /data; id -G; echo x > /data/file && stat -c %u:%g /data/file",
    );
    main["volumeMounts"] = json!([{"name": "data", "mountPath": "/data"}]);
    let mut object = pod("grouped", &[main]);
    object["spec"]["volumes"] = json!([{"name": "data", "emptyDir": {}}]);
    object["spec"]["securityContext"] =
        json!({"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000});
    let done = ctx.finish_pod(&object).await?;
    same!(phase(&done), "Succeeded", "{}", done["status"]);
    let log = ctx.logs("grouped").await?;
    let lines: Vec<_> = log.lines().collect();
    same!(lines.first(), Some(&"2000"), "group of the volume: {log}");
    ensure!(
        lines
            .get(1)
            .is_some_and(|l| l.split(' ').any(|g| g == "2000")),
        "groups: {log}"
    );
    same!(
        lines.get(2),
        Some(&"1000:2000"),
        "owner of a new file: {log}"
    );
    Ok(())
}

/// In a pod with an image volume the kubelet sends `image_sub_path` with every mount.
async fn image_volume_and_expanded_sub_path_are_mounted(ctx: Context) -> Result {
    let dir = ctx.cluster.dir.join("expanded");
    std::fs::create_dir_all(&dir)?;
    let look = "/image/busybox echo from the image; touch /image/x 2>/dev/null || echo refused; echo pod > /own/file";
    let mut main = pods::container("main", look);
    main["env"] =
        json!([{"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]);
    main["volumeMounts"] = json!([{"name": "image", "mountPath": "/image", "subPath": "bin"},
        {"name": "host", "mountPath": "/own", "subPathExpr": "of-$(POD_NAME)"}]);
    let mut object = pod("expanded", &[main]);
    object["spec"]["volumes"] = json!([{"name": "image", "image": {"reference": BUSYBOX, "pullPolicy": "IfNotPresent"}},
        {"name": "host", "hostPath": {"path": dir, "type": "Directory"}}]);
    let done = ctx.finish_pod(&object).await?;
    same!(phase(&done), "Succeeded", "{}", done["status"]);
    same!(
        ctx.logs("expanded").await?,
        "from the image\nrefused\n",
        "image volume"
    );
    same!(
        std::fs::read_to_string(dir.join("of-expanded/file"))?,
        "pod\n",
        "file on the node"
    );
    Ok(())
}

/// A mount of the node below the volume is read-only with recursiveReadOnly, and keeps its own flags without.
async fn recursive_read_only_covers_mounts_of_the_node(ctx: Context) -> Result {
    let dir = ctx.cluster.dir.join("read-only");
    let below = dir.join("below");
    std::fs::create_dir_all(&below)?;
    crate::namespaces::tmpfs(&below, "size=1m")?;
    let look = "for dir in all all/below top top/below; do touch /$dir/x 2>/dev/null && echo $dir || echo $dir refused; done";
    let mut main = pods::container("main", look);
    main["volumeMounts"] = json!([
        {"name": "host", "mountPath": "/all", "readOnly": true, "recursiveReadOnly": "Enabled"},
        {"name": "host", "mountPath": "/top", "readOnly": true}]);
    let mut object = pod("read-only", &[main]);
    object["spec"]["volumes"] =
        json!([{"name": "host", "hostPath": {"path": dir, "type": "Directory"}}]);
    let done = ctx.finish_pod(&object).await;
    let log = ctx.logs("read-only").await;
    ctx.kubectl.run(&["delete", "pod", "read-only"]).await?;
    crate::namespaces::run("umount", &["--lazy", &below.display().to_string()])?;
    let done = done?;
    same!(phase(&done), "Succeeded", "{}", done["status"]);
    let expected = "all refused\nall/below refused\ntop refused\ntop/below\n";
    same!(log?, expected, "writes to the volume");
    Ok(())
}

/// A StatefulSet's pod is replaced: the new one has the same name and finds the data of its claim.
async fn stateful_set_keeps_name_and_volume(ctx: Context) -> Result {
    let dir = ctx.cluster.dir.join("local-volume");
    ctx.kubectl
        .apply(
            &json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "local"},
            "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "manual",
                "persistentVolumeReclaimPolicy": "Retain", "hostPath": {"path": dir, "type": "DirectoryOrCreate"}}}),
        )
        .await?;
    let mut main = pods::container(
        "main",
        "echo started >> /data/starts; trap 'exit 0' TERM; sleep infinity & wait",
    );
    main["volumeMounts"] = json!([{"name": "data", "mountPath": "/data"}]);
    let mut object = pod("unused", &[main]);
    object["spec"]["restartPolicy"] = json!("Always");
    ctx.kubectl
        .apply(
            &json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "store"},
            "spec": {"serviceName": "store", "replicas": 1, "selector": {"matchLabels": {"app": "store"}},
                "template": {"metadata": {"labels": {"app": "store"}}, "spec": object["spec"]},
                "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {"storageClassName": "manual",
                    "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}]}}),
        )
        .await?;
    let rollout = ["rollout", "status", "statefulset/store", "--timeout=150s"];
    ctx.kubectl.run(&rollout).await?;
    let first = ctx.ready("store-0").await?;
    ctx.exec("store-0", "echo kept > /data/file").await?;
    ctx.kubectl.run(&["delete", "pod", "store-0"]).await?;
    let second = ctx
        .wait("store-0", "was replaced and is Ready", |pod| {
            pod["metadata"]["uid"] != first["metadata"]["uid"]
                && crate::cluster::condition(pod, "Ready") == "True"
        })
        .await?;
    same!(phase(&second), "Running", "{}", second["status"]);
    let seen = ctx
        .exec("store-0", "hostname; cat /data/file /data/starts")
        .await?;
    same!(
        seen,
        "store-0\nkept\nstarted\nstarted\n",
        "data of the claim"
    );
    Ok(())
}
