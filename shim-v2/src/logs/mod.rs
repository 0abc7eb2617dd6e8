//! Container output: copied from the guest's Execution.Attach to the requested sink, each byte once and in order.
//!
//! ```text
//! guest buffer ──Attach──► [pump]: reader ──bounded queue──► writer ──► [sink]: CRI file | raw file | FIFOs | program | nothing
//!      ▲                                                        │
//!      └────────────────    Ack of written output    ──────────┘
//! ```
//!
//! The guest buffers output until it is acknowledged, and blocks the process when the buffer is full: a stalled or full disk
//! loses no output and does not delay other containers. [`cri`] implements the CRI format. [`shim_log`] is the shim's own log;
//! [`manager_log`] copies its warnings to containerd's.

pub mod cri;
pub mod file;
pub mod input;
mod manager_log;
pub mod program;
pub mod pump;
pub mod shim_log;
pub mod sink;
pub mod stamp;

pub use pump::LogPump;
pub use sink::{Sink, Stdio};
