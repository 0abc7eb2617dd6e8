//! Reads one TOML table key by key and keeps every mistake: wrong type, wrong value, and what nobody asked for.
//!
//! serde's `deny_unknown_fields` would stop at the first one; an operator wants them all in one go. It knows no key of its own:
//! `super` names them.

use super::Mistake;
use boxlite_proto::vmm::{Acceleration, VmmKind};
use std::net::{IpAddr, SocketAddr};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;
use toml::Value;

/// Longest wait that can be configured. A day: beyond it the operator means "never", which nothing here does.
const SECONDS_LIMIT: i64 = 86_400;
/// Longest unix socket path the kernel takes, in bytes (`sun_path` less its NUL).
const SOCKET_PATH_LIMIT: usize = 107;

/// A table on its way to a struct.
pub struct Section {
    prefix: String,
    table: toml::Table,
    mistakes: Vec<Mistake>,
}

impl Section {
    /// The file's own table.
    pub fn top(table: toml::Table) -> Self {
        Self {
            prefix: String::new(),
            table,
            mistakes: Vec::new(),
        }
    }

    /// The sub-table `name`, empty where the file has none.
    pub fn section(&mut self, name: &str) -> Self {
        let mut section = Self {
            prefix: format!("{name}."),
            table: toml::Table::new(),
            mistakes: Vec::new(),
        };
        match self.table.remove(name) {
            None => {}
            Some(Value::Table(table)) => section.table = table,
            Some(other) => self.mistakes.push(Mistake {
                key: name.to_owned(),
                value: shown(&other),
                reason: "must be a table".into(),
            }),
        }
        section
    }

    /// The value of `key` by `read`, or `default` where the file has none or a wrong one.
    pub fn take<T>(
        &mut self,
        key: &str,
        default: T,
        read: impl FnOnce(&Value) -> Result<T, String>,
    ) -> T {
        let Some(value) = self.table.remove(key) else {
            return default;
        };
        read(&value).unwrap_or_else(|reason| {
            self.mistakes.push(Mistake {
                key: format!("{}{key}", self.prefix),
                value: shown(&value),
                reason,
            });
            default
        })
    }

    /// Hands over the mistakes; what is left in the table is unknown.
    pub fn finish(self, mistakes: &mut Vec<Mistake>) {
        mistakes.extend(self.mistakes);
        mistakes.extend(self.table.into_iter().map(|(key, value)| Mistake {
            key: format!("{}{key}", self.prefix),
            value: shown(&value),
            reason: "unknown key".into(),
        }));
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Table(_) => String::new(),
        other => other.to_string(),
    }
}

fn text(value: &Value) -> Result<&str, String> {
    value.as_str().ok_or_else(|| "must be a string".into())
}

/// true or false.
pub fn boolean(value: &Value) -> Result<bool, String> {
    value
        .as_bool()
        .ok_or_else(|| "must be true or false".into())
}

/// An integer of `least..=most`.
pub fn number<T: TryFrom<i64>>(value: &Value, least: i64, most: i64) -> Result<T, String> {
    let range = || format!("must be an integer from {least} to {most}");
    let number = value.as_integer().ok_or_else(range)?;
    if !(least..=most).contains(&number) {
        return Err(range());
    }
    T::try_from(number).map_err(|_| range())
}

/// Whole seconds, at least one.
pub fn seconds(value: &Value) -> Result<Duration, String> {
    number::<u64>(value, 1, SECONDS_LIMIT).map(Duration::from_secs)
}

/// An absolute path without `..`.
pub fn absolute(value: &Value) -> Result<PathBuf, String> {
    clean(text(value)?)
}

fn clean(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    if !path.is_absolute() {
        return Err("must be an absolute path".into());
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return Err("must not contain ..".into());
    }
    Ok(path.to_owned())
}

/// `unix:///path` or `/path`.
pub fn socket(value: &Value) -> Result<PathBuf, String> {
    socket_path(text(value)?)
}

/// `unix:///path` or `/path`, from the file or the command line.
pub fn socket_path(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("unix://").unwrap_or(text);
    if path.contains("://") {
        return Err("must be unix:///path".into());
    }
    if path.len() > SOCKET_PATH_LIMIT {
        return Err(format!(
            "is longer than the {SOCKET_PATH_LIMIT} bytes of a unix socket's path"
        ));
    }
    clean(path)
}

/// At least one absolute directory.
pub fn directories(value: &Value) -> Result<Vec<PathBuf>, String> {
    let list = value
        .as_array()
        .ok_or("must be a list of absolute directories")?;
    if list.is_empty() {
        return Err("must name at least one directory".into());
    }
    list.iter().map(absolute).collect()
}

/// Names of runtime handlers: letters, digits, `-` and `.`, as Kubernetes allows; "" is the default handler.
pub fn handlers(value: &Value) -> Result<Vec<String>, String> {
    let list = value.as_array().ok_or("must be a list of strings")?;
    if list.is_empty() {
        return Err("must name at least one handler".into());
    }
    list.iter()
        .map(|entry| {
            let name = text(entry)?;
            let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
            if name.len() <= 253 && name.chars().all(allowed) {
                Ok(name.to_owned())
            } else {
                Err(format!("{name:?} is no handler name"))
            }
        })
        .collect()
}

/// `auto`, `krun`, `qemu`.
pub fn vmm(value: &Value) -> Result<Option<VmmKind>, String> {
    match text(value)? {
        "auto" => Ok(None),
        "krun" => Ok(Some(VmmKind::Krun)),
        "qemu" => Ok(Some(VmmKind::Qemu)),
        _ => Err("must be auto, krun or qemu".into()),
    }
}

/// `auto`, `tcg`, `kvm`.
pub fn acceleration(value: &Value) -> Result<Option<Acceleration>, String> {
    match text(value)? {
        "auto" => Ok(None),
        "tcg" => Ok(Some(Acceleration::Tcg)),
        "kvm" => Ok(Some(Acceleration::Kvm)),
        _ => Err("must be auto, tcg or kvm".into()),
    }
}

/// `address:port`, or `off`.
pub fn address_or_off(value: &Value) -> Result<Option<SocketAddr>, String> {
    match text(value)? {
        "off" => Ok(None),
        address => address
            .parse()
            .map(Some)
            .map_err(|_| "must be address:port or off".into()),
    }
}

/// An address that clients can be told: not `0.0.0.0` or `::`.
pub fn local_address(value: &Value) -> Result<IpAddr, String> {
    text(value)?
        .parse::<IpAddr>()
        .ok()
        .filter(|address| !address.is_unspecified() && !address.is_multicast())
        .ok_or_else(|| "must be one of this machine's IP addresses".into())
}

/// What tracing-subscriber's EnvFilter takes.
pub fn log_filter(value: &Value) -> Result<String, String> {
    let filter = text(value)?;
    tracing_subscriber::EnvFilter::try_new(filter)
        .map(|_| filter.to_owned())
        .map_err(|error| format!("is no log filter: {error}"))
}
