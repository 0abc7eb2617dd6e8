//! The server around the services: the unix socket, connections, the layer that every call passes, and the end.
//!
//! Knows no CRI message. Flow: serve → `socket::bind`, `connection::Incoming`, `layer::CallLayer`.

pub(crate) mod authority;
pub(crate) mod connection;
pub(crate) mod layer;
pub(crate) mod socket;
