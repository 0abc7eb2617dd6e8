//! Network configurations on disk: finds and reads the lexically first valid one of a directory.
//!
//! Keys of a plugin are passed on uninterpreted. Nothing is cached: the files are small, and reading them at each use makes
//! changes effective at once.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Maximum size of a configuration file in bytes. Typical ones have a few KiB.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Maximum number of plugins of one list. Typical lists have two to five.
const MAX_PLUGINS: usize = 64;
/// Extensions of configuration files, as in libcni.
const ENDINGS: [&str; 3] = ["conflist", "conf", "json"];

/// Reason why no network configuration can be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfError {
    /// The directory cannot be read.
    #[error("failed to read the CNI configuration directory {}", path.display())]
    Directory {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// No file with a known extension.
    #[error("no network configuration (*.conflist, *.conf, *.json) in {}", .0.display())]
    Missing(PathBuf),
    /// No file is valid.
    #[error("no valid network configuration in {}: {}", path.display(), faults.join("; "))]
    Invalid { path: PathBuf, faults: Vec<String> },
}

/// One plugin of a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct PluginConf {
    /// Value of `type`: the name of the program.
    pub kind: String,
    /// Capabilities that it declares and expects in `runtimeConfig`.
    pub capabilities: Vec<String>,
    /// Its object in the file, without `capabilities`.
    pub object: Map<String, Value>,
}

/// A network: a conflist, or a single-plugin file converted to a list of one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct NetworkConf {
    /// `name`.
    pub name: String,
    /// `cniVersion`, such as 1.0.0.
    pub cni_version: String,
    /// `disableCheck`.
    pub disable_check: bool,
    /// `disableGC`; records of earlier versions lack it.
    #[serde(default)]
    pub disable_gc: bool,
    /// Plugins in the order of ADD.
    pub plugins: Vec<PluginConf>,
    /// File that defines it, for messages.
    pub source: PathBuf,
}

impl NetworkConf {
    /// Returns true if the configuration's protocol version is at least `major.minor`.
    pub(crate) fn at_least(&self, major: u32, minor: u32) -> bool {
        version(&self.cni_version).is_some_and(|have| have >= (major, minor))
    }
}

fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?.parse().ok()?;
    Some((major, minor))
}

/// Returns the lexically first valid configuration in `directory`.
pub(crate) fn load(directory: &Path) -> Result<NetworkConf, ConfError> {
    let fail = |source| ConfError::Directory {
        path: directory.to_owned(),
        source,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let ending = path.extension().and_then(|ending| ending.to_str());
        if ending.is_some_and(|ending| ENDINGS.contains(&ending)) && path.is_file() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(ConfError::Missing(directory.to_owned()));
    }
    files.sort();
    let mut faults = Vec::new();
    for path in files {
        match read(&path) {
            Ok(conf) => return Ok(conf),
            Err(fault) => faults.push(format!("{}: {fault}", path.display())),
        }
    }
    Err(ConfError::Invalid {
        path: directory.to_owned(),
        faults,
    })
}

fn read(path: &Path) -> Result<NetworkConf, String> {
    let size = std::fs::metadata(path).map_err(|e| e.to_string())?.len();
    if size > MAX_FILE_BYTES {
        return Err(format!(
            "{size} bytes are more than the {MAX_FILE_BYTES} that are read"
        ));
    }
    let text = std::fs::read(path).map_err(|e| e.to_string())?;
    parse(&text, path)
}

/// Reads a conflist or a single plugin's configuration.
pub(crate) fn parse(text: &[u8], path: &Path) -> Result<NetworkConf, String> {
    let value: Value = serde_json::from_slice(text).map_err(|e| format!("not JSON: {e}"))?;
    let Value::Object(mut object) = value else {
        return Err("not a JSON object".into());
    };
    let name = string(&object, "name")?.unwrap_or_default();
    if !valid_name(&name) {
        return Err(format!(
            "name {name:?} is empty or has characters CNI forbids"
        ));
    }
    let cni_version = string(&object, "cniVersion")?.unwrap_or_else(|| "0.2.0".into());
    if version(&cni_version).is_none_or(|have| have < (0, 3)) {
        return Err(format!("cniVersion {cni_version:?} is older than 0.3.0"));
    }
    // A boolean since 1.0; some published files have a string.
    let flag = |key: &str| match object.get(key) {
        Some(Value::Bool(set)) => *set,
        Some(Value::String(set)) => set == "true",
        _ => false,
    };
    let (disable_check, disable_gc) = (flag("disableCheck"), flag("disableGC"));
    let plugins = match object.remove("plugins") {
        None => vec![plugin(Value::Object(object))?],
        Some(Value::Array(list)) => list.into_iter().map(plugin).collect::<Result<_, _>>()?,
        Some(_) => return Err("plugins is not a list".into()),
    };
    if plugins.is_empty() || plugins.len() > MAX_PLUGINS {
        return Err(format!(
            "{} plugins: must be 1 to {MAX_PLUGINS}",
            plugins.len()
        ));
    }
    Ok(NetworkConf {
        name,
        cni_version,
        disable_check,
        disable_gc,
        plugins,
        source: path.to_owned(),
    })
}

fn plugin(value: Value) -> Result<PluginConf, String> {
    let Value::Object(mut object) = value else {
        return Err("a plugin is not a JSON object".into());
    };
    let kind = string(&object, "type")?.ok_or("a plugin has no type")?;
    // The type is used as a file name below bin_dirs.
    if kind.is_empty() || kind.contains('/') || kind.starts_with('.') {
        return Err(format!("invalid plugin type {kind:?}: not a program name"));
    }
    let capabilities = match object.remove("capabilities") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Object(map)) => map
            .into_iter()
            .filter(|(_, wanted)| wanted.as_bool() == Some(true))
            .map(|(name, _)| name)
            .collect(),
        Some(_) => return Err(format!("capabilities of plugin {kind:?} is no object")),
    };
    Ok(PluginConf {
        kind,
        capabilities,
        object,
    })
}

fn string(object: &Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(format!("{key} is no string")),
    }
}

/// Returns whether a name is valid in CNI: an alphanumeric, then alphanumerics, `_`, `.`, `-`.
fn valid_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}
