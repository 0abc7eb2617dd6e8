//! Input and output of `start`: flags, environment and standard input, and the response to containerd.
//!
//! There are four dialects, distinguished by the input:
//!
//! | containerd | input | output |
//! |---|---|---|
//! | 1.6 | flags, environment | the plain address |
//! | 1.7–2.2 | the same and MAX_SHIM_VERSION=2 | JSON, version 2 |
//! | boxlite-cri | the same and MAX_SHIM_VERSION=3 | JSON, version 3 |
//! | 2.3 | BootstrapParams (protobuf) on standard input | BootstrapResult (protobuf) |

use super::CliError;
use crate::flags::Flags;
use boxlite_proto::shim::shim::RuntimeOptions;
use containerd_shim_protos::TASK_API_VERSION;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use std::io::{IsTerminal, Read};

/// Suffix of the type URL of a runtime handler's options.
const RUNTIME_OPTIONS_TYPE: &str = "runtimeoptions.v1.Options";
/// Maximum size of a bootstrap message, the same as containerd's.
const MAX_INPUT_BYTES: u64 = 10 << 20;

/// Response format of `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// The plain address.
    Plain,
    /// JSON with the highest task API version that both sides support.
    Json { version: i32 },
    /// A BootstrapResult message.
    Protobuf,
}

/// A request to `start`, independent of the dialect.
#[derive(Debug, Clone, PartialEq)]
pub struct StartRequest {
    /// Address of the event service; empty if there is none.
    pub events_address: String,
    /// containerd's socket, whose directory contains the shim sockets.
    pub address: String,
    /// Directory for the shim's socket, if containerd names one.
    pub socket_dir: Option<String>,
    /// True to log debug messages.
    pub debug: bool,
    /// Response format.
    pub dialect: Dialect,
    /// Options of the runtime handler, if containerd sends any.
    pub options: Option<RuntimeOptions>,
}

/// Reads the request from standard input and the environment.
///
/// # Errors
/// Standard input cannot be read, or contains a message for another shim.
pub fn read(flags: &Flags) -> Result<StartRequest, CliError> {
    let mut input = Vec::new();
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        stdin
            .lock()
            .take(MAX_INPUT_BYTES)
            .read_to_end(&mut input)
            .map_err(CliError::io("read", "standard input"))?;
    }
    parse(flags, &input, |name| std::env::var(name).ok())
}

/// Parses a request from the given input and environment; see [`read`].
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

/// Decodes the options of the runtime handler; None for options of another runtime (ctr always sends runc's).
fn runtime_options(any: &Any) -> Option<RuntimeOptions> {
    if !any.type_url.ends_with(RUNTIME_OPTIONS_TYPE) {
        return None;
    }
    RuntimeOptions::parse_from_bytes(&any.value).ok()
}

/// Decodes BootstrapParams; None for empty input or the older runtime options. Those are an `Any`, which decodes as
/// BootstrapParams with the type URL as id, the value as namespace, and no other field.
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
            "it is for {}/{}, but the flags specify {}/{}",
            params.namespace, params.instance_id, flags.namespace, flags.id
        ),
    })
}

/// Encodes the response of `start` for a shim that serves at `address` (with `unix://`).
///
/// # Errors
/// The message cannot be encoded.
pub fn response(dialect: Dialect, address: &str) -> Result<Vec<u8>, CliError> {
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
        Flags::parse(&[
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
    fn response_for_containerd_1_6_is_the_plain_address() {
        let request = parse(&flags(), &[], |_| None).expect("valid");
        assert_eq!(request.dialect, Dialect::Plain);
        assert_eq!(request.address, "/run/c/c.sock");
        assert_eq!(
            response(request.dialect, "unix:///x").expect("encodes"),
            b"unix:///x"
        );
    }

    #[test]
    fn parse_selects_highest_common_version() {
        for (most, version) in [("2", 2), ("3", 3), ("7", 3), ("1", 2)] {
            let env = |name: &str| (name == "MAX_SHIM_VERSION").then(|| most.to_owned());
            let request = parse(&flags(), &[], env).expect("valid");
            assert_eq!(request.dialect, Dialect::Json { version });
        }
    }

    #[test]
    fn parse_and_respond_containerd_2_3_use_protobuf() {
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
        let response = response(request.dialect, "unix:///x").expect("encodes");
        let result = BootstrapResult::parse_from_bytes(&response).expect("decodes");
        assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    }

    #[test]
    fn parse_message_for_another_shim_is_an_error() {
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
    fn parse_finds_runtime_handler_options() {
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
