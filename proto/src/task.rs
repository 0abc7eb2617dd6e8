//! What boxlite-cri adds to a task's OCI spec when it asks the shim to create it: the `options` of Task.Create.
//!
//! containerd never sends it; a shim that gets none takes the defaults and reads the rest from the spec.

use serde::{Deserialize, Serialize};

/// JSON under [`crate::names::TASK_OPTIONS_TYPE`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskOptions {
    /// PID namespace of the container.
    pub pid_mode: TaskPidMode,
    /// Id of the container whose PID namespace is joined ([`TaskPidMode::Target`]).
    pub pid_target: String,
    /// Keep a stdin open that Portal clients may write to, though no stdin path is given.
    pub stdin: bool,
    /// Close it after the first writer's EOF.
    pub stdin_once: bool,
}

/// Which PID namespace; `PidMode` of the guest protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskPidMode {
    /// Its own.
    #[default]
    Container,
    /// The pod's.
    Pod,
    /// That of another container.
    Target,
}
