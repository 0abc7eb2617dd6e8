//! The ttrpc services of the shim's socket: containerd's Task (v2 and v3, one table) and Sandbox, and boxlite's ShimLog.
//!
//! A method decodes its request, calls [`Sandbox`] or its containers, and encodes the response. ttrpc drops a handler when
//! its client disconnects, so every operation with effects runs as a separate task ([`Service::detached`]) to completion.
//!
//! boxlite-cri sees the guest's pids for containers and execs, and the VMM child's pid for the sandbox. containerd sees the
//! VMM child's pid in all answers except Pids.

mod first_task;
mod log;
mod sandbox;
mod task;

use crate::error::{Result, ShimError};
use crate::sandbox::Sandbox;
use boxlite_telemetry::WithTrace;
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::asynchronous::Service as Methods;
use first_task::FirstTask;
use std::collections::HashMap;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Name of the task service from containerd 2.0 on, as in the generated code.
const TASK_V3: &str = "containerd.task.v3.Task";
/// Earlier name of the task service, with the same methods and messages.
const TASK_V2: &str = "containerd.task.v2.Task";

/// Implementation of all services; clones share the sandbox.
#[derive(Clone)]
pub struct Service {
    sandbox: Sandbox,
    /// Cancelled to end the shim.
    exit: CancellationToken,
    /// State for a containerd that does not call CreateSandbox.
    first: Arc<FirstTask>,
}

impl Service {
    /// Creates the services of `sandbox`; `exit` is cancelled when a client shuts the shim down.
    pub fn new(sandbox: Sandbox, exit: CancellationToken) -> Self {
        Self {
            sandbox,
            exit,
            first: Arc::default(),
        }
    }

    /// Returns the method tables to register.
    pub fn tables(&self) -> HashMap<String, Methods> {
        let shared = Arc::new(self.clone());
        let mut tables = create_task(shared.clone());
        // Tables are not Clone, so it is created twice.
        if let Some(methods) = create_task(shared.clone()).remove(TASK_V3) {
            tables.insert(TASK_V2.to_owned(), methods);
        }
        tables.extend(create_sandbox(shared.clone()));
        tables.extend(boxlite_proto::shim::shim_ttrpc::create_shim_log(shared));
        tables
    }

    /// Runs `job` to completion even if the client disconnects.
    async fn detached<T: Send + 'static>(
        &self,
        job: impl Future<Output = Result<T>> + Send + 'static,
    ) -> ttrpc::Result<T> {
        match self
            .sandbox
            .context()
            .tasks
            .spawn(job.in_current_trace())
            .await
        {
            Ok(result) => result.map_err(ttrpc::Error::from),
            // A join error means a panic, which aborts the shim.
            Err(_) => Err(ShimError::Ending.into()),
        }
    }

    /// Stops the VM, then ends the shim. Succeeds if the shim is shutting down already.
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

    /// Checks that an id is empty or the sandbox's.
    fn check_sandbox(&self, id: &str) -> Result<()> {
        let own = &*self.sandbox.context().id;
        if id.is_empty() || id == own {
            return Ok(());
        }
        Err(ShimError::NotFound {
            kind: "sandbox",
            id: id.to_owned(),
        })
    }
}
