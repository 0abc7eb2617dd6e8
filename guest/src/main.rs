//! `boxlite-guest`: the agent of a pod's VM. As PID 1 it sets up the VM, forks the spawner and serves the guest
//! protocol.
//!
//! The agent makes no decisions about pods; the host does. It runs as long as the VM: every return from `main`, and
//! every panic, powers the VM off.
//!
//! Startup: [`boot`] (mounts, cgroups, single-threaded) → [`spawner`] forked → tokio → [`serve`] (vsock 2695, ready
//! on 2696) → [`services`] → [`container`], [`execution`], [`storage`], [`network`].

mod agent;
mod boot;
mod cgroup;
mod container;
mod descriptor;
mod dhcp;
mod execution;
mod forward;
mod host_ports;
mod mount_export;
mod network;
mod resolv_conf;
mod seccomp;
mod serve;
mod services;
mod spawner;
mod status;
mod steps;
mod storage;
mod system;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!(
            "boxlite-guest {} runs as PID 1 of a boxlite VM only",
            env!("CARGO_PKG_VERSION")
        );
        return ExitCode::from(64);
    }
    steps::agent_started();
    boot::power::off_on_panic();
    if let Err(error) = run() {
        boot::console::print_error("agent", &*error);
    }
    boot::power::off()
}

/// Boots and serves; returns when the VM is to end.
fn run() -> Result<(), Box<dyn std::error::Error>> {
    boot::prepare()?;
    // Before any thread exists, and before the subscriber is set: helpers must not log to a container's standard
    // error.
    let spawner = spawner::Spawner::start()?;
    boot::console::start_logging();
    boot::memory::lock();
    boot::allow_many_files();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // A VM has one or two CPUs and as little as 128 MiB; blocking calls are mounts and directory walks.
        .max_blocking_threads(8)
        .build()?;
    let result = runtime.block_on(serve::serve(spawner));
    // Dropping the runtime would wait for blocking calls; they end with the VM.
    runtime.shutdown_background();
    Ok(result?)
}
