//! The server around the services: the unix socket, connections, the layer that every call passes, and the end.
//!
//! Knows no CRI message. Flow: serve → `socket::bind`, `connection::Incoming`, `layer::CallLayer`.

pub mod authority;
pub mod connection;
pub mod layer;
pub mod socket;
