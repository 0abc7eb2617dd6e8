//! Output of containers: from the guest's Execution.Attach to where the caller wants it, each byte once, in order.
//!
//! ```text
//! guest buffer ──Attach──► [pump]: reader ──bounded queue──► writer ──► [sink]: CRI file | raw file | FIFOs | program | nothing
//!      ▲                                                        │
//!      └──────────────── Ack of what reached the sink ──────────┘
//! ```
//!
//! The guest keeps output until it is acknowledged, and blocks the process when its buffer is full: so a stalled or full
//! disk loses nothing and holds nobody else up. [`cri`] knows the CRI format; nothing here knows what a container is.

pub mod cri;
pub mod file;
pub mod input;
pub mod program;
pub mod pump;
pub mod sink;
pub mod stamp;

pub use pump::LogPump;
pub use sink::{Sink, Stdio};
