//! `make bench-peers`: the same pods by boxlite-cri and by other runtimes, interleaved in one run.
//!
//! Every peer is driven through its CRI socket by the same client, with the same CNI plugins, image and registry, and all
//! state on tmpfs. A peer that cannot run is listed with the reason.

use super::life;
use super::table::{Series, ms};
use crate::containerd::stock;
use crate::failure::{During, Failure, Result};
use crate::image::build::Image;
use crate::image::registry::Registry;
use crate::image::set::ImageSet;
use crate::install::{self, Install};
use crate::namespaces::run as command;
use crate::node::{Node, write_mirrors};
use crate::pod::{Pod, pull};
use crate::process::{pids, pss};
use crate::service::Service;
use crate::{bail, ensure};
use boxlite_sys::proc_memory::meminfo;
use k8s_cri::v1::{ImageSpec, RemoveImageRequest};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Name and tag of the pause image of containerd.
const PAUSE: (&str, &str) = ("pause", "1");

/// A runtime under measurement.
struct Peer {
    name: String,
    node: Arc<Node>,
    /// Process of a daemon that is not the node's.
    _service: Option<Service>,
}

/// Samples of one peer.
#[derive(Default)]
struct Samples {
    calls: Vec<Vec<f64>>,
    pulls: Vec<f64>,
}

/// Measures all peers that can run with `count` pods each, one after another and at once, and prints the tables.
pub(crate) async fn run(count: usize) -> Result {
    let scratch = crate::namespaces::scratch();
    let install = Install::find()?;
    let registry = Registry::start(&install.registry, &scratch, 5000, false).await?;
    let images = ImageSet::push(&registry, &install.busybox).await?;
    let pause = Image::new(
        vec![images.busybox.clone()],
        json!({"Cmd": ["sleep", "2147483647"], "Env": ["PATH=/bin"]}),
    );
    registry.push(PAUSE.0, PAUSE.1, &pause).await?;

    let options = crate::context::options("b", "auto", &registry);
    let node = Arc::new(Node::start(&scratch, &install, &options).await?);
    let mut peers = vec![Peer {
        name: "boxlite-cri".to_owned(),
        node,
        _service: None,
    }];
    let mut absent = Vec::new();
    for runtime in [Runtime::Runc, Runtime::Runsc] {
        match runtime.start(&scratch, &install, &registry).await {
            Ok(peer) => peers.push(peer),
            Err(reason) => absent.push((runtime.name(), reason.to_string())),
        }
    }
    absent.push(("BoxLite (its own release)", boxlite_reason()));
    super::machine("see PodSandboxStatus")?;
    for (name, reason) in &absent {
        println!("not measured: {name}: {reason}");
    }

    let mut samples: Vec<Samples> = peers.iter().map(|_| Samples::default()).collect();
    for peer in &peers {
        pull(&peer.node, &images.base).await.during(&peer.name)?;
        life::run(&peer.node, &images.base, false)
            .await
            .during(format!("{}: first pod", peer.name))?;
    }
    for round in 0..count {
        for turn in 0..peers.len() {
            // Rotated, so that no peer always follows the same one.
            let at = (round + turn) % peers.len();
            measure(&peers[at], &images.base, &mut samples[at])
                .await
                .during(&peers[at].name)?;
        }
    }
    print(&peers, &samples, count);
    for peer in &peers {
        at_once(peer, &images.base, count)
            .await
            .during(&peer.name)?;
    }
    Ok(())
}

async fn measure(peer: &Peer, image: &str, samples: &mut Samples) -> Result {
    let remove = RemoveImageRequest {
        image: Some(ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        }),
    };
    peer.node.cri.image().remove_image(remove).await?;
    let start = Instant::now();
    pull(&peer.node, image).await?;
    samples.pulls.push(ms(start.elapsed()));
    let costs = life::run(&peer.node, image, false).await?;
    samples.calls.resize(costs.len(), Vec::new());
    for (series, cost) in samples.calls.iter_mut().zip(costs) {
        series.push(ms(cost.time));
    }
    Ok(())
}

/// Prints median, 99th percentile and the ratio to the first other peer.
fn print(peers: &[Peer], samples: &[Samples], count: usize) {
    let name = |peer: &Peer| peer.name.clone();
    println!("\nms: median / p99 of {count}; ratio of boxlite-cri's median to the peer's");
    print!("{:<36}", "");
    for peer in peers {
        print!(" {:>28}", name(peer));
    }
    println!();
    let row = |label: &str, of: &dyn Fn(&Samples) -> Vec<f64>| {
        print!("{label:<36}");
        let ours = Series::new(of(&samples[0])).median();
        for (at, peer) in samples.iter().enumerate() {
            let series = Series::new(of(peer));
            let ratio = match at {
                0 => String::new(),
                _ => format!("{:.2}", ours / series.median()),
            };
            let cell = format!("{:.1} / {:.1}", series.median(), series.quantile(99));
            print!(" {cell:>21} {ratio:>6}");
        }
        println!();
    };
    for (at, call) in life::CALLS.iter().enumerate() {
        row(call, &|samples| samples.calls[at].clone());
    }
    row("PullImage", &|samples| samples.pulls.clone());
}

/// Starts pods with one container each at once; prints the time to all running and the memory of each idle pod.
async fn at_once(peer: &Peer, image: &str, count: usize) -> Result {
    let (before, free) = (all_pss()?, available()?);
    let start = Instant::now();
    let starting = (0..count).map(|_| async {
        let pod = Pod::run(&peer.node, "idle").await?;
        pod.start("c", image, &["sleep", "1000"]).await?;
        Ok::<_, Failure>(pod)
    });
    let pods = futures::future::join_all(starting).await;
    let took = start.elapsed();
    let (held, used) = (all_pss()?.saturating_sub(before), available()?);
    let mib = |kib: u64| kib as f64 / 1024.0 / count as f64;
    println!(
        "{}: {count} pods at once: {:.1} s; of each idle pod: PSS {:.1} MiB, MemAvailable {:.1} MiB",
        peer.name,
        took.as_secs_f64(),
        mib(held),
        mib(free.saturating_sub(used))
    );
    let pods = pods.into_iter().collect::<Result<Vec<_>>>()?;
    let ended = futures::future::join_all(pods.iter().map(Pod::end)).await;
    ended.into_iter().collect()
}

/// Returns the PSS of all processes of this PID namespace in KiB.
fn all_pss() -> Result<u64> {
    Ok(pids(&[])?.into_iter().map(pss).sum())
}

/// Returns MemAvailable in KiB.
pub(super) fn available() -> Result<u64> {
    match meminfo("MemAvailable") {
        Some(bytes) => Ok(bytes >> 10),
        None => bail!("MemAvailable not found in /proc/meminfo"),
    }
}

/// Returns the reason why BoxLite's own release is not measured.
fn boxlite_reason() -> String {
    if Path::new("/dev/kvm").exists() {
        "its SDK has no CRI, and this bench does not drive it".to_owned()
    } else {
        "it runs on KVM only, and there is no /dev/kvm".to_owned()
    }
}

/// An OCI runtime of containerd.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Runtime {
    Runc,
    /// gVisor with its platform systrap.
    Runsc,
}

impl Runtime {
    fn name(self) -> &'static str {
        match self {
            Self::Runc => "containerd + runc",
            Self::Runsc => "containerd + gVisor",
        }
    }

    /// Starts a containerd with this runtime as its default.
    async fn start(self, scratch: &Path, install: &Install, registry: &Registry) -> Result<Peer> {
        let gvisor = install::cache().join("gvisor");
        match self {
            Self::Runc => ensure!(on_path("runc"), "runc not found in PATH"),
            Self::Runsc => {
                ensure!(
                    gvisor.join("runsc").exists(),
                    "runsc not found in {}: run e2e/scripts/gvisor",
                    gvisor.display()
                );
            }
        }
        let dir = scratch.join(match self {
            Self::Runc => "rc",
            Self::Runsc => "gv",
        });
        std::fs::create_dir_all(dir.join("cni"))?;
        std::fs::write(dir.join("cni/10-bench.conflist"), self.conflist(&dir))?;
        let host = registry.host.clone();
        let server = format!("http://{host}");
        write_mirrors(&dir.join("certs.d"), &[(host, server, None)])?;
        let pause = format!("{}/{}:{}", registry.host, PAUSE.0, PAUSE.1);
        std::fs::write(dir.join("runsc.toml"), runsc_config(&gvisor))?;
        let config = dir.join("config.toml");
        std::fs::write(&config, self.config(&dir, install, &pause))?;
        let service = Service::new("containerd", dir.join("containerd.log"));
        let others: &[&Path] = match self {
            Self::Runc => &[],
            Self::Runsc => &[&gvisor],
        };
        let node = stock::serve(&service, &config, others).await?;
        let node = Arc::new(node);
        // A runtime that cannot run is found out now, not in the middle of the measurement.
        match Pod::run(&node, "trial").await {
            Ok(pod) => pod.end().await?,
            Err(error) => bail!("cannot run a pod: {error}"),
        }
        Ok(Peer {
            name: self.name().to_owned(),
            node,
            _service: Some(service),
        })
    }

    fn conflist(self, dir: &Path) -> String {
        let (bridge, subnet) = match self {
            Self::Runc => ("bxrunc", "10.89.0.0/16"),
            Self::Runsc => ("bxrunsc", "10.90.0.0/16"),
        };
        json!({"cniVersion": "1.0.0", "name": "bench", "plugins": [
            {"type": "bridge", "bridge": bridge, "isGateway": true, "ipMasq": true, "hairpinMode": true,
             "ipam": {"type": "host-local", "dataDir": dir.join("ipam"), "ranges": [[{"subnet": subnet}]],
                      "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}
        ]})
        .to_string()
    }

    fn config(self, dir: &Path, install: &Install, pause: &str) -> String {
        let at = dir.display();
        let runtime = match self {
            Self::Runc => "runtime_type = \"io.containerd.runc.v2\"".to_owned(),
            Self::Runsc => format!(
                "runtime_type = \"io.containerd.runsc.v1\"\n\
                 [plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.peer.options]\n\
                 TypeUrl = \"io.containerd.runsc.v1.options\"\nConfigPath = \"{at}/runsc.toml\""
            ),
        };
        let tables = format!(
            r#"[ttrpc]
address = "{at}/t.sock"
[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "peer"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.peer]
{runtime}"#
        );
        stock::configuration(dir, &install.cni, pause, "", &tables)
    }
}

fn runsc_config(gvisor: &Path) -> String {
    let runsc: PathBuf = gvisor.join("runsc");
    format!(
        "binary_name = \"{}\"\n[runsc_config]\nplatform = \"systrap\"\n",
        runsc.display()
    )
}

fn on_path(program: &str) -> bool {
    command("sh", &["-c", &format!("command -v {program}")]).is_ok()
}
