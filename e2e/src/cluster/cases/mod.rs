//! The project's own cases on a cluster: actions of a user with kubectl, and of a node's life, each with a check.

mod clients;
mod disruption;
mod events;
mod network;
mod node;
mod volumes;
mod workloads;

use super::context::ClusterContext;
use crate::runner::Case;

/// Returns all cases. Those that disturb the node are last.
pub(crate) fn all() -> Vec<Case<ClusterContext>> {
    let mut all = workloads::cases();
    all.extend(clients::cases());
    all.extend(volumes::cases());
    all.extend(network::cases());
    all.extend(node::cases());
    all.extend(events::cases());
    all.extend(disruption::cases());
    all
}
