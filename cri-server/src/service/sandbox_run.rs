//! RunPodSandbox: network, files, box, start; a failure undoes all of it in reverse order.
//!
//! A warm VM, if one fits, is claimed first: its id is the pod's, and its network namespace exists.
//!
//! ```text
//!  checked → (claimed) → network → files → registered → started → plugins notified → answered
//!     └────────┴─────────┴─────────┴──────────────┴──────────────┴──▶ undone
//! ```
//!
//! One task per pod; a retry joins it (see `single_flight`).

use super::error::ServiceError;
use super::{Server, new_id, nri_hooks, pod_files, status_of};
use crate::convert::ConvertError;
use crate::convert::sandbox::PodMetadata;
use crate::subject;
use boxlite_proto::cri::v1::{RunPodSandboxRequest, RunPodSandboxResponse};
use boxlite_runtime::LiteBox;
use boxlite_telemetry::{Kind, traced};
use futures::FutureExt;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tonic::Status;

/// Handles RunPodSandbox.
pub(crate) async fn run(
    server: &Server,
    request: RunPodSandboxRequest,
) -> Result<RunPodSandboxResponse, Status> {
    let handler = &request.runtime_handler;
    if !server.config.runtime_handlers.contains(handler) {
        let reason = format!(
            "runtime handler not found; available: {:?}",
            server.config.runtime_handlers
        );
        return Err(ConvertError::invalid("runtime_handler", handler, reason).into());
    }
    let record = PodMetadata::new(request.config.clone().unwrap_or_default(), handler.clone())?;
    subject::record_pod_name(&record.pod_name());
    let work = || {
        let server = server.clone();
        let record = record.clone();
        async move { make(&server, record).await }
    };
    let pod_sandbox_id = server
        .runs
        .join(&server.tasks, record.key(), request, work)
        .await?;
    Ok(RunPodSandboxResponse { pod_sandbox_id })
}

async fn make(server: &Server, mut record: PodMetadata) -> Result<String, Status> {
    if let Some(present) = server.runtime.find_box_by_name(&record.key()) {
        return Err(ServiceError::PodExists {
            name: record.key(),
            id: present.id().to_owned(),
        }
        .into());
    }
    let id = new_id();
    record.passt = !record.host_network() && server.has_passt();
    // Checked before an address is allocated: the pod's VM must fit.
    let options = record.box_options(&id, None, &server.config.pod)?;
    let id = server.runtime.claim_warm(&options).unwrap_or(id);
    let hidden = StartingGuard::new(server, &id);
    let limit_of_time = server.config.timeouts.run_pod;
    let name = record.key();
    // A panic is undone like any other failure.
    let stages = AssertUnwindSafe(stages(server, &id, record)).catch_unwind();
    let made = match tokio::time::timeout(limit_of_time, stages).await {
        Ok(made) => made.unwrap_or_else(|_| Err(ServiceError::Panicked.into())),
        Err(_) => Err(ServiceError::PodTimeout {
            name,
            limit: limit_of_time,
        }
        .into()),
    };
    // Held from the plugins' decision until the pod is listed: a plugin that registers meanwhile sees it in its
    // snapshot or gets its event.
    let session = server.session().await;
    let made = match made {
        Ok(pod) => nri_hooks::run_pod(server, &session, &pod)
            .await
            .map(|()| pod),
        Err(error) => Err(error),
    };
    match made {
        Ok(pod) => {
            server.metrics.started(&pod.snapshot());
            drop(hidden);
            Ok(id)
        }
        Err(error) => {
            drop(session);
            undo(server, &id).await;
            Err(error)
        }
    }
}

async fn stages(server: &Server, id: &str, mut record: PodMetadata) -> Result<LiteBox, Status> {
    let netns = match record.host_network() || record.passt {
        // As in containerd, no plugin is called, and the kubelet knows the node's addresses.
        true => None,
        false => Some(attach(server, id, &mut record).await?),
    };
    pod_files::write(&server.layout, id, &record).map_err(|source| ServiceError::PodFiles {
        operation: "write",
        id: id.to_owned(),
        path: server.layout.pod(id),
        source,
    })?;
    let options = record.box_options(id, netns, &server.config.pod)?;
    let pod = server
        .runtime
        .create_box(options)
        .await
        .map_err(status_of)?;
    pod.start().await.map_err(status_of)?;
    Ok(pod)
}

/// Attaches the pod's network by CNI, stores the addresses in the metadata, and returns the network namespace.
async fn attach(server: &Server, id: &str, record: &mut PodMetadata) -> Result<PathBuf, Status> {
    let ranges = server.pod_cidrs.lock().clone();
    let begun = Instant::now();
    let network = record.network(id, &ranges)?;
    let network = traced("network", Kind::Internal, server.cni.attach(&network))
        .await
        .map_err(ServiceError::network("set up", id))?;
    record.network_ms = milliseconds(begun.elapsed());
    record.set_addresses(&network.addresses());
    Ok(network.netns)
}

/// Removes everything that was created; a failure is logged, and the next start retries.
async fn undo(server: &Server, id: &str) {
    if let Ok(pod) = server.runtime.get_box(id)
        && let Err(error) = pod.remove().await
    {
        tracing::warn!(
            id,
            error = boxlite_runtime::report(&error),
            "failed to remove sandbox of failed pod"
        );
    }
    server.runtime.discard_warm(id).await;
    if let Err(error) = server.cni.detach(id).await {
        tracing::warn!(
            id,
            error = boxlite_runtime::report(&error),
            "failed to detach network of failed pod"
        );
    }
    if let Err(error) = pod_files::remove(&server.layout, id) {
        tracing::warn!(id, %error, "failed to remove files of failed pod");
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Omits a pod from lists until RunPodSandbox is done: a kubelet that sees it NOTREADY would replace it.
struct StartingGuard<'a> {
    server: &'a Server,
    id: String,
}

impl<'a> StartingGuard<'a> {
    fn new(server: &'a Server, id: &str) -> Self {
        server.starting.lock().insert(id.to_owned());
        Self {
            server,
            id: id.to_owned(),
        }
    }
}

impl Drop for StartingGuard<'_> {
    fn drop(&mut self) {
        self.server.starting.lock().remove(&self.id);
    }
}
