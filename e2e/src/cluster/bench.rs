//! `make bench-cluster`: time from the creation of a Deployment until all its pods are Ready, on boxlite-cri and on a stock
//! containerd with runc, under the same kubelet in turns. Prints a table and writes no file.

use super::images::{PAUSE, push_pause};
use super::pods::{IDLE, script};
use super::worker::registries;
use super::{Cluster, until};
use crate::bench::table::{Series, ms};
use crate::containerd::stock;
use crate::ensure;
use crate::failure::Result;
use crate::install::Install;
use crate::node::{Node, write_mirrors};
use crate::service::Service;
use k8s_cri::v1::VersionRequest;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// Replicas of a Deployment, and the number of rounds that measure it.
const SIZES: [(usize, usize); 3] = [(1, 3), (5, 3), (20, 1)];
/// Time limit for the pods of a Deployment to become Ready or to disappear.
const DEPLOYMENT_TIMEOUT: Duration = Duration::from_secs(900);
/// Name of the measured Deployment.
const NAME: &str = "measured";

/// Measures both runtimes and prints the table.
pub(super) async fn run(cluster: &Cluster) -> Result<bool> {
    let install = Install::find()?;
    push_pause(&cluster.registry, &install.busybox).await?;
    let (containerd, _service) = containerd(cluster, &install).await?;
    let mut client = containerd.cri.runtime();
    let version = client.version(VersionRequest::default()).await?;
    let version = version.into_inner().runtime_version;
    // The rest is the build of Debian's package.
    let version = version.split('+').next().unwrap_or_default();
    let sockets = [cluster.worker.node.socket(), containerd.dir.join("c.sock")];
    let mut samples = sockets.each_ref().map(|_| SIZES.map(|_| Vec::new()));
    let rounds = SIZES.iter().map(|(_, rounds)| *rounds).max().unwrap_or(0);
    for round in 0..rounds {
        for (socket, samples) in sockets.iter().zip(&mut samples) {
            connect(cluster, socket).await?;
            if round == 0 {
                // Pulls the images; not measured.
                deploy(cluster, 1).await?;
            }
            for ((replicas, rounds), samples) in SIZES.into_iter().zip(samples) {
                if round < rounds {
                    samples.push(ms(deploy(cluster, replicas).await?));
                }
            }
        }
    }
    let runc = format!("containerd {version}, runc");
    println!("seconds from the creation of a Deployment until all pods are Ready: median (all)");
    println!(
        "{:>8} {:>28} {runc:>28} {:>6}",
        "replicas", "boxlite-cri", "ratio"
    );
    let [ours, theirs] = samples;
    for (((replicas, _), ours), theirs) in SIZES.into_iter().zip(ours).zip(theirs) {
        let ratio = Series::new(ours.clone()).median() / Series::new(theirs.clone()).median();
        println!(
            "{replicas:>8} {:>28} {:>28} {ratio:>6.1}",
            cell(ours),
            cell(theirs)
        );
    }
    Ok(true)
}

fn cell(samples: Vec<f64>) -> String {
    let seconds = |ms: &f64| format!("{:.1}", ms / 1000.0);
    let all: Vec<_> = samples.iter().map(seconds).collect();
    format!(
        "{} ({})",
        seconds(&Series::new(samples).median()),
        all.join(", ")
    )
}

/// Makes the kubelet use the runtime at `socket`, and waits until the node is Ready with it.
async fn connect(cluster: &Cluster, socket: &Path) -> Result {
    let endpoint = json!({"containerRuntimeEndpoint": format!("unix://{}", socket.display())});
    cluster.worker.restart_kubelet(&endpoint).await?;
    cluster.worker.ready(&cluster.plane.kubectl).await
}

/// Creates the Deployment, waits until its pods are Ready, and removes it. Returns the time until Ready.
async fn deploy(cluster: &Cluster, replicas: usize) -> Result<Duration> {
    let kubectl = &cluster.plane.kubectl;
    let mut pod: Value = script("unused", IDLE);
    pod["spec"]["restartPolicy"] = json!("Always");
    let begun = Instant::now();
    kubectl
        .apply(
            &json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": NAME},
            "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": NAME}}, "template": {
                "metadata": {"labels": {"app": NAME}}, "spec": pod["spec"]}}}),
        )
        .await?;
    let name = format!("deployment/{NAME}");
    let wait = ["rollout", "status", &name, "--timeout=200s"];
    until("all pods are Ready", DEPLOYMENT_TIMEOUT, || {
        kubectl.run(&wait)
    })
    .await?;
    let took = begun.elapsed();
    kubectl.run(&["delete", &name]).await?;
    until("all pods are removed", DEPLOYMENT_TIMEOUT, || async {
        let pods = kubectl.json(&["get", "pods"]).await?;
        ensure!(
            pods["items"].as_array().is_some_and(Vec::is_empty),
            "pods remain"
        );
        Ok(())
    })
    .await?;
    Ok(took)
}

/// Starts a containerd 2.x with runc.
async fn containerd(cluster: &Cluster, install: &Install) -> Result<(Node, Service)> {
    let dir = cluster.dir.join("rc");
    std::fs::create_dir_all(dir.join("cni"))?;
    std::fs::write(dir.join("cni/10-bench.conflist"), conflist(&dir))?;
    write_mirrors(&dir.join("certs.d"), &registries(&cluster.registry))?;
    let tables = r#"[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2""#;
    let config = dir.join("config.toml");
    let text = stock::configuration(&dir, &install.cni, PAUSE, "", tables);
    std::fs::write(&config, text)?;
    let service = Service::new("containerd", dir.join("containerd.log"));
    let node = stock::serve(&service, &config, &[]).await?;
    Ok((node, service))
}

fn conflist(dir: &Path) -> String {
    json!({"cniVersion": "1.0.0", "name": "bench", "plugins": [
        {"type": "bridge", "bridge": "bxrunc", "isGateway": true, "ipMasq": true, "hairpinMode": true,
         "ipam": {"type": "host-local", "dataDir": dir.join("ipam"), "ranges": [[{"subnet": "10.89.0.0/16"}]],
                  "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}
    ]})
    .to_string()
}
