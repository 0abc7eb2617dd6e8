//! [`GuestSession`]: everything one can ask of one guest, over one [`Connection`].

use super::connection::Connection;
use super::interfaces::container::ContainerInterface;
use super::interfaces::execution::ExecutionInterface;
use super::interfaces::guest::GuestInterface;
use super::interfaces::mounts::MountsInterface;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A handle to one guest. Cheap to clone; clones share the connection and the byte count.
#[derive(Debug, Clone)]
pub struct GuestSession {
    connection: Connection,
    bytes: Arc<AtomicU64>,
}

impl GuestSession {
    /// A session over `connection`; nothing is dialled yet.
    pub fn new(connection: Connection) -> Self {
        Self::counted(connection, Arc::new(AtomicU64::new(0)))
    }

    /// A session that adds the payload bytes of its streams, both ways, to `bytes`.
    pub fn counted(connection: Connection, bytes: Arc<AtomicU64>) -> Self {
        Self { connection, bytes }
    }

    /// The same guest over a connection of its own; see [`Connection::dedicated`].
    pub fn dedicated(&self) -> Self {
        Self {
            connection: self.connection.dedicated(),
            bytes: self.bytes.clone(),
        }
    }

    /// The connection.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Payload bytes carried so far, both ways.
    pub fn bytes_transferred(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The VM itself.
    pub fn guest(&self) -> GuestInterface {
        GuestInterface::new(self.connection.channel(), self.bytes.clone())
    }

    /// Its containers.
    pub fn container(&self) -> ContainerInterface {
        ContainerInterface::new(self.connection.channel())
    }

    /// Mounts that they show on the host.
    pub fn mounts(&self) -> MountsInterface {
        MountsInterface::new(self.connection.channel())
    }

    /// Their processes.
    pub fn execution(&self) -> ExecutionInterface {
        ExecutionInterface::new(self.connection.clone(), self.bytes.clone())
    }
}
