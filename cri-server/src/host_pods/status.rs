//! Status, RuntimeConfig and UpdateRuntimeConfig of both sides.

use super::{HostPods, Router};
use boxlite_proto::cri::v1::runtime_service_server::RuntimeService;
use boxlite_proto::cri::v1::*;
use serde_json::json;
use tonic::{Request, Response, Status};

/// Condition of containerd. The kubelet reads only RuntimeReady and NetworkReady, so it does not affect pods in VMs.
const CONDITION: &str = "HostPodsReady";

impl Router {
    /// Returns this runtime's status with a condition and the listed handlers of containerd.
    pub(super) async fn node_status(
        &self,
        request: StatusRequest,
    ) -> Result<Response<StatusResponse>, Status> {
        let mut answer = self.server.status(Request::new(request)).await?;
        let Some(host) = &self.host else {
            return Ok(answer);
        };
        let mut runtime = host.client.runtime();
        let theirs = host.client.merged(runtime.status(request)).await;
        let reason = theirs.as_ref().err().map(|s| s.message().to_owned());
        let theirs = theirs.ok();
        let status = answer.get_mut();
        let conditions = &mut status.status.get_or_insert_default().conditions;
        conditions.push(condition(theirs.as_ref(), reason));
        status
            .runtime_handlers
            .extend(host.handlers(theirs.as_ref()));
        if request.verbose {
            let info = theirs.map(|theirs| theirs.info).unwrap_or_default();
            let details = json!({"endpoint": host.client.endpoint(), "info": info});
            status.info.insert("hostPods".into(), details.to_string());
        }
        Ok(answer)
    }

    /// Returns containerd's cgroup driver, since this runtime accepts both; while containerd is down, its last one.
    pub(super) async fn node_config(&self) -> Result<Response<RuntimeConfigResponse>, Status> {
        let mut answer = self
            .server
            .runtime_config(Request::new(RuntimeConfigRequest {}))
            .await?;
        let Some(host) = &self.host else {
            return Ok(answer);
        };
        let mut runtime = host.client.runtime();
        let theirs = host
            .client
            .merged(runtime.runtime_config(RuntimeConfigRequest {}));
        let theirs = theirs.await.ok().and_then(|theirs| theirs.linux);
        if let Some(linux) = &theirs {
            host.table.set_cgroup_driver(linux.cgroup_driver);
        }
        if let Some(cgroup_driver) = host.table.cgroup_driver() {
            answer.get_mut().linux = Some(LinuxRuntimeConfiguration { cgroup_driver });
        }
        Ok(answer)
    }

    /// Updates both sides; the kubelet repeats the call only if the CIDR changes, so containerd's failure is logged.
    pub(super) async fn update_node_config(
        &self,
        request: UpdateRuntimeConfigRequest,
    ) -> Result<Response<UpdateRuntimeConfigResponse>, Status> {
        let ours = self
            .server
            .update_runtime_config(Request::new(request.clone()));
        let answer = ours.await?;
        if let Some(host) = &self.host {
            let mut runtime = host.client.runtime();
            let theirs = runtime.update_runtime_config(request);
            if let Err(error) = host.client.merged(theirs).await {
                tracing::warn!(%error, "failed to update the configuration of the container runtime of host pods");
            }
        }
        Ok(answer)
    }
}

impl HostPods {
    /// Returns the listed handlers, with containerd's features if it answered.
    fn handlers(&self, status: Option<&StatusResponse>) -> Vec<RuntimeHandler> {
        let offered = status.map_or(&[][..], |status| &status.runtime_handlers);
        let handler = |name: &String| {
            let known = offered.iter().find(|handler| handler.name == *name);
            known.cloned().unwrap_or_else(|| RuntimeHandler {
                name: name.clone(),
                features: None,
            })
        };
        self.rules.handlers().iter().map(handler).collect()
    }
}

fn condition(status: Option<&StatusResponse>, error: Option<String>) -> RuntimeCondition {
    let conditions = status.and_then(|status| status.status.as_ref());
    let failed = conditions
        .into_iter()
        .flat_map(|status| &status.conditions)
        .find(|c| !c.status && matches!(&c.r#type[..], "RuntimeReady" | "NetworkReady"));
    let (reason, message) = match (error, failed) {
        (Some(error), _) => ("Unreachable".to_owned(), error),
        (None, Some(failed)) => (failed.reason.clone(), failed.message.clone()),
        (None, None) => {
            return RuntimeCondition {
                r#type: CONDITION.into(),
                status: true,
                ..Default::default()
            };
        }
    };
    RuntimeCondition {
        r#type: CONDITION.into(),
        status: false,
        reason,
        message,
    }
}
