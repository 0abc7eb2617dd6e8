//! The four gRPC services of the guest protocol. Each RPC is validated, passed to its module, and its error converted
//! to a status.
//!
//! Services hold no state and make no system calls.

pub(crate) mod container;
pub(crate) mod execution;
pub(crate) mod guest;
pub(crate) mod mounts;
pub(crate) mod status;

use crate::agent::Agent;
use boxlite_proto::boxlite::v1::container_server::ContainerServer;
use boxlite_proto::boxlite::v1::execution_server::ExecutionServer;
use boxlite_proto::boxlite::v1::guest_server::GuestServer;
use boxlite_proto::boxlite::v1::mounts_server::MountsServer;
use boxlite_proto::names;
use std::sync::Arc;
use tonic::service::Routes;

/// Returns all services, with message size limits.
pub(crate) fn routes(agent: &Arc<Agent>) -> Routes {
    let guest = GuestServer::new(guest::GuestService::new(Arc::clone(agent)))
        .max_decoding_message_size(names::MAX_GUEST_MESSAGE_BYTES)
        .max_encoding_message_size(names::MAX_GUEST_MESSAGE_BYTES);
    let container = ContainerServer::new(container::ContainerService::new(Arc::clone(agent)))
        .max_decoding_message_size(names::MAX_GUEST_MESSAGE_BYTES)
        .max_encoding_message_size(names::MAX_GUEST_MESSAGE_BYTES);
    let execution = ExecutionServer::new(execution::ExecutionService::new(Arc::clone(agent)))
        .max_decoding_message_size(names::MAX_GUEST_MESSAGE_BYTES)
        .max_encoding_message_size(names::MAX_GUEST_MESSAGE_BYTES);
    let mounts = MountsServer::new(mounts::MountsService::new(Arc::clone(agent)))
        .max_decoding_message_size(names::MAX_GUEST_MESSAGE_BYTES)
        .max_encoding_message_size(names::MAX_GUEST_MESSAGE_BYTES);
    Routes::new(guest)
        .add_service(container)
        .add_service(execution)
        .add_service(mounts)
}
