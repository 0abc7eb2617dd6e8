//! boxlite-e2e: black-box tests, demo and bench of boxlite-cri on real VMs.
//!
//! It knows the product by its programs, its CRI socket, its configuration file and the file system, and shares no code
//! with it: the CRI types are those of the crate k8s-cri. The whole program runs in namespaces of its own ([`enclave`]).

#![forbid(unsafe_code)]

mod bench;
mod cases;
mod client;
mod conformance;
mod containerd;
mod demo;
mod disk;
mod enclave;
mod ext4;
mod image;
mod install;
mod leak;
mod lister;
mod logs;
mod node;
mod nri;
mod outcome;
mod pod;
mod process;
mod runner;
mod service;
mod stream;
#[cfg(test)]
mod tidy;
mod wait;
mod world;

use clap::{Parser, Subcommand};
use enclave::Stage;
use std::process::ExitCode;
use std::sync::Arc;

#[derive(Parser)]
#[command(about = "Black-box tests, demo and bench of boxlite-cri")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Shows a pod from pull to removal.
    Demo,
    /// Runs the end-to-end suite in one home.
    Test {
        /// Which VMM.
        #[arg(long, value_enum, default_value = "qemu")]
        home: world::Home,
        /// Only cases whose name contains this.
        #[arg(long, default_value = "")]
        filter: String,
        /// Prints the names and ends.
        #[arg(long)]
        list: bool,
    },
    /// Runs the shim under a stock containerd.
    Containerd {
        /// Which VMM.
        #[arg(long, value_enum, default_value = "qemu")]
        home: world::Home,
        /// Which containerd; both if left out.
        #[arg(long, value_enum)]
        version: Option<containerd::Version>,
        /// Only cases whose name contains this.
        #[arg(long, default_value = "")]
        filter: String,
    },
    /// Ratios against a bare boot of the same VMM and kernel.
    Bench,
    /// Prints a tree as this kernel sees it. For use inside a guest.
    Tree {
        /// Its directory.
        directory: std::path::PathBuf,
    },
    /// Is an NRI plugin, on standard input. Launched by a daemon.
    #[command(hide = true)]
    NriPlugin {
        /// Where it leaves word.
        notes: std::path::PathBuf,
    },
    /// Runs critest, the conformance suite of CRI runtimes.
    Conformance(conformance::Options),
}

fn main() -> ExitCode {
    let args = Args::parse();
    // What needs no enclave.
    let done = match &args.command {
        Command::Tree { directory } => Some(lister::run(directory)),
        Command::NriPlugin { notes } => Some(nri_plugin(notes)),
        _ => None,
    };
    if let Some(done) = done {
        return match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => {
                eprintln!("boxlite-e2e: {failure}");
                ExitCode::FAILURE
            }
        };
    }
    let result = match Stage::current() {
        Stage::Outside => enclave::enter(),
        Stage::Init => enclave::reap(),
        Stage::Inside => work(args),
    };
    result.unwrap_or_else(|failure| {
        eprintln!("boxlite-e2e: {failure}");
        ExitCode::FAILURE
    })
}

fn nri_plugin(notes: &std::path::Path) -> outcome::Result {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(nri::launched(notes))
}

fn work(args: Args) -> outcome::Result<ExitCode> {
    // reqwest is built without a TLS provider of its own choice.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let good = match args.command {
        Command::Demo => runtime.block_on(demo::run())?,
        Command::Conformance(options) => runtime.block_on(conformance::run(&options))?,
        Command::Bench => runtime.block_on(bench::run())?,
        // Needs no enclave; main has done it.
        Command::Tree { .. } | Command::NriPlugin { .. } => true,
        Command::Containerd {
            home,
            version,
            filter,
        } => runtime.block_on(containerd::run(home, version, &filter))?,
        Command::Test { list: true, .. } => {
            for case in cases::all() {
                println!("{}", case.name());
            }
            true
        }
        Command::Test { home, filter, .. } => runtime.block_on(async {
            let world = Arc::new(world::World::build(home).await?);
            runner::run(&world, home.vmm(), &filter, cases::all()).await
        })?,
    };
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
