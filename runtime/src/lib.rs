//! Boxes (one VM per pod), their images, shims and the Portal into their guests: everything boxlite-cri does that is
//! not CRI.
//!
//! Knows paths, images and the database; knows neither CRI types (cri-server converts) nor a VMM (shim-v2 does).
//!
//! [`BoxliteRuntime`] holds all boxes; a [`LiteBox`] is one. Starting, stopping and exits go through the shim
//! (`shim_controller`), exec and stats through `boxlite-portal`.

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
