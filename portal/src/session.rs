//! [`GuestSession`]: typed clients of one guest over one [`Connection`].

use super::connection::Connection;
use super::interfaces::container::ContainerInterface;
use super::interfaces::execution::ExecutionInterface;
use super::interfaces::guest::GuestInterface;
use super::interfaces::mounts::MountsInterface;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Handle to a guest. Cheap to clone; clones share the connection and the byte count.
#[derive(Debug, Clone)]
pub struct GuestSession {
    connection: Connection,
    bytes: Arc<AtomicU64>,
}

impl GuestSession {
    /// Creates a session on `connection` without dialing.
    pub fn new(connection: Connection) -> Self {
        Self::counted(connection, Arc::new(AtomicU64::new(0)))
    }

    /// Creates a session that adds the payload bytes of its streams, in both directions, to `bytes`.
    pub fn counted(connection: Connection, bytes: Arc<AtomicU64>) -> Self {
        Self { connection, bytes }
    }

    /// Returns a session with the same guest on a dedicated connection; see [`Connection::dedicated`].
    pub fn dedicated(&self) -> Self {
        Self {
            connection: self.connection.dedicated(),
            bytes: self.bytes.clone(),
        }
    }

    /// Returns the connection.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Fails all calls of this session and its dedicated sessions at once, present and future. For the owner of the VM,
    /// once it knows that the VM has ended: until then, a broken connection may be re-established.
    pub fn sever(&self) {
        self.connection.sever();
    }

    /// Returns the payload bytes transferred so far, in both directions.
    pub fn bytes_transferred(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Returns the client for the VM itself.
    pub fn guest(&self) -> GuestInterface {
        GuestInterface::new(self.connection.channel(), self.bytes.clone())
    }

    /// Returns the client for its containers.
    pub fn container(&self) -> ContainerInterface {
        ContainerInterface::new(self.connection.channel())
    }

    /// Returns the client for exported mounts.
    pub fn mounts(&self) -> MountsInterface {
        MountsInterface::new(self.connection.channel())
    }

    /// Returns the client for processes of its containers.
    pub fn execution(&self) -> ExecutionInterface {
        ExecutionInterface::new(self.connection.clone(), self.bytes.clone())
    }
}
