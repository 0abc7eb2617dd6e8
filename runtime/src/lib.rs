//! Boxes (one VM per pod), their images, shims and the Portal into their guests: everything boxlite-cri does that is
//! not CRI.
//!
//! Knows paths, images and the database; knows neither CRI types (cri-server converts) nor a VMM (shim-v2 does).
//!
//! [`BoxliteRuntime`] holds all boxes; a [`LiteBox`] is one. Starting, stopping and exits go through the shim
//! (`shim_controller`), exec and stats through the [`portal`].

mod database;
pub mod error;
pub mod events;
#[cfg(any(test, feature = "fake-shim"))]
pub mod fake_shim;
pub mod filesystem_layout;
pub mod images;
pub mod init_rootfs;
pub mod litebox;
pub mod management;
pub mod metrics;
pub mod portal;
mod recovery;
pub mod runtime;
pub mod shim_controller;
pub mod types;
pub mod unix_socket;
pub mod vmm_probe;

pub use error::{ErrorKind, Result, RuntimeError, report};
pub use events::{BoxEvent, EventKind, Events, EventsEnd};
pub use litebox::{LiteBox, ProcessControls, ProcessSession};
pub use metrics::{BoxMetricsSnapshot, RuntimeMetricsSnapshot, Stage, StageTimers};
pub use portal::ExecOutput;
pub use runtime::BoxliteRuntime;
pub use types::{
    BoxOptions, BoxSnapshot, BoxState, ContainerOptions, ContainerSnapshot, ContainerState,
    ContainerUser, PidMode, RuntimeOptions,
};
