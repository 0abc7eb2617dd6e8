//! `make demo`: a pod from pull to removal, with explanatory output.
//!
//! Checks every step: the demo fails like a test, also if anything leaks.

use crate::cases::network::{get, served};
use crate::client::{answer, within};
use crate::failure::{During, Result};
use crate::image::registry::Registry;
use crate::image::set::ImageSet;
use crate::install::Install;
use crate::leak::LeakSnapshot;
use crate::node::Node;
use crate::pod::{Container, LONG_TIMEOUT, Pod, pod_spec};
use crate::{ensure, poll};
use k8s_cri::v1::*;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A table row: name and duration in milliseconds.
type Stage = (String, f64);

/// Runs the demo. Returns true if every check passed.
pub(crate) async fn run() -> Result<bool> {
    let scratch = crate::namespaces::scratch();
    let install = Install::find()?;
    title("A registry on loopback, with images made from Debian's busybox");
    let registry = Registry::start(&install.registry, &scratch, 5000, false).await?;
    let images = ImageSet::push(&registry, &install.busybox)
        .await
        .during("failed to push the images")?;
    say(&format!(
        "{}   an OCI index, a foreign platform first",
        images.base
    ));
    say(&format!("{}   second layer is zstd", images.zstd));

    title("boxlite-cri serve, vmm = \"auto\"");
    let options = crate::context::options("demo", "auto", &registry);
    let node = Arc::new(Node::start(&scratch, &install, &options).await?);
    say(&format!(
        "serving on {}",
        node.dir.join("cri.sock").display()
    ));
    for line in node
        .log_tail(200)
        .lines()
        .filter(|l| l.contains("vmm") || l.contains("kvm"))
        .take(3)
    {
        say(line.trim());
    }
    let before = LeakSnapshot::take(&node)?;

    let mut stages = Vec::new();
    title("PullImage");
    for reference in [&images.base, &images.zstd] {
        let start = Instant::now();
        pull_with_progress(&node, reference).await?;
        stages.push((format!("PullImage {reference}"), ms(start)));
    }
    let pod = start_pod(&node, &mut stages).await?;
    let web = look(&pod, &images, &mut stages).await?;
    measure(&pod, &web).await?;
    let internal = pod.status_verbose(true).await?.info;

    title("StopPodSandbox and RemovePodSandbox");
    let start = Instant::now();
    pod.stop().await?;
    stages.push(("StopPodSandbox".into(), ms(start)));
    let start = Instant::now();
    pod.remove().await?;
    stages.push(("RemovePodSandbox".into(), ms(start)));
    say("both succeeded");

    title("The start, stage by stage");
    stages.extend(layer_stages(&node.log_tail(1000)));
    stages.extend(inner_stages(&internal));
    for (name, ms) in &stages {
        println!("    {name:<44} {ms:>9.1} ms");
    }
    title("Leak check");
    say(&format!("before: {}", before.counts()));
    let after = before.restored(&node).await?;
    say(&format!("after:  {}", after.counts()));
    say("the pod left no process, mount, namespace, cgroup, interface, lease or socket");
    node.terminate().await?;
    println!("\nDemo passed.");
    Ok(true)
}

fn title(text: &str) {
    println!("\n== {text}");
}

fn say(text: &str) {
    println!("    {text}");
}

fn show(text: &str) {
    for line in text.lines() {
        println!("    | {line}");
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// Pulls an image and prints the growth of the image store, since CRI has no progress reports.
async fn pull_with_progress(node: &Arc<Node>, reference: &str) -> Result {
    let call = tokio::spawn({
        let (node, reference) = (node.clone(), reference.to_owned());
        async move { crate::pod::pull(&node, &reference).await }
    });
    let mut last = 0;
    while !call.is_finished() {
        let info = answer(
            "ImageFsInfo",
            node.cri.image().image_fs_info(ImageFsInfoRequest {}).await,
        )?;
        let used = info
            .image_filesystems
            .iter()
            .filter_map(|f| f.used_bytes)
            .map(|u| u.value)
            .sum();
        if used != last {
            say(&format!(
                "{reference}: {:.2} MiB in the image store",
                used as f64 / 1_048_576.0
            ));
            last = used;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let id = call.await??;
    say(&format!("{reference} is pulled: {id}"));
    Ok(())
}

async fn start_pod(node: &Arc<Node>, stages: &mut Vec<Stage>) -> Result<Pod> {
    title("RunPodSandbox: CNI (bridge, host-local, portmap), then a VM");
    let mut config = pod_spec(node, "demo");
    config.port_mappings = vec![PortMapping {
        protocol: Protocol::Tcp.into(),
        container_port: 80,
        host_port: 8080,
        host_ip: String::new(),
    }];
    let start = Instant::now();
    let pod = Pod::run_with(node, config).await?;
    stages.push(("RunPodSandbox".into(), ms(start)));
    let network = pod.status().await?.network.unwrap_or_default();
    let more: Vec<_> = network
        .additional_ips
        .iter()
        .map(|ip| ip.ip.as_str())
        .collect();
    say(&format!(
        "pod {} is READY at {} {}",
        &pod.id[..13],
        network.ip,
        more.join(" ")
    ));
    Ok(pod)
}

async fn timed(
    pod: &Pod,
    name: &str,
    image: &str,
    argv: &[&str],
    stages: &mut Vec<Stage>,
) -> Result<Container> {
    let start = Instant::now();
    let container = pod.create(name, image, argv).await?;
    stages.push((format!("CreateContainer {name}"), ms(start)));
    let start = Instant::now();
    container.start().await?;
    stages.push((format!("StartContainer {name}"), ms(start)));
    Ok(container)
}

async fn look(pod: &Pod, images: &ImageSet, stages: &mut Vec<Stage>) -> Result<Container> {
    title("Two containers in it");
    let script = "echo kernel $(uname -r); echo hostname $(hostname); ip -o addr | grep -v ' lo ' | cut -c1-60";
    let info = timed(pod, "info", &images.zstd, &["sh", "-c", script], stages).await?;
    let web = timed(
        pod,
        "web",
        &images.base,
        &["httpd", "-f", "-p", "80", "-h", "/var/www"],
        stages,
    )
    .await?;
    let status = info.exited(Duration::from_secs(30)).await?;
    ensure!(
        status.exit_code == 0,
        "the first container ended with {}",
        status.exit_code
    );
    say(&format!(
        "the host's kernel is {}, the log file of \"info\" says:",
        crate::namespaces::run("uname", &["-r"])?.trim()
    ));
    show(&std::fs::read_to_string(info.log())?);
    let output = info.output()?;
    ensure!(
        output.contains("kernel ") && output.contains("hostname demo"),
        "{output}"
    );

    title("ExecSync in \"web\"");
    let start = Instant::now();
    let listing = web
        .out(&["sh", "-c", "cat /proc/1/comm; cat /proc/loadavg"])
        .await?;
    stages.push(("ExecSync".into(), ms(start)));
    show(&listing);

    title("HTTP from the host: the pod's address, then the node's port 8080");
    let ip = pod.ip().await?;
    served(&format!("{ip}:80"), Duration::from_secs(10)).await?;
    show(
        get(&format!("{ip}:80"), "/index.html")
            .await?
            .lines()
            .last()
            .unwrap_or_default(),
    );
    let gateway = ip
        .rsplit_once('.')
        .map(|(net, _)| format!("{net}.1"))
        .unwrap_or_default();
    served(&format!("{gateway}:8080"), Duration::from_secs(10)).await?;
    say(&format!("http://{gateway}:8080 answers the same"));

    Ok(web)
}

/// Prints ContainerStats and the Prometheus page.
async fn measure(pod: &Pod, web: &Container) -> Result {
    title("ContainerStats, from the guest's cgroup");
    let stats = poll::until("CPU time", Duration::from_secs(10), || async {
        let stats = web.stats().await?;
        let used = stats
            .cpu
            .and_then(|c| c.usage_core_nano_seconds)
            .unwrap_or_default()
            .value;
        ensure!(used > 0, "no CPU time");
        Ok(stats)
    })
    .await?;
    let cpu = stats
        .cpu
        .and_then(|c| c.usage_core_nano_seconds)
        .unwrap_or_default()
        .value;
    let memory = stats
        .memory
        .and_then(|m| m.working_set_bytes)
        .unwrap_or_default()
        .value;
    say(&format!(
        "web: {:.1} ms of CPU, working set {} KiB",
        cpu as f64 / 1e6,
        memory / 1024
    ));
    answer(
        "ListContainerStats",
        pod.node
            .cri
            .runtime()
            .list_container_stats(within(LONG_TIMEOUT, ListContainerStatsRequest::default()))
            .await,
    )?;

    title("Part of the Prometheus page");
    let page = pod.node.metrics_page().await?;
    let lines: Vec<_> = page
        .lines()
        .filter(|l| l.contains("boxlite") && !l.starts_with('#') && !l.contains("_bucket"))
        .take(14)
        .collect();
    ensure!(!lines.is_empty(), "no boxlite metric on the page");
    show(&lines.join("\n"));
    Ok(())
}

/// Returns the stages in the verbose info of PodSandboxStatus: `"startStages": [{"stage", "ms"}]`.
fn inner_stages(info: &std::collections::HashMap<String, String>) -> Vec<Stage> {
    let values = info
        .values()
        .filter_map(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    let stages = values
        .filter_map(|value| value.get("startStages")?.as_array().cloned())
        .flatten();
    stages
        .filter_map(|s| {
            Some((
                format!("  {}", s.get("stage")?.as_str()?),
                s.get("ms")?.as_f64()?,
            ))
        })
        .collect()
}

/// Returns the stages of each layer from the registry to an EROFS file, from the daemon's log.
fn layer_stages(log: &str) -> Vec<Stage> {
    let field =
        |line: &str, name: &str| Some(line.split(name).nth(1)?.split(' ').next()?.to_owned());
    log.lines()
        .filter(|line| line.contains("layer downloaded and converted"))
        .filter_map(|line| {
            let layer: String = field(line, "layer=")?.chars().take(19).collect();
            Some((
                format!("  layer to EROFS {layer}"),
                field(line, "milliseconds=")?.parse().ok()?,
            ))
        })
        .collect()
}
