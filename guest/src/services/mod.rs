//! The guest protocol's four gRPC services: each call is checked, handed to its module, and its error made a status.
//!
//! No state and no system call lives here.

pub mod container;
pub mod execution;
pub mod guest;
pub mod mounts;
pub mod status;

use crate::agent::Agent;
use boxlite_proto::boxlite::v1::container_server::ContainerServer;
use boxlite_proto::boxlite::v1::execution_server::ExecutionServer;
use boxlite_proto::boxlite::v1::guest_server::GuestServer;
use boxlite_proto::boxlite::v1::mounts_server::MountsServer;
use boxlite_proto::names;
use std::sync::Arc;
use tonic::service::Routes;

/// All services, with the limits of messages.
pub fn routes(agent: &Arc<Agent>) -> Routes {
    let guest = GuestServer::new(guest::GuestService::new(Arc::clone(agent)))
        .max_decoding_message_size(names::GUEST_MESSAGE_LIMIT)
        .max_encoding_message_size(names::GUEST_MESSAGE_LIMIT);
    let container = ContainerServer::new(container::ContainerService::new(Arc::clone(agent)))
        .max_decoding_message_size(names::GUEST_MESSAGE_LIMIT)
        .max_encoding_message_size(names::GUEST_MESSAGE_LIMIT);
    let execution = ExecutionServer::new(execution::ExecutionService::new(Arc::clone(agent)))
        .max_decoding_message_size(names::GUEST_MESSAGE_LIMIT)
        .max_encoding_message_size(names::GUEST_MESSAGE_LIMIT);
    let mounts = MountsServer::new(mounts::MountsService::new(Arc::clone(agent)))
        .max_decoding_message_size(names::GUEST_MESSAGE_LIMIT)
        .max_encoding_message_size(names::GUEST_MESSAGE_LIMIT);
    Routes::new(guest)
        .add_service(container)
        .add_service(execution)
        .add_service(mounts)
}

/// The result of blocking work that nobody aborts; that it panicked is the one way it can fail.
pub async fn joined<T>(task: tokio::task::JoinHandle<T>) -> Result<T, tonic::Status> {
    task.await
        .map_err(|error| tonic::Status::internal(error.to_string()))
}
