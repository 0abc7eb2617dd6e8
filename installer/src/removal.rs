//! [`remove_all`]: the removal from all nodes, run by the chart's hook before helm deletes the release.
//!
//! Each node's installer removes its own files; this part requests it, waits, and deletes the DaemonSet, so that no installer
//! starts again. Then it removes the annotations.

use crate::error::{InstallError, Result};
use crate::kube::{Change, Cluster};
use std::time::{Duration, Instant};

/// Settings of the removal.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RemovalSettings {
    /// Namespace of the DaemonSet.
    #[arg(long, env = "POD_NAMESPACE")]
    pub namespace: String,
    /// Name of the DaemonSet.
    #[arg(long)]
    pub daemon_set: String,
    /// Seconds for all nodes together.
    #[arg(long, default_value_t = 300)]
    pub timeout_seconds: u64,
    /// Milliseconds between two looks at the nodes.
    #[arg(long, default_value_t = 2000)]
    pub poll_ms: u64,
}

/// Removes the installation from all nodes that have one.
pub(crate) async fn remove_all(cluster: &impl Cluster, settings: &RemovalSettings) -> Result<()> {
    let begun = Instant::now();
    let nodes = cluster.nodes().await?;
    let installed: Vec<_> = nodes.into_iter().filter(|n| n.state.is_some()).collect();
    for node in &installed {
        // The label first: a node whose installer does not run must get no more pods either.
        let changes = [Change::Label(None), Change::Uninstall(Some("true"))];
        cluster.change(&node.name, &changes).await?;
        tracing::info!(node = node.name, "removal requested");
    }
    let names: Vec<_> = installed.iter().map(|n| n.name.clone()).collect();
    wait(settings, begun, "removal on all nodes", async || {
        let nodes = cluster.nodes().await?;
        let pending = nodes
            .iter()
            .filter(|n| names.contains(&n.name) && n.state.as_deref() != Some("removed"));
        Ok(pending
            .map(|n| format!("{}: {}", n.name, n.state.as_deref().unwrap_or_default()))
            .collect())
    })
    .await?;
    wait(settings, begun, "deletion of the DaemonSet", async || {
        let exists = cluster
            .delete_daemon_set(&settings.namespace, &settings.daemon_set)
            .await?;
        Ok(if exists {
            vec![settings.daemon_set.clone()]
        } else {
            Vec::new()
        })
    })
    .await?;
    for node in &installed {
        let changes = [Change::State(None), Change::Uninstall(None)];
        cluster.change(&node.name, &changes).await?;
    }
    Ok(())
}

/// Repeats a look until nothing is pending.
async fn wait(
    settings: &RemovalSettings,
    begun: Instant,
    awaited: &str,
    mut pending: impl AsyncFnMut() -> Result<Vec<String>>,
) -> Result<()> {
    loop {
        let seen = match pending().await {
            Ok(pending) if pending.is_empty() => return Ok(()),
            Ok(pending) => pending.join(", "),
            Err(error) => boxlite_sys::report::report(&error),
        };
        if begun.elapsed() >= Duration::from_secs(settings.timeout_seconds) {
            return Err(InstallError::Timeout {
                awaited: awaited.to_owned(),
                seconds: settings.timeout_seconds,
                seen,
            });
        }
        tokio::time::sleep(Duration::from_millis(settings.poll_ms)).await;
    }
}
