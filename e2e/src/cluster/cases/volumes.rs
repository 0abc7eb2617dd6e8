//! Volumes as a kubelet makes them: configMap, secret, projected, downwardAPI, emptyDir of both media, subPath, hostPath.

use crate::cluster::context::{ClusterContext, POD_TIMEOUT, phase};
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
