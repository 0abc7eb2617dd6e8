//! Server around the services: the unix socket, connections, the layer around every call, and the shutdown.
//!
//! Independent of CRI messages. Flow: serve → `socket::bind`, `connection::Incoming`, `layer::CallLayer`.

pub(crate) mod authority;
pub(crate) mod connection;
pub(crate) mod layer;
pub(crate) mod socket;
