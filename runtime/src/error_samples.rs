//! One sample of each error of this crate and of `boxlite-portal`, for the list of errors that cri-server's tests print.
//!
//! Compiled for tests only. The matches of [`error_samples!`](crate::error_samples) are exhaustive: a new variant does not
//! compile without a sample and an action.

use crate::error::{ErrorKind, RuntimeError};
use crate::metrics::Stage;
use crate::types::ContainerState;
use boxlite_portal::{GuestErrorKind, PortalError};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// An error with its variant's name and the operator's action.
#[derive(Debug)]
pub struct Sample<E> {
    /// Name of the variant.
    pub class: String,
    /// Error of that variant.
    pub error: E,
    /// Action of an operator.
    pub action: &'static str,
}

/// Returns a `Vec<Sample<_>>` with the given errors of an enum; each variant must be there at least once.
#[macro_export]
macro_rules! error_samples {
    ($error:ident, $($variant:ident = $sample:expr => $action:literal;)*) => {{
        #[allow(unreachable_patterns, reason = "a variant may have several samples")]
        fn variant(error: &$error) -> &'static str {
            match error {
                $($error::$variant { .. } => stringify!($variant),)*
            }
        }
        let samples = vec![$($crate::error_samples::Sample {
            class: stringify!($variant).to_owned(),
            error: $sample,
            action: $action,
        }),*];
        for sample in &samples {
            assert_eq!(sample.class, variant(&sample.error), "class of a sample");
        }
        samples
    }};
}

const EXAMPLE_TIMEOUT: Duration = Duration::from_secs(5);

fn not_found() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

fn full() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOSPC)
}

/// Returns the errors of the runtime. Those of calls into a guest are in [`guest`].
pub fn runtime() -> Vec<Sample<RuntimeError>> {
    let id = || "3f1c".to_owned();
    error_samples! { RuntimeError,
        NotFound = RuntimeError::NotFound { subject: "container", id: id() } =>
            "none: the object was removed; list again";
        AmbiguousId = RuntimeError::AmbiguousId { subject: "pod sandbox", prefix: "3f".into(), count: 2 } =>
            "use a longer prefix of the id";
        AlreadyExists = RuntimeError::AlreadyExists {
            subject: "pod sandbox", id: id(), reason: "with other options".into(),
        } => "remove the other object, or use its id";
        InvalidArgument = RuntimeError::InvalidArgument {
            field: "container id", value: "a/b".into(), reason: "must consist of letters and digits".into(),
        } => "correct the field";
        Denied = RuntimeError::Denied { id: id(), denied: crate::box_state::Denied::Stopped } =>
            "run a new pod sandbox; the kubelet does";
        ContainerState = RuntimeError::ContainerState {
            id: id(), state: ContainerState::Exited, reason: "an exited container cannot be started again",
        } => "bring the container into the required state first";
        Start = RuntimeError::Start {
            id: id(), stage: Stage::Image, source: Arc::new(missing()),
        } => "see the cause; `boxlite-cri check` verifies the installation";
        BoxGone = RuntimeError::BoxGone { id: id(), reason: "the VM exited with signal 9".into() } =>
            "none: the kubelet recreates the pod; the daemon's log has the cause";
        Missing = missing() => "install the file, or correct the key below `[paths]`";
        Io = RuntimeError::Io { operation: "write", path: "/var/lib/boxlite/x".into(), source: not_found() } =>
            "see the cause, and the file system of the path";
        Io = RuntimeError::Io { operation: "write", path: "/var/lib/boxlite/x".into(), source: full() } =>
            "free disk space below `root`";
        Database = RuntimeError::Database {
            path: "/var/lib/boxlite/boxes.db".into(),
            operation: "insert a pod sandbox",
            source: rusqlite::Error::InvalidQuery,
        } => "see the cause, and the file system of `root`";
        DatabaseSchema = RuntimeError::DatabaseSchema { path: "/var/lib/boxlite/boxes.db".into(), found: 9, known: 8 } =>
            "install the version that wrote the database, or drain the node and remove the file";
        ShimProgram = RuntimeError::ShimProgram { action: "start", reason: "exit status 1: no such file".into() } =>
            "see the reason; `boxlite-cri check` verifies the installation";
        Shim = RuntimeError::Shim {
            action: "create container \"3f1c\"".into(),
            kind: ErrorKind::InvalidArgument,
            message: "invalid working_dir: /etc/passwd: not a directory".into(),
        } => "see the cause; the code is that of the cause";
        ShimConnection = RuntimeError::ShimConnection {
            action: "start container \"3f1c\"".into(), reason: "connection reset".into(),
        } => "none: the kubelet recreates the pod; the log of the shim has the cause";
        Deadline = RuntimeError::Deadline {
            detail: "container \"3f1c\" did not exit after SIGKILL".into(), limit: EXAMPLE_TIMEOUT,
        } => "retry; if it repeats, see the log of the shim";
        Portal = RuntimeError::Portal(deadline()) => "as the errors of the guest";
        Guest = RuntimeError::Guest { action: action(), source: deadline() } => "as the errors of the guest";
        Image = RuntimeError::Image {
            image: "sha256:3f1c".into(),
            operation: "find the layers of",
            kind: ErrorKind::NotFound,
            source: "layer sha256:77aa not found".into(),
        } => "pull the image again; the code is that of the cause";
        Shared = RuntimeError::Shared(Arc::new(missing())) => "as the error that it repeats";
        ShuttingDown = RuntimeError::ShuttingDown => "none: the call is repeated to the next daemon";
        Internal = RuntimeError::Internal { detail: "failed to encode the OCI spec".into() } =>
            "report it with the daemon's log";
    }
}

fn missing() -> RuntimeError {
    RuntimeError::Missing {
        subject: "guest kernel",
        path: "/usr/local/lib/libkrunfw.so.5".into(),
        source: not_found(),
    }
}

fn action() -> String {
    "run a command in container \"3f1c\"".into()
}

fn deadline() -> PortalError {
    PortalError::Deadline {
        call: "Execution.Exec",
        limit: EXAMPLE_TIMEOUT,
    }
}

/// Returns the errors of a call into a guest.
pub fn guest() -> Vec<Sample<RuntimeError>> {
    let refusals = refusals().into_iter().map(|(kind, message, action)| {
        let error = PortalError::Guest {
            call: "Execution.Exec",
            kind,
            subject: "process".into(),
            message: message.into(),
        };
        Sample {
            class: format!("Guest, {kind:?}"),
            error,
            action,
        }
    });
    let others = error_samples! { PortalError,
        Guest = PortalError::Guest {
            call: "Execution.Exec",
            kind: GuestErrorKind::Unspecified,
            subject: String::new(),
            message: "exit status 3".into(),
        } => "report it with the log of the shim";
        Deadline = deadline() => "retry; if it repeats, see the log of the shim";
        Transport = PortalError::Transport {
            call: "Execution.Exec",
            source: Box::new(tonic::Status::unavailable("broken pipe")),
        } => "none: the kubelet recreates the pod if its VM has ended";
        Connect = PortalError::Connect { path: "/run/boxlite/s/3f1c/vm.sock".into(), source: not_found() } =>
            "none: the kubelet recreates the pod if its VM has ended";
        Protocol = PortalError::Protocol { call: "Execution.Exec", what: "an offset beyond the end".into() } =>
            "delete the pod: its guest does not behave as an agent of this version";
        ExecDeadline = PortalError::ExecDeadline { what: "command \"sleep\" in container \"3f1c\"".into(), limit: EXAMPLE_TIMEOUT } =>
            "none: the command took longer than the probe's timeout";
    };
    let all = refusals.chain(others).map(|sample| Sample {
        class: sample.class,
        error: RuntimeError::Guest {
            action: action(),
            source: sample.error,
        },
        action: sample.action,
    });
    all.collect()
}

/// Returns kind, message and action of each refusal of the agent.
fn refusals() -> Vec<(GuestErrorKind, &'static str, &'static str)> {
    use GuestErrorKind as K;
    let all = [
        (
            K::NotFound,
            "container \"3f1c\" not found",
            "none: the object was removed; list again",
        ),
        (
            K::AlreadyExists,
            "container \"3f1c\" already exists",
            "remove the other object first",
        ),
        (
            K::InvalidArgument,
            "invalid working_dir: /x: not a directory",
            "correct the field",
        ),
        (
            K::WrongState,
            "container 3f1c is exited: cannot exec",
            "bring the container into the required state first",
        ),
        (
            K::Resources,
            "too many processes (maximum 4096)",
            "end processes of the container, or raise its limits",
        ),
        (
            K::OutputGone,
            "the output before offset 65536 is gone",
            "report it with the log of the shim",
        ),
        (
            K::UserNotFound,
            "unable to find user web: no matching entries in passwd file",
            "correct the user",
        ),
        (
            K::ExecutableNotFound,
            "exec: \"nosuch\": executable file not found in $PATH",
            "correct the command",
        ),
        (
            K::Rootfs,
            "failed to open /etc: No such file or directory",
            "check the image",
        ),
        (
            K::Mount,
            "failed to mount tmpfs at /x: Invalid argument",
            "correct the mount and its options",
        ),
        (
            K::Internal,
            "failed to create a session",
            "report it with the log of the shim",
        ),
    ];
    for number in 1.. {
        let Ok(kind) = K::try_from(number) else {
            break;
        };
        let listed = all.iter().any(|(listed, ..)| *listed == kind);
        assert!(listed, "no sample of {kind:?}");
    }
    all.into()
}
