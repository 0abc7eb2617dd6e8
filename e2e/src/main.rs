//! boxlite-e2e: black-box tests, demo and bench of boxlite-cri on real VMs.
//!
//! Accesses the product by its programs, its CRI socket, its configuration file and the file system, and shares no code with
//! it: the CRI types are those of the crate k8s-cri. The whole program runs in separate namespaces ([`namespaces`]).

#![deny(unsafe_code)]

mod attack;
mod bench;
mod cases;
mod cgroups;
mod client;
mod cluster;
mod collector;
mod conformance;
mod containerd;
mod containerd_suite;
mod context;
mod demo;
mod disk;
mod event_stream;
mod ext4;
mod failure;
mod image;
mod install;
mod junit;
mod leak;
mod lister;
mod logs;
#[allow(unsafe_code)]
mod mapped_file;
mod namespaces;
mod node;
mod nri;
mod otel_collector;
mod packages;
mod pod;
mod poll;
mod probe;
mod process;
mod prometheus;
mod runner;
mod service;
mod stream;
#[cfg(test)]
mod tidy;
mod uplink;

use clap::{Args, Parser, Subcommand};
use namespaces::Stage;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

#[derive(Parser)]
#[command(about = "Black-box tests, demo and bench of boxlite-cri")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Options of both suites.
#[derive(Args)]
struct SuiteOptions {
    /// VMM, and the environment it needs.
    #[arg(long, value_enum, default_value = "qemu")]
    backend: context::Backend,
    /// Run only the cases whose name contains this text.
    #[arg(long, default_value = "")]
    filter: String,
    /// Write the results as JUnit XML into this directory.
    #[arg(long, value_name = "DIRECTORY")]
    junit: Option<PathBuf>,
}

impl SuiteOptions {
    /// Returns the runner's options for a run with this title; the report is `<title>.xml`.
    fn runner<'a>(&'a self, title: &'a str) -> runner::Options<'a> {
        runner::Options {
            title,
            filter: &self.filter,
            junit: self
                .junit
                .as_ref()
                .map(|directory| directory.join(format!("e2e-{}.xml", title.replace(' ', "-")))),
        }
    }
}

#[derive(Subcommand)]
enum Command {
    /// Shows a pod from pull to removal.
    Demo,
    /// Runs the end-to-end suite.
    Test {
        #[command(flatten)]
        suite: SuiteOptions,
        /// Print the names of the cases and exit.
        #[arg(long)]
        list: bool,
    },
    /// Runs the shim's suite under a stock containerd.
    Containerd {
        #[command(flatten)]
        suite: SuiteOptions,
        /// containerd version; 1.6 and 2 by default.
        #[arg(long, value_enum)]
        version: Option<containerd::Version>,
    },
    /// Brings up a Kubernetes cluster with boxlite-cri as its only runtime.
    Cluster {
        #[command(subcommand)]
        action: cluster::Action,
    },
    /// Installs, upgrades and purges the .deb in bootstrapped Debian systems.
    Packages(packages::Options),
    /// Measures pods.
    Bench {
        /// Subject of the measurement.
        #[arg(value_enum, default_value_t)]
        subject: bench::Subject,
        /// Idle pods whose memory is measured (default 5), or pods of each peer (default 10).
        #[arg(long)]
        pods: Option<usize>,
    },
    /// Creates and removes many pods, and compares the node with before.
    Churn(bench::churn::Options),
    /// Measures idle pods in growing numbers: memory, and the times of lists, statistics and scrapes.
    Density(bench::density::Options),
    /// Prints a directory tree as the running kernel sees it. Runs inside a guest.
    Tree {
        /// Root of the tree.
        directory: PathBuf,
    },
    /// Prints inotify events of a directory. Runs inside a guest.
    #[command(hide = true)]
    Events {
        /// Directory to watch.
        directory: PathBuf,
    },
    /// Follows a file by sendfile. Runs inside a guest.
    #[command(hide = true)]
    Splice {
        /// File to follow.
        file: PathBuf,
    },
    /// Prints the first byte of a mapped file when it changes. Runs inside a guest.
    #[command(hide = true)]
    MapRead {
        /// File to map.
        file: PathBuf,
    },
    /// Writes to a mapped file. Runs inside a guest.
    #[command(hide = true)]
    MapWrite {
        /// File to map.
        file: PathBuf,
    },
    /// Fails if a file is locked by flock. Runs inside a guest.
    #[command(hide = true)]
    TryLock {
        /// File to lock.
        file: PathBuf,
    },
    /// Prints a page fetched from a given source address. Runs inside a guest.
    #[command(hide = true)]
    GetFrom {
        /// Address to bind, IPv4 or IPv4-mapped.
        source: IpAddr,
        /// Address of the server, of the same family.
        target: SocketAddr,
    },
    /// Acts as a hostile guest kernel. Runs inside a guest.
    #[command(hide = true)]
    Attack {
        /// Target of the attack.
        #[arg(value_enum)]
        aim: attack::Aim,
        /// Paths of the host that must not be reached, or the number of the first queue.
        arguments: Vec<String>,
    },
    /// Serves as an NRI plugin on standard input. Launched by a daemon.
    #[command(hide = true)]
    NriPlugin {
        /// Directory for the plugin's records.
        notes: PathBuf,
    },
    /// Runs critest, the conformance suite of CRI runtimes.
    Conformance(conformance::Options),
    /// Runs containerd's CRI integration tests.
    ContainerdSuite(containerd_suite::Options),
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let result = match &command {
        Command::Tree { directory } => lister::run(directory).map(|()| ExitCode::SUCCESS),
        Command::Events { directory } => probe::events(directory).map(|()| ExitCode::SUCCESS),
        Command::Splice { file } => probe::splice(file).map(|()| ExitCode::SUCCESS),
        Command::MapRead { file } => probe::map_read(file).map(|()| ExitCode::SUCCESS),
        Command::MapWrite { file } => probe::map_write(file).map(|()| ExitCode::SUCCESS),
        Command::TryLock { file } => probe::try_lock(file).map(|()| ExitCode::SUCCESS),
        Command::GetFrom { source, target } => {
            probe::get_from(*source, *target).map(|()| ExitCode::SUCCESS)
        }
        Command::Attack { aim, arguments } => {
            attack::run(*aim, arguments).map(|()| ExitCode::SUCCESS)
        }
        Command::NriPlugin { notes } => nri_plugin(notes).map(|()| ExitCode::SUCCESS),
        Command::Test { list: true, .. } => {
            for case in cases::all() {
                println!("{}", case.name());
            }
            Ok(ExitCode::SUCCESS)
        }
        _ => match Stage::current() {
            Stage::Outside => namespaces::enter(),
            Stage::Init => namespaces::reap(),
            Stage::Inside => run(command),
        },
    };
    result.unwrap_or_else(|failure| {
        eprintln!("boxlite-e2e: {failure}");
        ExitCode::FAILURE
    })
}

fn nri_plugin(notes: &std::path::Path) -> failure::Result {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(nri::launched(notes))
}

/// Runs a command that needs the namespaces.
fn run(command: Command) -> failure::Result<ExitCode> {
    // reqwest is built without a default TLS provider.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let passed = match command {
        Command::Demo => runtime.block_on(demo::run())?,
        Command::Conformance(options) => runtime.block_on(conformance::run(&options))?,
        Command::Cluster { action } => runtime.block_on(cluster::run(&action))?,
        Command::ContainerdSuite(options) => runtime.block_on(containerd_suite::run(&options))?,
        Command::Packages(options) => packages::run(&options)?,
        Command::Bench { subject, pods } => runtime.block_on(bench::run(subject, pods))?,
        Command::Churn(options) => runtime
            .block_on(bench::churn::run(&options))
            .map(|()| true)?,
        Command::Density(options) => runtime
            .block_on(bench::density::run(&options))
            .map(|()| true)?,
        // Handled in `main`.
        Command::Tree { .. }
        | Command::Events { .. }
        | Command::Splice { .. }
        | Command::MapRead { .. }
        | Command::MapWrite { .. }
        | Command::TryLock { .. }
        | Command::GetFrom { .. }
        | Command::Attack { .. }
        | Command::NriPlugin { .. } => true,
        Command::Containerd { suite, version } => {
            runtime.block_on(containerd::run(&suite, version))?
        }
        Command::Test { suite, .. } => runtime.block_on(async {
            let ctx = Arc::new(context::TestContext::build(suite.backend).await?);
            runner::run(&ctx, &suite.runner(suite.backend.vmm()), cases::all()).await
        })?,
    };
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
