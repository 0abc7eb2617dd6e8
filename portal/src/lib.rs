//! The Portal: gRPC from the host into a box's agent, over the VM's vsock as a unix socket.
//!
//! It carries calls and their limits; what a call is for (exec, stats, lifecycle) is decided by LiteBox in this crate
//! and by the shim, which uses the same Portal. It never starts or stops a VM.
//!
//! [`Connection`] (lazy, reconnects) → [`GuestSession`] → [`GuestInterface`], [`ContainerInterface`],
//! [`ExecutionInterface`], one per service of `boxlite/v1/service.proto`. The guest is hostile: every answer is bounded
//! in size and in time, see the constants in [`connection`] and [`interfaces`].

pub mod connection;
pub mod error;
pub mod interfaces;
pub mod session;

pub use connection::{Connection, GuestAddress};
pub use error::{GuestErrorKind, PortalError};
pub use interfaces::container::ContainerInterface;
pub use interfaces::execution::{ExecOutput, ExecutionInterface};
pub use interfaces::follow::{OutputChunk, OutputFollower};
pub use interfaces::guest::GuestInterface;
pub use session::GuestSession;
