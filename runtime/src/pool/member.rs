//! Makes and removes one waiting VM: bundle with marker, network namespace, shim, boot.
//!
//! The marker is on disk before the shim runs, and the start pipeline removes it once the pod's row is, so a bundle with
//! a marker is never a pod's. [`remove`] needs no more than the id and succeeds at every point of [`make`].

use super::{NetworkError, PoolNetworks, PoolSettings, Shape};
use crate::error::RuntimeError;
use crate::filesystem_layout::{private_directory, remove_tree};
use crate::litebox::{BoxEnv, pipeline, teardown};
use crate::report;
use crate::shim_controller::ShimController;
use crate::types::BoxOptions;
use boxlite_proto::vmm::SandboxOptions;
use boxlite_sys::proc_memory;
use boxlite_sys::process::family;
use rand::RngCore;

/// A VM that could not be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum FillError {
    /// The bundle or the shim failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The network namespace could not be created.
    #[error("failed to create the network namespace of a warm VM")]
    Network(#[source] NetworkError),
}

/// Returns an id like a pod's: 64 hex digits.
pub(super) fn new_id() -> String {
    let mut bytes = [0; 32];
    rand::rng().fill_bytes(&mut bytes);
    hex::encode(bytes)
}

/// Returns the options of a VM without a pod.
pub(super) fn options(id: &str, shape: Shape, settings: &PoolSettings) -> BoxOptions {
    BoxOptions {
        pod: None,
        id: id.to_owned(),
        name: String::new(),
        metadata: Vec::new(),
        vcpus: shape.vcpus,
        memory_mib: shape.memory_mib,
        containers_bytes: 0,
        scratch_bytes: settings.scratch_bytes,
        hostname: String::new(),
        netns: None,
        host_network: false,
        passt: false,
        sysctls: Default::default(),
        cgroup_parent: String::new(),
        vmm: None,
        debug_console: settings.debug_console,
        shared_volume_writers: Default::default(),
        vmm_ids: settings.vmm_ids,
    }
}

/// Boots a VM. Returns its shim and the memory of its processes in bytes. After an error call [`remove`].
pub(super) async fn make(
    env: &BoxEnv,
    networks: &dyn PoolNetworks,
    options: &BoxOptions,
) -> Result<(ShimController, u64), FillError> {
    let id = &options.id;
    env.init_rootfs.check(&env.vmm)?;
    let bundle = env.layout.bundle(id);
    let containers = env.layout.containers(id);
    let marker = env.layout.warm_marker(id);
    let directories = bundle.clone();
    teardown::blocking(move || {
        private_directory(&directories)?;
        private_directory(&containers)?;
        std::fs::write(&marker, "").map_err(|source| RuntimeError::Io {
            operation: "write",
            path: marker,
            source,
        })
    })
    .await?;
    let netns = networks.create(id).await.map_err(FillError::Network)?;
    // Not canceled while the program runs: it has a timeout, and canceling could miss a shim that is just starting.
    let shim = ShimController::spawn(&env.program, id, &bundle, env.vmm.clone()).await?;
    let booting = async {
        let options = SandboxOptions {
            pod: None,
            warm: true,
            ..pipeline::sandbox_options(env, options, &env.vmm)
        };
        shim.create_sandbox(&bundle, Some(&netns), &options).await?;
        shim.start_sandbox(env.start_limit).await
    };
    match env.closing.run_until_cancelled(booting).await {
        Some(booted) => booted?,
        None => return Err(RuntimeError::ShuttingDown.into()),
    }
    let bytes = footprint(&shim);
    Ok((shim, bytes))
}

/// Kills the VM and removes everything of it; failures are logged.
pub(super) async fn remove(env: &BoxEnv, networks: &dyn PoolNetworks, id: &str) {
    teardown::clean_or_warn(env, id).await;
    let bundle = env.layout.bundle(id);
    if let Err(error) = teardown::blocking(move || remove_tree(&bundle)).await {
        tracing::warn!(
            id,
            error = report(&error),
            "failed to remove the bundle of a warm VM"
        );
    }
    if let Err(error) = networks.remove(id).await {
        let error = report(error.as_ref());
        tracing::warn!(id, error, "failed to remove the network of a warm VM");
    }
}

/// Returns the memory of a shim and its VM in bytes: proportional set sizes, since they share the guest's memory.
fn footprint(shim: &ShimController) -> u64 {
    let Some(process) = &shim.state().process else {
        return 0;
    };
    family(process.pid)
        .into_iter()
        .filter_map(proc_memory::pss)
        .sum()
}

/// Returns the memory that the node can give to processes, in bytes.
pub(super) fn available_bytes() -> u64 {
    // Every kernel since 3.14 reports it.
    proc_memory::meminfo("MemAvailable").unwrap_or(u64::MAX)
}
