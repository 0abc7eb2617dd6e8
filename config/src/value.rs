//! Readers of single configuration values. Each returns the reason for a rejection as text.

use boxlite_proto::vmm::{Acceleration, IdRange, SharedVolumeWriters, VmmKind};
use boxlite_sys::unix_socket::MAX_SOCKET_PATH_BYTES;
use std::net::{IpAddr, SocketAddr};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;
use toml::Value;

/// Longest configurable wait, in seconds: one day.
const MAX_SECONDS: i64 = 86_400;
/// Longest name of a runtime handler, in bytes, as in Kubernetes.
const MAX_HANDLER_BYTES: usize = 253;

/// A string.
pub fn text(value: &Value) -> Result<&str, String> {
    value.as_str().ok_or_else(|| "must be a string".into())
}

/// `true` or `false`.
pub fn boolean(value: &Value) -> Result<bool, String> {
    value
        .as_bool()
        .ok_or_else(|| "must be true or false".into())
}

/// `warn` or `refuse`.
pub fn shared_volume_writers(value: &Value) -> Result<SharedVolumeWriters, String> {
    [SharedVolumeWriters::Warn, SharedVolumeWriters::Refuse]
        .into_iter()
        .find(|policy| value.as_str() == Some(policy.name()))
        .ok_or_else(|| "must be warn or refuse".into())
}

/// `first:count`, or `none`. User 0 and 4294967295, which is -1 in system calls, are not part of a range.
pub fn vmm_ids(value: &Value) -> Result<Option<IdRange>, String> {
    let rule = || "must be none, or first:count of user ids between 1 and 4294967294".to_owned();
    let text = value.as_str().ok_or_else(rule)?;
    if text == "none" {
        return Ok(None);
    }
    let (first, count) = text.split_once(':').ok_or_else(rule)?;
    let number = |text: &str| text.parse::<u32>().map_err(|_| rule());
    let ids = IdRange {
        first: number(first)?,
        count: number(count)?,
    };
    let beyond = ids.first.checked_add(ids.count);
    if ids.first == 0 || ids.count == 0 || beyond.is_none() {
        return Err(rule());
    }
    Ok(Some(ids))
}

/// An integer from `min` to `max`.
pub fn number<T: TryFrom<i64>>(value: &Value, min: i64, max: i64) -> Result<T, String> {
    let range = || format!("must be an integer from {min} to {max}");
    let number = value.as_integer().ok_or_else(range)?;
    if !(min..=max).contains(&number) {
        return Err(range());
    }
    T::try_from(number).map_err(|_| range())
}

/// Whole seconds, at least one.
pub fn seconds(value: &Value) -> Result<Duration, String> {
    number::<u64>(value, 1, MAX_SECONDS).map(Duration::from_secs)
}

/// An absolute path without `..`.
pub fn absolute(value: &Value) -> Result<PathBuf, String> {
    absolute_path(text(value)?)
}

fn absolute_path(text: &str) -> Result<PathBuf, String> {
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

/// `unix:///path` or `/path`, from a file or the command line.
pub fn socket_path(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("unix://").unwrap_or(text);
    if path.contains("://") {
        return Err("must be unix:///path".into());
    }
    if path.len() > MAX_SOCKET_PATH_BYTES {
        return Err(format!(
            "exceeds the {MAX_SOCKET_PATH_BYTES} bytes of a unix socket path"
        ));
    }
    absolute_path(path)
}

/// A non-empty list of absolute directories.
pub fn directories(value: &Value) -> Result<Vec<PathBuf>, String> {
    let list = value
        .as_array()
        .ok_or("must be a list of absolute directories")?;
    if list.is_empty() {
        return Err("must name at least one directory".into());
    }
    list.iter().map(absolute).collect()
}

/// A non-empty list of runtime handlers: letters, digits, `-` and `.`, as in Kubernetes; "" is the default handler.
pub fn handlers(value: &Value) -> Result<Vec<String>, String> {
    let list = value.as_array().ok_or("must be a list of strings")?;
    if list.is_empty() {
        return Err("must name at least one handler".into());
    }
    list.iter()
        .map(|entry| {
            let name = text(entry)?;
            let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
            if name.len() <= MAX_HANDLER_BYTES && name.chars().all(allowed) {
                Ok(name.to_owned())
            } else {
                Err(format!("{name:?} is not a valid handler name"))
            }
        })
        .collect()
}

/// A list of strings out of `known`. The reason lists every unknown one.
pub fn list_of(value: &Value, known: &[&str]) -> Result<Vec<String>, String> {
    let list = value.as_array().ok_or("must be a list of strings")?;
    let names: Vec<&str> = list.iter().map(text).collect::<Result<_, _>>()?;
    let unknown: Vec<String> = names
        .iter()
        .filter(|name| !known.contains(name))
        .map(|name| format!("{name:?}"))
        .collect();
    if unknown.is_empty() {
        Ok(names.into_iter().map(str::to_owned).collect())
    } else {
        Err(format!(
            "{} unknown; known are {}",
            unknown.join(", "),
            known.join(", ")
        ))
    }
}

/// `auto`, `krun`, `qemu`.
pub fn vmm(value: &Value) -> Result<Option<VmmKind>, String> {
    match text(value)? {
        "auto" => Ok(None),
        name => name
            .parse()
            .map(Some)
            .map_err(|_| "must be auto, krun or qemu".into()),
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

/// A unicast address that clients can connect to; not `0.0.0.0` or `::`.
pub fn local_address(value: &Value) -> Result<IpAddr, String> {
    text(value)?
        .parse::<IpAddr>()
        .ok()
        .filter(|address| !address.is_unspecified() && !address.is_multicast())
        .ok_or_else(|| "must be one of this machine's IP addresses".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vmm_ids_are_a_range_of_ordinary_users() {
        let read = |text: &str| vmm_ids(&Value::from(text));
        assert_eq!(read("none"), Ok(None));
        for (first, count) in [(1, 1), (5, 6), (4_294_967_294, 1)] {
            let expected = Some(IdRange { first, count });
            assert_eq!(read(&format!("{first}:{count}")), Ok(expected));
        }
        for wrong in [
            "",
            "5",
            "0:5",
            "5:0",
            "-1:5",
            "4294967294:2",
            "1:x",
            "1:2:3",
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        assert!(vmm_ids(&Value::from(5)).is_err());
    }
}
