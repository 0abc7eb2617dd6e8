//! Prints docs/errors.md from the error classes that a CRI client can see, and fails if the file differs.
//!
//! `BOXLITE_BLESS=1` writes the file. The matches are exhaustive: a new class does not compile without its row.

use crate::convert::{ConvertError, image, status};
use boxlite_config::size::SizeError;
use boxlite_runtime::ErrorKind;
use boxlite_runtime::images::ImageErrorKind;
use std::fmt::Write;
use std::path::Path;
use tonic::{Code, Status};

const HEADER: &str = "# Errors

Every error of the CRI names its object (pod sandbox, container, image), its id or name, and the causes. The tables list the
classes with their gRPC codes; a test prints this file from the code.
";

/// Class, code, beginning of the text, and action.
type Row = (&'static str, Code, &'static str, &'static str);

macro_rules! classes {
    ($name:ident, $kind:ident, $code:path, $($variant:ident: $text:literal, $action:literal;)*) => {
        fn $name() -> Vec<Row> {
            fn is_complete(kind: $kind) {
                match kind {
                    $($kind::$variant => {})*
                }
            }
            let _ = is_complete;
            vec![$((stringify!($variant), $code($kind::$variant), $text, $action)),*]
        }
    };
}

classes! { runtime, ErrorKind, status::code,
    NotFound: "container \"c1\" not found", "none: the object was removed; list again";
    AlreadyExists: "pod sandbox \"web\" already exists", "remove the other object, or use its id";
    InvalidArgument: "invalid <field> <value>", "correct the field";
    FailedPrecondition: "container \"c1\" is exited", "bring the object into the required state first";
    DeadlineExceeded: "the guest did not answer within 2s", "retry; if it repeats, see the log of the shim";
    ResourceExhausted: "too many …, no space left", "free memory, disk space or devices on the node";
    Unavailable: "pod sandbox \"p1\" is not running", "the kubelet recreates the pod; see its log for the cause";
    Internal: "failed to <verb> <object>", "report it with the daemon's log";
}

classes! { images, ImageErrorKind, image::code,
    InvalidReference: "invalid image reference", "correct the reference";
    NotFound: "manifest … not found", "push the image, or correct the tag";
    Unauthorized: "<host> denied access", "check the pull secret";
    Corrupt: "layer … is corrupt", "pull again; if it repeats, check the registry and proxies";
    InvalidImage: "invalid layer entry", "rebuild the image";
    NoPlatform: "no manifest for platform", "use an image for the node's architecture";
    InUse: "image … is in use by", "remove the containers that are named";
    NoSpace: "no space left on the file system", "free disk space below `root`";
    TooLarge: "… exceeds the limit", "use a smaller image";
    Unavailable: "failed to get … from <host>", "check the network and the registry; the kubelet retries";
    Cancelled: "the pull was canceled", "none: the client disconnected";
    Config: "invalid hosts.toml", "correct the file that is named";
    Internal: "internal error", "report it with the daemon's log";
}

macro_rules! refusals {
    ($name:ident, $($class:ident($pattern:pat, $sample:expr): $text:literal, $action:literal;)*) => {
        /// Rows of requests that are rejected before anything is created.
        fn $name() -> Vec<Row> {
            fn is_complete(error: &ConvertError) {
                match error {
                    $($pattern => {})*
                }
            }
            let row = |class, error: ConvertError, text, action| {
                is_complete(&error);
                (class, Status::from(error).code(), text, action)
            };
            vec![$(row(stringify!($class), $sample, $text, $action)),*]
        }
    };
}

refusals! { requests,
    Missing(ConvertError::Missing(_), ConvertError::Missing("config")):
        "<field> is missing", "set the field";
    Invalid(ConvertError::Invalid { .. }, ConvertError::invalid("field", "value", "reason")):
        "invalid <field> <value>: <reason>", "correct the field";
    Unsupported(ConvertError::Unsupported { .. }, ConvertError::unsupported("field", "value", "reason")):
        "unsupported <field> <value>: <reason>", "remove the field, or use another RuntimeClass";
    HostPath(ConvertError::HostPath { .. }, ConvertError::HostPath {
        host_path: "/a".into(),
        container_path: "/b".into(),
        reason: "reason".into(),
    }): "failed to mount host path <path> at <path>", "correct the path on the node";
    TooLarge(ConvertError::Size(SizeError::TooLarge(_)), ConvertError::Size(SizeError::TooLarge(1))):
        "invalid memory limit: … MiB are more than a VM can have", "lower the memory limit or the RuntimeClass's overhead";
    Beyond(ConvertError::Size(SizeError::Beyond(_)), ConvertError::Size(SizeError::Beyond(String::new()))):
        "…; a VM does not grow while it runs", "create the pod again with the new limits";
}

fn document() -> String {
    let mut text = HEADER.to_owned();
    for (title, rows) in [
        ("Requests", requests()),
        ("Pod sandboxes and containers", runtime()),
        ("Images", images()),
    ] {
        let _ = write!(
            text,
            "\n## {title}\n\n| class | code | text | what to do |\n|---|---|---|---|\n"
        );
        for (class, code, example, action) in rows {
            let _ = writeln!(text, "| {class} | {code:?} | `{example}` | {action} |");
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
