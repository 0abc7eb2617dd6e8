//! Prints docs/errors.md from the errors that a CRI client can see, and fails if the file differs.
//!
//! `BOXLITE_BLESS=1` writes the file. Each enum is walked by `error_samples!`, whose match is exhaustive: a new variant does
//! not compile without its row. [`verbs_create_no_status_from_a_code`] keeps errors from bypassing the enums.

use crate::cni::{CniError, ConfError, PluginError};
use crate::convert::{ConvertError, image};
use crate::host_pods::HostPodsError;
use crate::nri::SessionError;
use crate::nri::collect::CollectError;
use crate::server::layer::CallError;
use crate::service::error::ServiceError;
use crate::service::status_of;
use crate::streaming::TooManyPending;
use boxlite_config::size::SizeError;
use boxlite_runtime::error_samples::Sample;
use boxlite_runtime::images::{ImageError, ImageErrorKind};
use boxlite_runtime::{BoxState, ContainerState, EventsEnd, error_samples};
use std::fmt::Write;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tonic::{Code, Status};

const HEADER: &str = "# Errors

Every error that a CRI client can see, with its gRPC code and an example of its text. A test prints this file from the code: one
row for each variant of each error type. Texts name the object as the CRI does (pod sandbox, container, image) with its id or
name, and end with the causes, separated by colons.
";

/// Code, text and action of a class.
struct Row {
    class: String,
    status: Status,
    action: &'static str,
}

fn rows<E>(samples: Vec<Sample<E>>, status: impl Fn(E) -> Status) -> Vec<Row> {
    let row = |sample: Sample<E>| Row {
        class: sample.class,
        status: status(sample.error),
        action: sample.action,
    };
    samples.into_iter().map(row).collect()
}

const EXAMPLE_TIMEOUT: Duration = Duration::from_secs(5);

fn missing() -> io::Error {
    io::Error::from_raw_os_error(2)
}

fn full() -> io::Error {
    io::Error::from_raw_os_error(28)
}

fn requests() -> Vec<Sample<ConvertError>> {
    error_samples! { ConvertError,
        Missing = ConvertError::Missing("config") => "set the field";
        Invalid = ConvertError::invalid("config.devices.host_path", "fuse", "must be an absolute path") =>
            "correct the field";
        Unsupported = ConvertError::unsupported("selinux_options", "s0:c1", "the VM's kernel has no SELinux") =>
            "remove the field, or use another RuntimeClass";
        HostPath = ConvertError::HostPath {
            host_path: "/data".into(), container_path: "/d".into(), reason: "Permission denied".into(),
        } => "correct the path on the node";
        Size = ConvertError::Size(SizeError::TooLarge(5_000_000)) =>
            "lower the memory limit or the RuntimeClass's overhead";
        Size = ConvertError::Size(SizeError::Beyond("memory: 4096 MiB of 2048".into())) =>
            "create the pod again with the new limits";
    }
}

fn verbs() -> Vec<Sample<ServiceError>> {
    let (id, name) = (|| "3f1c".to_owned(), || "web_default_8a2e_0".to_owned());
    let image = || "registry.example/web:1".to_owned();
    error_samples! { ServiceError,
        PodExists = ServiceError::PodExists { name: name(), id: id() } =>
            "remove the other pod sandbox, or use its id";
        PodStarting = ServiceError::PodStarting { id: id() } => "wait for RunPodSandbox";
        PodNotReady = ServiceError::PodNotReady { id: id(), state: BoxState::NotReady } =>
            "none: the kubelet recreates the pod";
        PodTimeout = ServiceError::PodTimeout { name: name(), limit: EXAMPLE_TIMEOUT } =>
            "see the daemon's log for the slow stage; raise the timeout";
        Network = ServiceError::network("set up", &id())(CniError::NoAddress { network: "cni".into() }) =>
            "see the table of the network";
        PodFiles = ServiceError::PodFiles { operation: "write", id: id(), path: "/run/boxlite/pods/3f1c".into(), source: missing() } =>
            "see the cause, and the file system of the path";
        PodFiles = ServiceError::PodFiles { operation: "write", id: id(), path: "/run/boxlite/pods/3f1c".into(), source: full() } =>
            "free space below `state`";
        ContainerExists = ServiceError::ContainerExists { name: "web_0".into(), id: id() } =>
            "remove the other container, or use its id";
        InProgress = ServiceError::InProgress { subject: "container", key: "3f1c/web_0".into() } =>
            "wait for the other call, or use another name";
        ContainerStarted = ServiceError::ContainerStarted { id: id() } => "none";
        ContainerState = ServiceError::ContainerState {
            id: id(), state: ContainerState::Exited, required: ContainerState::Running,
        } => "create the container again";
        LogDirectory = ServiceError::LogDirectory { name: "web_0".into(), path: "/var/log/pods/web".into(), source: missing() } =>
            "see the cause, and the file system of the path";
        LimitBelowUsage = ServiceError::LimitBelowUsage { id: id(), limit: 1 << 20, usage: 1 << 21 } =>
            "raise the limit above the usage";
        StatsTimeout = ServiceError::StatsTimeout { subject: "container", id: id(), limit: EXAMPLE_TIMEOUT } =>
            "retry; if it repeats, see the log of the shim";
        ImageNotFound = ServiceError::ImageNotFound { reference: image() } => "pull the image";
        ImageVolumeNotFound = ServiceError::ImageVolumeNotFound { reference: image(), container_path: "/v".into() } =>
            "pull the image";
        Plugin = ServiceError::Plugin(SessionError::Rejected { plugin: "10-policy".into(), reason: "no mounts".into() }) =>
            "see the table of NRI plugins";
        Adjustment = ServiceError::Adjustment { id: id(), reason: "invalid seccomp policy".into() } =>
            "correct the plugin that is named, or the daemon's log names";
        Sessions = ServiceError::Sessions(TooManyPending) => "close sessions of exec, attach and port-forward";
        Events = ServiceError::Events(EventsEnd::Behind { missed: 3 }) => "none: the kubelet lists and reconnects";
        Events = ServiceError::Events(EventsEnd::Closing) => "none: the kubelet reconnects to the next daemon";
        Unimplemented = ServiceError::Unimplemented { call: "CheckpointContainer", prerequisite: "CRIU in the guest" } =>
            "use another RuntimeClass";
        Panicked = ServiceError::Panicked => "report it with the daemon's log";
        ShuttingDown = ServiceError::ShuttingDown => "none: the call is repeated to the next daemon";
    }
}

fn calls() -> Vec<Sample<CallError>> {
    error_samples! { CallError,
        Deadline = CallError::Deadline => "none: the work continues, and a retry joins it";
        Panicked = CallError::Panicked => "report it with the daemon's log";
    }
}

fn network() -> Vec<Sample<CniError>> {
    let plugin = |source| CniError::Plugin {
        network: "cni".into(),
        command: "ADD",
        plugin: "bridge".into(),
        source,
    };
    error_samples! { CniError,
        Conf = CniError::Conf(ConfError::Missing("/etc/cni/net.d".into())) => "install a network configuration";
        Plugin = plugin(PluginError::Timeout(EXAMPLE_TIMEOUT)) => "see the plugin; raise `cni.timeout_seconds`";
        Plugin = plugin(PluginError::Refused { code: 11, message: "no addresses left".into(), details: String::new() }) =>
            "see the plugin's message";
        NoAddress = CniError::NoAddress { network: "cni".into() } => "add an IPAM plugin to the configuration";
        Namespace = CniError::Namespace { path: "/run/netns/x".into(), step: "mount", source: missing() } =>
            "see the cause, and the mounts below /run/netns";
        Record = CniError::Record { path: "/var/lib/boxlite/cni/x".into(), step: "write", source: missing() } =>
            "see the cause, and the file system of `root`";
    }
}

fn plugins() -> Vec<Sample<SessionError>> {
    let plugin = || "10-policy".to_owned();
    error_samples! { SessionError,
        Refused = SessionError::Refused(crate::nri::Refusal {
            plugin: plugin(), event: "RunPodSandbox", message: "not on this node".into(),
        }) => "see the plugin's message";
        Collect = SessionError::Collect(CollectError::Early { plugin: plugin(), container: "3f1c".into() }) =>
            "correct the plugin";
        Rejected = SessionError::Rejected { plugin: plugin(), reason: "no mounts".into() } => "see the plugin's message";
    }
}

fn images() -> Vec<Sample<ImageError>> {
    let layer = || "layer sha256:77aa".to_owned();
    let host = || "registry.example".to_owned();
    let source = || Box::new(ImageError::Cancelled);
    error_samples! { ImageError,
        InvalidReference = ImageError::InvalidReference { reference: "A B".into(), reason: "contains a space".into() } =>
            "correct the reference";
        NotFound = ImageError::NotFound { subject: "manifest web:1".into(), host: Some(host()) } =>
            "push the image, or correct the tag";
        Unauthorized = ImageError::Unauthorized { host: host(), subject: "manifest web:1".into(), reason: "status 401".into() } =>
            "check the pull secret";
        Status = ImageError::Status { host: host(), subject: layer(), status: 503, message: String::new() } =>
            "check the registry; the kubelet retries";
        Transport = ImageError::Transport { host: host(), subject: layer(), source: Arc::new(missing()) } =>
            "check the network and the registry; the kubelet retries";
        Protocol = ImageError::Protocol { host: host(), subject: layer(), reason: "no Content-Range".into() } =>
            "check the registry and proxies";
        TooSlow = ImageError::TooSlow { host: host(), subject: layer(), rate: 100, minimum: 1024 } =>
            "check the network and the registry; the kubelet retries";
        TimedOut = ImageError::TimedOut { subject: layer(), seconds: 600 } =>
            "check the network and the registry; the kubelet retries";
        AllHosts = ImageError::AllHosts {
            subject: "manifest web:1".into(), attempts: "a: status 503; b: status 404".into(), kind: ImageErrorKind::Unavailable,
        } => "check the hosts that are listed; the code is that of the last";
        Corrupt = ImageError::Corrupt { subject: layer(), expected: "sha256:77aa".into(), got: "sha256:01bc".into() } =>
            "pull again; if it repeats, check the registry and proxies";
        InvalidImage = ImageError::InvalidImage { subject: "config of web:1".into(), reason: "no rootfs".into() } =>
            "rebuild the image";
        LayerEntry = ImageError::LayerEntry { entry: "../etc/passwd".into(), reason: "leaves the root".into() } =>
            "rebuild the image";
        NoPlatform = ImageError::NoPlatform { subject: "web:1".into(), wanted: "linux/amd64".into(), offered: "linux/arm64".into() } =>
            "use an image for the node's architecture";
        InUse = ImageError::InUse { image: "web:1".into(), holders: vec!["3f1c".into()] } =>
            "remove the containers that are named";
        NoSpace = ImageError::NoSpace { operation: "write".into(), path: "/var/lib/boxlite/images".into(), source: Arc::new(full()) } =>
            "free disk space below `root`";
        TooLarge = ImageError::TooLarge { subject: "manifest web:1".into(), limit: 4, unit: "MiB" } => "use a smaller image";
        Config = ImageError::Config { path: "/etc/boxlite/certs.d/a/hosts.toml".into(), reason: "no server".into() } =>
            "correct the file that is named";
        Cancelled = ImageError::Cancelled => "none: the client disconnected";
        Io = ImageError::Io { operation: "write".into(), path: "/var/lib/boxlite/images".into(), source: Arc::new(missing()) } =>
            "see the cause, and the file system of `root`";
        Layer = ImageError::Layer { digest: "sha256:77aa".into(), source: source() } => "as the cause";
        Pull = ImageError::Pull { reference: "web:1".into(), source: source() } => "as the cause";
        Lost = ImageError::Lost { subject: "conversion of a layer" } => "report it with the daemon's log";
    }
}

fn host_pods() -> Vec<Sample<HostPodsError>> {
    let endpoint = || "/run/containerd/containerd.sock".into();
    error_samples! { HostPodsError,
        Unreachable = HostPodsError::Unreachable { endpoint: endpoint(), reason: "Connection refused".into() } =>
            "start containerd; the containers of its pods keep running";
        Timeout = HostPodsError::Timeout { endpoint: endpoint(), limit: EXAMPLE_TIMEOUT } => "see containerd's log";
        AmbiguousId = HostPodsError::AmbiguousId { subject: "pod sandbox", prefix: "3f".into(), count: 2 } => "use a longer prefix";
        Image = HostPodsError::Image { reference: "registry.example/web:1".into(), reason: "status 401".into() } =>
            "none: the kubelet pulls the image again, with credentials";
    }
}

fn network_status(source: CniError) -> Status {
    ServiceError::network("set up", "3f1c")(source).into()
}

fn tables() -> Vec<(&'static str, Vec<Row>)> {
    vec![
        ("Fields of a request", rows(requests(), Status::from)),
        (
            "State of pod sandboxes and containers",
            rows(verbs(), Status::from),
        ),
        ("Calls", rows(calls(), |error| error.status())),
        ("Runtime", rows(error_samples::runtime(), status_of)),
        ("Guest", rows(error_samples::guest(), status_of)),
        ("Network", rows(network(), network_status)),
        (
            "NRI plugins",
            rows(plugins(), |error| ServiceError::Plugin(error).into()),
        ),
        ("Images", rows(images(), |error| image::status(&error))),
        ("Host pods", rows(host_pods(), Status::from)),
    ]
}

fn document() -> String {
    let mut text = HEADER.to_owned();
    for (title, rows) in tables() {
        let _ = write!(
            text,
            "\n## {title}\n\n| class | code | text | action |\n|---|---|---|---|\n"
        );
        for row in rows {
            let (code, message) = (row.status.code(), row.status.message());
            let _ = writeln!(
                text,
                "| {} | {code:?} | `{message}` | {} |",
                row.class, row.action
            );
        }
    }
    text
}

#[test]
fn errors_document_matches_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/errors.md");
    let text = document();
    if std::env::var_os("BOXLITE_BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
}

/// Texts that an operator would have to decode.
#[test]
fn errors_use_the_terms_of_the_cri() {
    for (title, rows) in tables() {
        for row in rows {
            let message = row.status.message();
            let words: Vec<_> = message.split(|c: char| !c.is_alphanumeric()).collect();
            let private = ["box", "portal", "ttrpc", "litebox", "Execution"];
            let decoded = private.into_iter().find(|word| words.contains(word));
            assert_eq!(decoded, None, "{title}, {}: {message:?}", row.class);
            assert!(
                !message.contains('\n') && !message.ends_with('.'),
                "{message:?}"
            );
            assert_ne!(row.status.code(), Code::Unknown, "{message:?}");
        }
    }
}

#[test]
fn verbs_create_no_status_from_a_code() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/service");
    let mut pending = vec![directory];
    let mut mistakes = Vec::new();
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() && name != "tests" {
                pending.push(path);
            } else if name.ends_with(".rs") && name != "error.rs" && name != "tests.rs" {
                let text = std::fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
                mistakes.extend(bypasses(code).map(|line| format!("{name}: {line}")));
            }
        }
    }
    assert!(mistakes.is_empty(), "{mistakes:#?}");
    assert_eq!(
        bypasses("Err(Status::not_found(\"x\"))\nStatus::from(error)").count(),
        1
    );
}

/// Returns the lines that create a status from a code and a text.
fn bypasses(code: &str) -> impl Iterator<Item = &str> {
    code.lines().filter(|line| {
        let call = line.split("Status::").nth(1).unwrap_or_default();
        let name = call.split('(').next().unwrap_or_default();
        call.contains('(')
            && !matches!(name, "" | "from" | "message" | "code")
            && name.chars().all(|c| c.is_ascii_lowercase() || c == '_')
    })
}
