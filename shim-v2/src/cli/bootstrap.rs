//! The two ends of `start`: what containerd says (flags, environment, standard input) and what it wants to hear.
//!
//! Four dialects, told apart by what comes in; nothing is started here.
//!
//! | containerd | in | out |
//! |---|---|---|
//! | 1.6 | flags, environment | the plain address |
//! | 1.7–2.2 | the same and MAX_SHIM_VERSION=2 | JSON, version 2 |
//! | boxlite-cri | the same and MAX_SHIM_VERSION=3 | JSON, version 3 |
//! | 2.3 | BootstrapParams (protobuf) on standard input | BootstrapResult (protobuf) |
//!
//! The crate containerd-shim reads these too, but keeps its reader private and never answers 1.6.

use super::CliError;
use boxlite_proto::shim::shim::RuntimeOptions;
use containerd_shim::Flags;
use containerd_shim_protos::TASK_API_VERSION;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use std::io::{IsTerminal, Read};

/// End of the type URL of a runtime handler's options.
const RUNTIME_OPTIONS_TYPE: &str = "runtimeoptions.v1.Options";
/// Largest bootstrap message, in bytes; containerd's own limit.
const INPUT_LIMIT: u64 = 10 << 20;

/// How `start` must answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// The address and nothing else.
    Plain,
    /// JSON with the highest task API version both sides speak.
    Json { version: i32 },
    /// A BootstrapResult message.
    Protobuf,
}

/// What `start` was asked for, whatever the dialect.
#[derive(Debug, Clone, PartialEq)]
pub struct StartRequest {
    /// Where events go; empty: nowhere.
    pub events_address: String,
    /// containerd's own socket: its directory holds the shim's.
    pub address: String,
    /// Directory for the shim's socket, where containerd names one.
    pub socket_dir: Option<String>,
    /// Whether debug messages are wanted.
    pub debug: bool,
    /// How to answer.
    pub dialect: Dialect,
    /// The runtime handler's options, where containerd sends some.
    pub options: Option<RuntimeOptions>,
}

/// Reads standard input and the environment.
///
/// # Errors
/// When standard input cannot be read, or carries a message meant for another shim.
pub fn read(flags: &Flags) -> Result<StartRequest, CliError> {
    let mut input = Vec::new();
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        stdin
            .lock()
            .take(INPUT_LIMIT)
            .read_to_end(&mut input)
            .map_err(CliError::io("read", "standard input"))?;
    }
    parse(flags, &input, |name| std::env::var(name).ok())
}

/// As [`read`], on given input and environment.
///
/// # Errors
/// See [`read`].
pub fn parse(
    flags: &Flags,
    input: &[u8],
    env: impl Fn(&str) -> Option<String>,
) -> Result<StartRequest, CliError> {
    if let Some(params) = parse_params(flags, input)? {
        let debug = flags.debug || params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG as i32;
        return Ok(StartRequest {
            events_address: params.containerd_ttrpc_address,
            address: params.containerd_grpc_address,
            socket_dir: params.socket_dir.filter(|dir| !dir.is_empty()),
            debug,
            dialect: Dialect::Protobuf,
            options: params
                .extensions
                .iter()
                .find_map(|extension| runtime_options(&extension.value)),
        });
    }
    let address = if flags.address.is_empty() {
        env("GRPC_ADDRESS").unwrap_or_default()
    } else {
        flags.address.clone()
    };
    let dialect = match env("MAX_SHIM_VERSION").and_then(|text| text.parse::<i32>().ok()) {
        Some(most) => Dialect::Json {
            version: most.clamp(2, TASK_API_VERSION),
        },
        None => Dialect::Plain,
    };
    Ok(StartRequest {
        events_address: env("TTRPC_ADDRESS").unwrap_or_default(),
        address,
        socket_dir: None,
        debug: flags.debug,
        dialect,
        options: Any::parse_from_bytes(input)
            .ok()
            .and_then(|any| runtime_options(&any)),
    })
}

/// The options of a runtime handler; None for those of another runtime (ctr sends runc's whatever the runtime).
fn runtime_options(any: &Any) -> Option<RuntimeOptions> {
    if !any.type_url.ends_with(RUNTIME_OPTIONS_TYPE) {
        return None;
    }
    RuntimeOptions::parse_from_bytes(&any.value).ok()
}

/// BootstrapParams, or None where the input is empty or older: runtime options (an `Any`) decode as BootstrapParams
/// with the type URL as id and the value as namespace, and nothing else.
fn parse_params(flags: &Flags, input: &[u8]) -> Result<Option<BootstrapParams>, CliError> {
    if input.is_empty() {
        return Ok(None);
    }
    let Ok(params) = BootstrapParams::parse_from_bytes(input) else {
        return Ok(None);
    };
    if params.instance_id == flags.id && params.namespace == flags.namespace {
        return Ok(Some(params));
    }
    let bare = BootstrapParams {
        instance_id: params.instance_id.clone(),
        namespace: params.namespace.clone(),
        ..Default::default()
    };
    if params == bare {
        return Ok(None);
    }
    Err(CliError::Bootstrap {
        reason: format!(
            "it is for {}/{}, the flags say {}/{}",
            params.namespace, params.instance_id, flags.namespace, flags.id
        ),
    })
}

/// The answer of `start` for a shim that serves at `address` (with `unix://`).
///
/// # Errors
/// When the message cannot be encoded.
pub fn answer(dialect: Dialect, address: &str) -> Result<Vec<u8>, CliError> {
    match dialect {
        Dialect::Plain => Ok(address.as_bytes().to_vec()),
        Dialect::Json { version } => Ok(serde_json::json!({
            "version": version,
            "address": address,
            "protocol": "ttrpc",
        })
        .to_string()
        .into_bytes()),
        Dialect::Protobuf => BootstrapResult {
            version: TASK_API_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".to_owned(),
            ..Default::default()
        }
        .write_to_bytes()
        .map_err(CliError::Encode),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Flags {
        containerd_shim::parse(&[
            "-namespace",
            "k8s.io",
            "-id",
            "abc",
            "-address",
            "/run/c/c.sock",
            "start",
        ])
        .expect("valid flags")
    }

    #[test]
    fn containerd_1_6_hears_the_plain_address() {
        let request = parse(&flags(), &[], |_| None).expect("valid");
        assert_eq!(request.dialect, Dialect::Plain);
        assert_eq!(request.address, "/run/c/c.sock");
        assert_eq!(
            answer(request.dialect, "unix:///x").expect("encodes"),
            b"unix:///x"
        );
    }

    #[test]
    fn the_version_is_the_highest_both_speak() {
        for (most, version) in [("2", 2), ("3", 3), ("7", 3), ("1", 2)] {
            let env = |name: &str| (name == "MAX_SHIM_VERSION").then(|| most.to_owned());
            let request = parse(&flags(), &[], env).expect("valid");
            assert_eq!(request.dialect, Dialect::Json { version });
        }
    }

    #[test]
    fn containerd_2_3_sends_and_hears_protobuf() {
        let params = BootstrapParams {
            instance_id: "abc".to_owned(),
            namespace: "k8s.io".to_owned(),
            containerd_ttrpc_address: "/run/c/c.sock.ttrpc".to_owned(),
            containerd_grpc_address: "/run/d/c.sock".to_owned(),
            socket_dir: Some("/run/d/s".to_owned()),
            ..Default::default()
        };
        let input = params.write_to_bytes().expect("encodes");
        let request = parse(&flags(), &input, |_| None).expect("valid");
        assert_eq!(request.dialect, Dialect::Protobuf);
        assert_eq!(request.socket_dir.as_deref(), Some("/run/d/s"));
        let answer = answer(request.dialect, "unix:///x").expect("encodes");
        let result = BootstrapResult::parse_from_bytes(&answer).expect("decodes");
        assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    }

    #[test]
    fn a_message_for_another_shim_is_refused_and_runtime_options_are_not() {
        let other = BootstrapParams {
            instance_id: "xyz".to_owned(),
            namespace: "k8s.io".to_owned(),
            containerd_version: "2.3.0".to_owned(),
            ..Default::default()
        };
        let input = other.write_to_bytes().expect("encodes");
        assert!(matches!(
            parse(&flags(), &input, |_| None),
            Err(CliError::Bootstrap { .. })
        ));

        let options = Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            value: b"x".to_vec(),
            ..Default::default()
        };
        let input = options.write_to_bytes().expect("encodes");
        let request = parse(&flags(), &input, |_| None).expect("valid");
        assert_eq!((request.dialect, request.options), (Dialect::Plain, None));
    }

    #[test]
    fn a_runtime_handlers_options_are_found() {
        let value = RuntimeOptions {
            config_path: "/etc/x.toml".to_owned(),
            ..Default::default()
        };
        let any = Any {
            type_url: "runtimeoptions.v1.Options".to_owned(),
            value: value.write_to_bytes().expect("encodes"),
            ..Default::default()
        };
        let input = any.write_to_bytes().expect("encodes");
        let request = parse(&flags(), &input, |_| None).expect("valid");
        assert_eq!(request.options, Some(value));
    }
}
