//! The ttrpc services of the shim's socket: containerd's Task (v2 and v3, one table) and Sandbox, and boxlite's ShimLog.
//!
//! Wire types stop here: a method reads its request, calls one method of [`Sandbox`] or its containers, and writes the
//! answer. ttrpc drops a handler when its client goes away, so everything that changes something runs as a task of its
//! own ([`Service::detached`]) and is finished whoever listens.
//!
//! Process ids that boxlite-cri sees: of containers and execs, the pid in the guest; of the sandbox, the vmm child's. A
//! containerd sees the vmm child's everywhere but in Pids.

mod first_task;
mod log;
mod sandbox;
mod task;

use crate::error::{Result, ShimError};
use crate::sandbox::Sandbox;
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::asynchronous::Service as Methods;
use first_task::FirstTask;
use std::collections::HashMap;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// The task service's name from containerd 2.0 on; the generated code knows it.
const TASK_V3: &str = "containerd.task.v3.Task";
/// Its name before: the same methods and messages.
const TASK_V2: &str = "containerd.task.v2.Task";

/// What all services share.
#[derive(Clone)]
pub struct Service {
    sandbox: Sandbox,
    /// Cancelled when the shim is to end.
    exit: CancellationToken,
    /// With a containerd that calls no CreateSandbox.
    first: Arc<FirstTask>,
}

impl Service {
    /// Services over `sandbox`; `exit` is cancelled when a client asks the shim to end.
    pub fn new(sandbox: Sandbox, exit: CancellationToken) -> Self {
        Self {
            sandbox,
            exit,
            first: Arc::default(),
        }
    }

    /// The method tables to register.
    pub fn tables(&self) -> HashMap<String, Methods> {
        let shared = Arc::new(self.clone());
        let mut tables = create_task(shared.clone());
        // A table cannot be cloned, but made twice.
        if let Some(methods) = create_task(shared.clone()).remove(TASK_V3) {
            tables.insert(TASK_V2.to_owned(), methods);
        }
        tables.extend(create_sandbox(shared.clone()));
        tables.extend(boxlite_proto::shim::shim_ttrpc::create_shim_log(shared));
        tables
    }

    /// Runs `work` to its end even when the client goes away meanwhile.
    async fn detached<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> ttrpc::Result<T> {
        match self.sandbox.context().tasks.spawn(work).await {
            Ok(result) => result.map_err(ttrpc::Error::from),
            // It can only have panicked, and a panic ends the shim.
            Err(_) => Err(ShimError::Ending.into()),
        }
    }

    /// Ends the VM, then the shim. Succeeds where it is ending already.
    async fn shut_down(&self) -> ttrpc::Result<()> {
        let (sandbox, exit) = (self.sandbox.clone(), self.exit.clone());
        self.detached(async move {
            let result = sandbox.shutdown().await;
            exit.cancel();
            match result {
                Err(ShimError::Ending) => Ok(()),
                other => other,
            }
        })
        .await
    }

    /// Whether an id is the sandbox's; an empty one means it.
    fn check_sandbox(&self, id: &str) -> Result<()> {
        let own = &*self.sandbox.context().id;
        if id.is_empty() || id == own {
            return Ok(());
        }
        Err(ShimError::NotFound {
            what: "sandbox",
            id: id.to_owned(),
        })
    }
}
