//! Services through kube-proxy, DNS, host ports.

use crate::cases::network::get;
use crate::cluster::NODE_IP;
use crate::cluster::context::{ClusterContext, POD_TIMEOUT, phase};
use crate::cluster::pods::{self, IDLE, pod, script};
use crate::cluster::until;
use crate::failure::Result;
use crate::runner::Case;
use crate::{case, ensure, same};
use serde_json::{Value, json};
use std::sync::Arc;

type Context = Arc<ClusterContext>;

pub(super) fn cases() -> Vec<Case<ClusterContext>> {
    vec![
        case!(service_is_reached_from_pod_and_node, 300),
        case!(dns_resolves_services_and_search_paths, 240),
        case!(host_ports_differ_by_protocol_and_address, 240),
        case!(deployment_is_scaled_and_rolled, 400),
    ]
}

/// Script of a web server that answers with the pod's name.
const SERVE: &str = "mkdir /www; hostname > /www/index.html; exec httpd -f -p 8080 -h /www";

/// Waits until an HTTP server at `address` answers with this page.
async fn answers(address: &str, page: &str) -> Result {
    until(&format!("{page} from {address}"), POD_TIMEOUT, || async {
        let text = get(address, "/index.html").await?;
        ensure!(text.ends_with(&format!("\n{page}\n")), "{text:?}");
        Ok(())
    })
    .await
}

fn service(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8080}]}})
}

async fn cluster_ip(ctx: &Context, name: &str) -> Result<String> {
    let object = ctx.kubectl.json(&["get", "service", name]).await?;
    Ok(object["spec"]["clusterIP"]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

/// The client is another pod, the server's pod itself (hairpin), and a process of the node.
async fn service_is_reached_from_pod_and_node(ctx: Context) -> Result {
    ctx.kubectl.apply(&service("server")).await?;
    ctx.run_pod(&script("server", SERVE)).await?;
    ctx.run_pod(&script("client", IDLE)).await?;
    let ip = cluster_ip(&ctx, "server").await?;
    answers(&format!("{ip}:80"), "server").await?;
    for client in ["client", "server"] {
        for host in [ip.as_str(), "server.cases.svc.cluster.local"] {
            // Debian's busybox crashes in wget's own -T.
            let answer = ctx
                .exec(client, &format!("timeout 20 wget -q -O - http://{host}/"))
                .await?;
            same!(answer, "server\n", "answer of {host} to {client}");
        }
    }
    Ok(())
}

async fn dns_resolves_services_and_search_paths(ctx: Context) -> Result {
    let look = "for name in kubernetes.default server server.cases.svc.cluster.local; do \
        nslookup $name > /tmp/out 2>&1 && echo $name ok || { echo $name; cat /tmp/out; }; done; \
        nslookup no-such.cases.svc.cluster.local > /dev/null 2>&1 || echo absent; \
        grep -c 10.96.0.10 /etc/resolv.conf; hostname; grep -w asker /etc/hosts";
    ctx.kubectl.apply(&service("server")).await?;
    // busybox's nslookup ignores search domains of names with dots; ping resolves as libc does.
    let look = look.replace(
        "kubernetes.default server ",
        "kubernetes.default.svc.cluster.local ",
    );
    let libc = "for name in kubernetes.default server; do ping -c 1 -W 1 $name 2>&1 | grep -o 'PING [a-z.]*'; done";
    let done = ctx
        .finish_pod(&script("asker", &format!("{look}; {libc}")))
        .await?;
    same!(phase(&done), "Succeeded", "{}", done["status"]);
    // The kubelet writes a line for each address of the pod.
    let addresses = done["status"]["podIPs"].as_array();
    let hosts: String = addresses
        .into_iter()
        .flatten()
        .filter_map(|address| address["ip"].as_str())
        .map(|address| format!("{address}\tasker\n"))
        .collect();
    ensure!(!hosts.is_empty(), "no address: {}", done["status"]);
    let expected = format!(
        "kubernetes.default.svc.cluster.local ok\nserver.cases.svc.cluster.local ok\nabsent\n1\nasker\n{hosts}\
         PING kubernetes.default\nPING server\n"
    );
    same!(ctx.logs("asker").await?, expected, "names in the pod");
    Ok(())
}

/// Pods that share a port number on different addresses or protocols run side by side, as one that asks for a used one does not.
async fn host_ports_differ_by_protocol_and_address(ctx: Context) -> Result {
    let with = |name: &str, port: Value| {
        let mut main = pods::container("main", SERVE);
        main["ports"] = json!([port]);
        pod(name, &[main])
    };
    ctx.run_pod(&with(
        "one",
        json!({"containerPort": 8080, "hostPort": 31080, "hostIP": NODE_IP}),
    ))
    .await?;
    ctx.run_pod(&with(
        "two",
        json!({"containerPort": 8080, "hostPort": 31080, "hostIP": "127.0.0.1"}),
    ))
    .await?;
    ctx.run_pod(&with(
        "three",
        json!({"containerPort": 8080, "hostPort": 31080, "hostIP": NODE_IP, "protocol": "UDP"}),
    ))
    .await?;
    answers(&format!("{NODE_IP}:31080"), "one").await?;
    let ip = ctx.pod("three").await?["status"]["podIP"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    answers(&format!("{ip}:8080"), "three").await
}

async fn deployment_is_scaled_and_rolled(ctx: Context) -> Result {
    let spec = |version: &str| {
        let mut object = script("unused", SERVE);
        object["spec"]["restartPolicy"] = json!("Always");
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "server"},
            "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "server"}}, "template": {
                "metadata": {"labels": {"app": "server", "version": version}}, "spec": object["spec"]}}})
    };
    ctx.kubectl.apply(&spec("1")).await?;
    let wait = ["rollout", "status", "deployment/server", "--timeout=150s"];
    ctx.kubectl.run(&wait).await?;
    ctx.kubectl
        .run(&["scale", "deployment/server", "--replicas=3"])
        .await?;
    ctx.kubectl.run(&wait).await?;
    ctx.kubectl.apply(&spec("2")).await?;
    ctx.kubectl.run(&wait).await?;
    until("only pods of the new version", POD_TIMEOUT, || async {
        let list = ctx.kubectl.json(&["get", "pods"]).await?;
        let versions: Vec<_> = list["items"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|p| {
                p["metadata"]["labels"]["version"]
                    .as_str()
                    .unwrap_or_default()
            })
            .collect();
        same!(versions, ["2", "2"], "versions");
        Ok(())
    })
    .await
}
