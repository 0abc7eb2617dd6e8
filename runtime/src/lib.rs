//! The runtime behind boxlite-cri: boxes (one VM per pod), their images, and the clients of their shims and guests.
//!
//! Owns paths, images and the database. Depends neither on CRI types (cri-server converts) nor on a VMM (shim-v2 does).
//!
//! [`BoxliteRuntime`] holds all boxes, a [`LiteBox`] is a handle to one. Starting, stopping and exits go through the shim
//! (`shim_controller`), exec and stats through `boxlite-portal`.

mod box_manager;
pub mod box_state;
mod database;
pub mod error;
#[cfg(feature = "fake-shim")]
pub mod error_samples;
pub mod events;
pub mod failpoint;
#[cfg(any(test, feature = "fake-shim"))]
pub mod fake_shim;
pub mod filesystem_layout;
mod id_prefix;
pub mod images;
pub mod init_rootfs;
pub mod litebox;
pub mod metrics;
mod panics;
pub mod pool;
mod recovery;
pub mod runtime;
pub mod shim_controller;
pub mod types;
pub mod vmm_probe;

pub use boxlite_portal::ExecOutput;
pub use boxlite_sys::report::report;
pub use error::{ErrorKind, Result, RuntimeError};
pub use events::{BoxEvent, EventKind, Events, EventsEnd};
pub use litebox::{LiteBox, ProcessControls, ProcessSession};
pub use metrics::{BoxMetricsSnapshot, RuntimeMetricsSnapshot, Stage, StageTimers};
pub use runtime::BoxliteRuntime;
pub use types::{
    BoxOptions, BoxSnapshot, BoxState, ContainerOptions, ContainerSnapshot, ContainerState,
    ContainerUser, PidMode, RuntimeOptions,
};
