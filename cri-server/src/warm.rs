//! Starts the runtime's pool of warm VMs from `[pool]`, and gives it the network namespaces that become those of pods.
//!
//! RunPodSandbox claims a VM (`service/sandbox_run.rs`). CNI's plugins run at that time, never for a waiting VM.

use crate::cni::Cni;
use crate::config::Config;
use crate::service::Server;
use boxlite_config::size::{self, SizeError, SizeRequest};
use boxlite_runtime::pool::{NetworkError, PoolNetworks, PoolSettings, Shape};
use std::path::PathBuf;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// Namespaces without CNI attachment.
#[derive(Debug)]
struct Namespaces(Cni);

#[tonic::async_trait]
impl PoolNetworks for Namespaces {
    async fn create(&self, id: &str) -> Result<PathBuf, NetworkError> {
        Ok(self.0.prepare(id).await?)
    }

    async fn remove(&self, id: &str) -> Result<(), NetworkError> {
        Ok(self.0.detach(id).await?)
    }
}

/// Starts the pool if it is configured. Called at the start, after leftovers of an earlier run were removed.
pub(crate) fn start(server: &Server) {
    if server.config.pool.size == 0 {
        return;
    }
    match settings(&server.config) {
        Ok(settings) => {
            let networks = Namespaces(server.cni.clone());
            server.runtime.start_pool(settings, Arc::new(networks));
        }
        Err(error) => tracing::error!(%error, "failed to start the pool: invalid pool.shapes"),
    }
}

fn settings(config: &Config) -> Result<PoolSettings, SizeError> {
    let pool = &config.pool;
    let shape = |vcpus, memory_mib| {
        let request = SizeRequest {
            vcpus,
            memory_mib,
            node_mib: size::node_mib(),
            ..SizeRequest::default()
        };
        let size = size::vm_size(&request, &config.pod)?;
        Ok(Shape {
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
        })
    };
    let shapes = pool.shapes.iter();
    Ok(PoolSettings {
        size: pool.size,
        max_bytes: pool.memory_mib * MIB,
        min_available_bytes: pool.min_available_mib * MIB,
        idle: pool.idle,
        shapes: shapes
            .map(|of| shape(Some(of.vcpus), Some(of.memory_mib)))
            .collect::<Result<_, SizeError>>()?,
        default_shape: shape(None, None)?,
        scratch_bytes: u64::from(config.pod.scratch_mib) * MIB,
        debug_console: config.pod.debug_console,
        vmm_ids: config.pod.vmm_ids,
    })
}
