//! Host pods: boxlite-cri hands chosen pods to a stock containerd with runc, and runs the others in VMs.
//!
//! This file has the node; [`one_node`] uses every call of both kinds of pods, [`dead`] kills containerd.

mod dead;
mod one_node;

use super::daemon::Version;
use super::{Case, Context, before, stock};
use crate::case;
use crate::failure::Result;
use crate::image::registry::Registry;
use crate::node::{Node, NodeOptions, write_mirrors};
use crate::service::Service;
use dead::dead_containerd_hides_only_its_pods;
use one_node::host_pods_and_vms_are_one_node;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Returns the cases.
pub(crate) fn cases() -> Vec<Case> {
    let absent = "the host's containerd is 2.x; it is not tested with others";
    vec![
        case!(host_pods_and_vms_are_one_node, 120).unless(before(Version::V2), absent),
        case!(dead_containerd_hides_only_its_pods, 120).unless(before(Version::V2), absent),
    ]
}

/// A node with host pods.
struct HostPodsNode {
    node: Arc<Node>,
    containerd: Service,
    /// containerd without boxlite-cri, for a look at its own objects.
    theirs: Node,
    /// Host of the registry, with the images base:1, more:1, and the pause image of containerd.
    registry: Registry,
    config: PathBuf,
}

impl HostPodsNode {
    async fn start(ctx: &Context, name: &str) -> Result<Self> {
        let dir = ctx.scratch.join(format!("{name}-c"));
        std::fs::create_dir_all(dir.join("cni"))?;
        let registry = Registry::start(&ctx.install.registry, &dir, 5000, false).await?;
        let mut pause = super::image(&ctx.install)?;
        registry.push("base", "1", &pause).await?;
        pause.config["Cmd"] = json!(["more"]);
        registry.push("more", "1", &pause).await?;
        pause.config["Cmd"] = json!(["sleep", "2147483647"]);
        registry.push("pause", "1", &pause).await?;
        let host = registry.host.clone();
        let mirror = (host.clone(), format!("http://{host}"), None);
        write_mirrors(&dir.join("certs.d"), std::slice::from_ref(&mirror))?;
        std::fs::write(dir.join("cni/10-host.conflist"), conflist(&dir))?;
        let config = dir.join("config.toml");
        let pause = format!("{host}/pause:1");
        let text = stock::with_runc(&dir, &ctx.install.cni, &pause);
        std::fs::write(&config, text)?;
        let mut options = NodeOptions::new(name, ctx.backend.vmm());
        options.registries.push(mirror);
        options.iptables = false;
        options.host_pods = Some(format!(
            "endpoint = \"unix://{}\"\nhandlers = [\"runc\"]\nnamespaces = [\"kube-system\"]",
            dir.join("c.sock").display()
        ));
        let containerd = Service::new("containerd", dir.join("containerd.log"));
        stock::serve(&containerd, &config, &[]).await?;
        let node = Arc::new(Node::start(&ctx.scratch, &ctx.install, &options).await?);
        Ok(Self {
            node,
            containerd,
            theirs: Node::foreign(&dir)?,
            registry,
            config,
        })
    }

    /// Returns the reference of an image.
    fn image(&self, name: &str) -> String {
        format!("{}/{name}:1", self.registry.host)
    }

    async fn end(&self) -> Result {
        self.node.terminate().await?;
        self.containerd.terminate().await
    }
}

fn conflist(dir: &Path) -> String {
    json!({"cniVersion": "1.0.0", "name": "host", "plugins": [
        {"type": "bridge", "bridge": "bxhost", "isGateway": true,
         "ipam": {"type": "host-local", "dataDir": dir.join("ipam"), "ranges": [[{"subnet": "10.91.0.0/24"}]]}}
    ]})
    .to_string()
}
