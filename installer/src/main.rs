//! boxlite-installer: installs the shim on the nodes of a cluster as a runtime handler, and removes it again.
//!
//! The program of the image of charts/boxlite: `node` runs on every node (DaemonSet), `remove` once before the release is
//! deleted. An error becomes a node event and the pod's termination message. Pods are not its business: it neither starts nor
//! stops any.

#![forbid(unsafe_code)]

mod error;
mod files;
mod host;
mod kube;
mod node;
mod removal;
mod runtime;
#[cfg(test)]
mod tests;

use clap::{Parser, Subcommand};
use error::{FileContext, InstallError, Result};
use kube::{ApiServer, Cluster};
use node::{Installer, Settings};
use removal::RemovalSettings;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

#[derive(Parser)]
#[command(about = "Installs boxlite on the nodes of a cluster")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Installs on this node, then waits for the request to remove.
    Node {
        #[command(flatten)]
        settings: Box<Settings>,
        /// File that exists while the node is ready or clean, for the readiness probe.
        #[arg(long, default_value = "/run/boxlite-installer/ready")]
        ready_file: PathBuf,
        /// File for the final error.
        #[arg(long, default_value = "/dev/termination-log")]
        termination_log: PathBuf,
    },
    /// Removes the installation from all nodes.
    Remove {
        #[command(flatten)]
        settings: RemovalSettings,
        /// File for the final error.
        #[arg(long, default_value = "/dev/termination-log")]
        termination_log: PathBuf,
    },
    /// Fails unless this pod runs on another kernel than its node: the test of the release.
    Kernel {
        /// Name of the node.
        #[arg(long, env = "NODE_NAME")]
        node: String,
        /// File for the final error.
        #[arg(long, default_value = "/dev/termination-log")]
        termination_log: PathBuf,
    },
    /// Succeeds if the file exists: the readiness probe.
    Ready {
        /// File that `node` creates.
        #[arg(default_value = "/run/boxlite-installer/ready")]
        ready_file: PathBuf,
    },
    /// Runs a command in the mount namespace of PID 1.
    #[command(hide = true)]
    HostExec {
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // Before any thread exists.
    if let Command::HostExec { command } = &command {
        let Err(error) = host::exec(command);
        eprintln!("boxlite-installer: failed to run {command:?}: {error}");
        return ExitCode::FAILURE;
    }
    tracing_subscriber::fmt().with_ansi(false).init();
    // reqwest is built without a default TLS provider.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (result, log) = match &command {
        Command::Node {
            settings,
            ready_file,
            termination_log,
        } => (block_on(node(settings, ready_file)), termination_log),
        Command::Remove {
            settings,
            termination_log,
        } => (block_on(remove(settings)), termination_log),
        Command::Kernel {
            node,
            termination_log,
        } => (block_on(kernel(node)), termination_log),
        Command::Ready { ready_file } => {
            return match ready_file.exists() {
                true => ExitCode::SUCCESS,
                false => ExitCode::FAILURE,
            };
        }
        Command::HostExec { .. } => return ExitCode::FAILURE,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = boxlite_sys::report::report(&error);
            tracing::error!(error = text, "installer failed");
            // The log has it if the file cannot be written.
            let _ = std::fs::write(log, text);
            ExitCode::FAILURE
        }
    }
}

fn block_on(task: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime
        .file("start", "the asynchronous runtime")?
        .block_on(task)
}

/// Installs unless the removal was requested, and ends with a SIGTERM.
async fn node(settings: &Settings, ready_file: &Path) -> Result<()> {
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .file("handle", "SIGTERM")?;
    tokio::select! {
        result = follow(settings, ready_file) => result,
        _ = terminated.recv() => Ok(()),
    }
}

async fn follow(settings: &Settings, ready_file: &Path) -> Result<()> {
    let cluster = ApiServer::from_environment()?;
    let installer = Installer {
        settings,
        cluster: &cluster,
        host: &host::Node,
    };
    let mut requested = cluster.node(&settings.node).await?.uninstall;
    if !requested {
        installer.install().await?;
        write_ready(ready_file)?;
    }
    loop {
        if requested {
            installer.uninstall().await?;
            write_ready(ready_file)?;
            // The removal's coordinator deletes this pod.
            return std::future::pending().await;
        }
        tokio::time::sleep(Duration::from_millis(settings.poll_ms)).await;
        match cluster.node(&settings.node).await {
            Ok(node) => requested = node.uninstall,
            Err(error) => {
                tracing::warn!(error = %boxlite_sys::report::Report(&error), "failed to read node");
            }
        }
    }
}

fn write_ready(file: &Path) -> Result<()> {
    if let Some(parent) = file.parent() {
        std::fs::create_dir_all(parent).file("create", parent)?;
    }
    std::fs::write(file, "").file("write", file)
}

async fn remove(settings: &RemovalSettings) -> Result<()> {
    removal::remove_all(&ApiServer::from_environment()?, settings).await
}

async fn kernel(name: &str) -> Result<()> {
    let node = ApiServer::from_environment()?.node(name).await?;
    let own = nix::sys::utsname::uname()
        .map_err(std::io::Error::from)
        .file("read", "the kernel's release")?;
    let own = own.release().to_string_lossy().into_owned();
    tracing::info!(own, node = node.kernel_version, "kernels compared");
    match own == node.kernel_version {
        true => Err(InstallError::SameKernel { kernel: own }),
        false => Ok(()),
    }
}
