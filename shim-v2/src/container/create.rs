//! Task.Create: turns a bundle into a created container. Each step is undone if a later one fails.
//!
//! ```text
//! id reserved → spec rewritten → output opened → rootfs, mounts, block devices in the share → Container.Init → task spawned
//! ```

use super::process::{Process, ProcessConfig};
use super::spec::{self, GuestSpec};
use super::{Container, Containers, Slot, host_ipc, rootfs};
use crate::error::{Result, ShimError};
use crate::logs::{Sink, Stdio};
use crate::pod::Guest;
use crate::pod::undo::Undo;
use crate::share::Access;
use crate::share::host_namespace::HostNamespace;
use crate::trace::GuestCall;
use boxlite_proto::boxlite::v1::{ContainerInitRequest, Rootfs};
use boxlite_sys::sync::Mutex;
use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::protobuf::MessageField;
use oci_spec::runtime::Spec;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Maximum length of a container id, which becomes a file name.
const MAX_ID_BYTES: usize = 128;

/// Checks that an id can be used as a file name.
fn check_id(id: &str) -> Result<()> {
    let valid = !id.is_empty()
        && id.len() <= MAX_ID_BYTES
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    match valid {
        true => Ok(()),
        false => Err(ShimError::Invalid {
            field: "id",
            reason: format!(
                "{id:?} must be at most {MAX_ID_BYTES} letters, digits, '-', '_' and '.', and must not start with '.'"
            ),
        }),
    }
}

impl Containers {
    /// Creates a container from `spec` and returns its pid. The caller must spawn the future: if it is dropped midway, the
    /// id remains reserved and the mounts remain in the share until the VM ends.
    ///
    /// # Errors
    /// AlreadyExists, HostPath, Invalid, Io, or the guest's error. All steps have been undone when it returns.
    pub async fn create(
        &self,
        guest: &Guest,
        request: &CreateTaskRequest,
        spec: Spec,
    ) -> Result<u32> {
        check_id(&request.id)?;
        if !request.checkpoint.is_empty() {
            return Err(ShimError::Unsupported {
                feature: "a checkpoint",
            });
        }
        match self.slots().entry(request.id.clone()) {
            std::collections::hash_map::Entry::Occupied(_) => {
                return Err(ShimError::AlreadyExists {
                    kind: "container",
                    id: request.id.clone(),
                });
            }
            std::collections::hash_map::Entry::Vacant(slot) => slot.insert(Slot::Creating),
        };
        let mut undo = Undo::default();
        match self.create_in_guest(guest, request, spec, &mut undo).await {
            Ok((init, pid)) => {
                let pid = self.context.reported_pid(pid);
                let container = Container {
                    id: request.id.clone(),
                    bundle: PathBuf::from(&request.bundle),
                    guest: guest.clone(),
                    init,
                    execs: Mutex::new(HashMap::new()),
                    undo: Mutex::new(Some(undo)),
                };
                self.slots()
                    .insert(request.id.clone(), Slot::Created(Arc::new(container)));
                self.publish_create(request, pid);
                Ok(pid)
            }
            Err(error) => {
                undo.run().await;
                self.slots().remove(&request.id);
                Err(error)
            }
        }
    }

    async fn create_in_guest(
        &self,
        guest: &Guest,
        request: &CreateTaskRequest,
        mut spec: Spec,
        undo: &mut Undo,
    ) -> Result<(Process, u32)> {
        let bundle = PathBuf::from(&request.bundle);
        if self.context.host_ipc() {
            host_ipc::add_mount(&mut spec);
        }
        host_ipc::mirror(&mut spec, &bundle, &self.context.tasks, &guest.ended).await?;
        let host = guest.share.host();
        let spec = host.run_blocking(move || spec::rewrite(spec)).await?;
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            guest_input: spec.stdin,
        };
        let namespace = self.context.publisher.namespace();
        let sink = Sink::open(&stdio, namespace, &request.id).await?;
        let mut rootfs = rootfs::prepare(
            &self.layers,
            &guest.share,
            &request.id,
            &bundle,
            &request.rootfs,
            undo,
        )
        .await?;
        rootfs.read_only = spec.read_only;
        self.claim_volumes(&host, &spec, undo).await?;
        for bind in &spec.binds {
            self.layers
                .bind(&guest.share, &bind.source, &bind.path, bind.mode, undo)
                .await?;
        }
        let mut blocks = Vec::with_capacity(spec.blocks.len());
        for device in &spec.blocks {
            blocks.push(self.blocks.serve(&guest.share, device, undo).await?);
        }
        self.export_mounts(&host, &spec, undo).await?;
        let mut init = init_request(request, &spec, rootfs, &stdio)?;
        init.block_devices = blocks;
        let call = GuestCall::begin("Container/Init");
        init.trace = call.traced();
        let pid = match guest.call(guest.session.container().init(init)).await {
            Ok(response) => {
                call.answered(&response.steps);
                response.pid
            }
            Err(error) => {
                drop(call);
                // A call that fails or breaks off may leave a partially created container. Undone here and not by `undo`, since
                // the deletion of a created container begins with that in the guest.
                delete_in_guest(guest, &request.id).await;
                return Err(error);
            }
        };
        for bind in spec.binds.iter().filter(|bind| bind.mirrored) {
            self.mirrored.add(&bind.path);
            let (mirrored, path) = (Arc::clone(&self.mirrored), bind.path.clone());
            undo.push_call("updates of a volume", move || {
                mirrored.remove(&path);
                Ok::<(), std::io::Error>(())
            });
        }
        let config = ProcessConfig {
            container: request.id.clone(),
            exec: String::new(),
            bundle,
            stdio,
        };
        Ok((
            Process::spawn(&self.context, guest, config, sink, pid, None),
            pid,
        ))
    }

    /// Records the container's write access to directories of the host.
    async fn claim_volumes(
        &self,
        host: &HostNamespace,
        spec: &GuestSpec,
        undo: &mut Undo,
    ) -> Result<()> {
        for bind in spec.binds.iter().filter(|b| b.mode.access == Access::Full) {
            let (writers, source) = (Arc::clone(&self.writers), bind.source.clone());
            let claim = host.run_blocking(move || writers.claim(&source)).await?;
            if let Some(claim) = claim {
                let writers = Arc::clone(&self.writers);
                undo.push_call("write access to a volume", move || {
                    writers.release(claim);
                    Ok::<(), std::io::Error>(())
                });
            }
        }
        Ok(())
    }

    /// Exports the container's mounts below its Bidirectional volumes to the host.
    async fn export_mounts(
        &self,
        host: &HostNamespace,
        spec: &GuestSpec,
        undo: &mut Undo,
    ) -> Result<()> {
        let mut any = false;
        for bind in spec.binds.iter().filter(|bind| bind.exported) {
            any = true;
            let (volumes, added) = (Arc::clone(&self.export_volumes), bind.clone());
            let add = move || {
                let failed = ShimError::io("inspect", added.source.display());
                volumes.add(&added.path, &added.source).map_err(failed)
            };
            host.run_blocking(add).await?;
            let (volumes, path) = (Arc::clone(&self.export_volumes), bind.path.clone());
            undo.push_call("mount export of a volume", move || {
                volumes.remove(&path);
                Ok::<(), std::io::Error>(())
            });
        }
        if any && !self.export_volumes.watched().await {
            return Err(ShimError::Unsupported {
                feature: "mount propagation Bidirectional (the guest does not report its mounts)",
            });
        }
        Ok(())
    }

    fn publish_create(&self, request: &CreateTaskRequest, pid: u32) {
        self.context.publisher.publish(&TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: MessageField::some(TaskIO {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
                ..Default::default()
            }),
            pid,
            ..Default::default()
        });
    }
}

async fn delete_in_guest(guest: &Guest, id: &str) {
    if guest.ended.is_cancelled() {
        return;
    }
    if let Err(error) = guest.session.container().delete(id, true).await {
        tracing::warn!(container = id, %error, "failed to delete partially created container in the guest");
    }
}

fn init_request(
    request: &CreateTaskRequest,
    spec: &GuestSpec,
    rootfs: Rootfs,
    stdio: &Stdio,
) -> Result<ContainerInitRequest> {
    let spec_json = serde_json::to_vec(&spec.spec).map_err(|error| ShimError::Invalid {
        field: "config.json",
        reason: error.to_string(),
    })?;
    Ok(ContainerInitRequest {
        container_id: request.id.clone(),
        spec_json: spec_json.into(),
        rootfs: Some(rootfs),
        terminal: request.terminal,
        stdin: stdio.has_input(),
        pid_mode: spec.pid_mode.into(),
        pid_target: spec.pid_target.clone(),
        // The end of a FIFO is CloseIO, which is final for every client that may attach.
        stdin_once: spec.stdin_once || !stdio.stdin.is_empty(),
        block_devices: Vec::new(),
        trace: false,
    })
}
