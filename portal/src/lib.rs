//! The Portal: gRPC from the host to the agent of a box, over the VM's vsock as a unix socket.
//!
//! Carries calls and their limits. LiteBox and the shim decide the purpose of calls (exec, stats, lifecycle). It
//! does not start or stop VMs.
//!
//! [`Connection`] (lazy, reconnects) → [`GuestSession`] → [`GuestInterface`], [`ContainerInterface`],
//! [`ExecutionInterface`], one per service of `boxlite/v1/service.proto`. The guest is hostile: every answer is bounded
//! in size and in time, see the constants in [`connection`] and [`interfaces`].

pub mod connection;
pub mod error;
pub mod interfaces;
pub mod session;
mod severable;
pub mod stats_limits;

pub use connection::{Connection, GuestAddress};
pub use error::{GuestErrorKind, PortalError};
pub use interfaces::container::ContainerInterface;
pub use interfaces::execution::{ExecOutput, ExecutionInterface};
pub use interfaces::follow::{OutputChunk, OutputFollower};
pub use interfaces::guest::GuestInterface;
pub use session::GuestSession;
