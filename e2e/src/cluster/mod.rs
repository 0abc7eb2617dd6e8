//! A one-node Kubernetes cluster with boxlite-cri as its only runtime: `make cluster`, `make test-cluster`,
//! `make bench-cluster`, `make test-agents` and `make conformance-cluster`. [`chart`] and [`host_pods`] have other nodes.
//!
//! All components are processes in this program's namespaces. The programs come from e2e/scripts/cluster-build.

mod agents;
mod bench;
mod cases;
mod certificates;
mod chart;
mod conformance;
mod context;
mod control_plane;
mod host_pods;
mod images;
mod kubectl;
mod node_programs;
mod pods;
mod programs;
mod worker;

use crate::cgroups::CgroupRoot;
use crate::failure::{During, Result};
use crate::image::registry::Registry;
use crate::install::Install;
use crate::{ensure, poll, runner};
use control_plane::ControlPlane;
use programs::Programs;
use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use worker::{Setup, Worker};

/// Name of the node.
const NODE: &str = "node";
/// Address of the node.
const NODE_IP: &str = "192.0.2.10";
/// Range of the services.
const SERVICES: &str = "10.96.0.0/16";
/// Address of the API server's service.
const CLUSTER_IP: &str = "10.96.0.1";
/// Address of the DNS service.
const DNS_IP: &str = "10.96.0.10";
/// Interval between two runs of kubectl.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// Limit of a health request.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(5);

/// Use of the cluster.
#[derive(Debug, Clone, clap::Subcommand)]
pub(crate) enum Action {
    /// Opens a shell with KUBECONFIG, or runs a command in one.
    Shell {
        /// Shell command to run instead of an interactive shell.
        #[arg(long)]
        command: Option<String>,
    },
    /// Runs the project's cases.
    Test {
        /// Run only the cases whose name contains this text.
        #[arg(long, default_value = "")]
        filter: String,
        /// Write the results as JUnit XML into this directory.
        #[arg(long, value_name = "DIRECTORY")]
        junit: Option<PathBuf>,
    },
    /// Measures Deployments on boxlite-cri and on containerd with runc.
    Bench,
    /// Runs agent-sandbox and measures its claims.
    Agents(agents::Options),
    /// Tests the Helm chart on a node with a stock containerd.
    Chart(chart::Options),
    /// Tests a node that runs its system components in containerd.
    HostPods,
    /// Runs Kubernetes' own test suite.
    Conformance(conformance::Options),
}

/// Running cluster. Its processes end when it is dropped.
pub(crate) struct Cluster {
    /// Directory of all its files.
    pub dir: PathBuf,
    /// Programs of the cluster.
    pub programs: Programs,
    /// Control plane and kubectl.
    pub plane: ControlPlane,
    /// Runtime, kubelet and the other processes of the node.
    pub worker: Worker,
    /// Registry of all images.
    pub registry: Registry,
}

/// Brings up the cluster and performs the action. Returns true if it succeeded.
pub(crate) async fn run(action: &Action) -> Result<bool> {
    match action {
        Action::Chart(options) => return chart::run(options).await,
        Action::HostPods => return host_pods::run().await,
        _ => {}
    }
    let begun = Instant::now();
    let setup = Setup {
        pool: matches!(action, Action::Agents(_)).then_some(agents::POOL),
        ..Setup::default()
    };
    let cluster = Cluster::start(matches!(action, Action::Conformance(_)), &setup).await?;
    println!(
        "cluster: node Ready after {:.0} s",
        begun.elapsed().as_secs_f64()
    );
    match action {
        Action::Shell { command } => cluster.shell(command.as_deref()),
        Action::Test { filter, junit } => {
            let options = runner::Options {
                title: "cluster",
                filter,
                junit: junit.as_ref().map(|dir| dir.join("e2e-cluster.xml")),
            };
            let ctx = Arc::new(context::ClusterContext::build(cluster).await?);
            runner::run(&ctx, &options, cases::all()).await
        }
        Action::Bench => bench::run(&cluster).await,
        Action::Agents(options) => agents::run(&cluster, options).await,
        Action::Conformance(options) => conformance::run(&cluster, options).await,
        Action::Chart(_) | Action::HostPods => Ok(false),
    }
}

impl Cluster {
    async fn start(suite: bool, setup: &Setup<'_>) -> Result<Self> {
        let dir = crate::namespaces::scratch();
        let install = Install::find()?;
        let programs = Programs::find()?;
        let cgroups = CgroupRoot::enter(&dir)?;
        worker::prepare(&dir).during("failed to prepare the node")?;
        let registry = Registry::start(&install.registry, &dir, 5000, false).await?;
        images::push(&registry, &install.busybox, &programs, suite)
            .await
            .during("failed to push the images")?;
        let plane = ControlPlane::start(&dir, &programs).await?;
        let worker = Worker::start(
            &dir, &install, &programs, &plane, &registry, &cgroups, setup,
        )
        .await?;
        Ok(Self {
            dir,
            programs,
            plane,
            worker,
            registry,
        })
    }

    /// Runs a shell with kubectl in PATH and waits for its end.
    fn shell(&self, command: Option<&str>) -> Result<bool> {
        println!(
            "logs in {}; images in the registry at 127.0.0.1:5000: busybox:1, agnhost:1. The cluster ends with this shell.",
            self.dir.display()
        );
        let mut shell = std::process::Command::new("bash");
        if let Some(command) = command {
            shell.args(["-c", command]);
        }
        let path = std::env::var("PATH").unwrap_or_default();
        let status = shell
            .env("KUBECONFIG", &self.plane.kubectl.kubeconfig)
            .env("PATH", format!("{}:{path}", self.programs.bin().display()))
            .status()
            .during("bash")?;
        Ok(status.success())
    }
}

/// Returns the names of the cluster's cases.
#[cfg(test)]
pub(crate) fn case_names() -> Vec<&'static str> {
    cases::all().iter().map(|case| case.name()).collect()
}

/// Repeats `look`, which runs kubectl, until it returns a value; see [`poll::until`].
async fn until<T, F, Fut>(what: &str, limit: Duration, look: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    poll::until_every(POLL_INTERVAL, what, limit, look).await
}

/// Fails unless a GET of `url` succeeds. The certificate is not verified: the components make their own.
async fn healthy(url: &str) -> Result {
    let client = reqwest::Client::builder()
        .no_proxy()
        .tls_danger_accept_invalid_certs(true)
        .timeout(HEALTH_TIMEOUT)
        .build()?;
    let status = client.get(url).send().await?.status();
    ensure!(status.is_success(), "{url}: {status}");
    Ok(())
}

/// Returns the status of a condition of an object, or an empty string.
fn condition(object: &Value, kind: &str) -> String {
    let list = object["status"]["conditions"].as_array();
    list.and_then(|list| list.iter().find(|c| c["type"] == kind))
        .and_then(|c| c["status"].as_str())
        .unwrap_or_default()
        .to_owned()
}
