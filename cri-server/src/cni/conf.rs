//! Network configurations on disk: finds and reads the lexically first valid one of a directory.
//!
//! Interprets no plugin's own keys: they go to the plugin as they are. Nothing is cached: the files are small, and a read at
//! each use is how a change is seen.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Largest configuration file read, in bytes. Real ones have a few KiB.
const FILE_LIMIT: u64 = 1 << 20;
/// Most plugins of one list. Real lists have two to five.
const PLUGIN_LIMIT: usize = 64;
/// Endings of files that are looked at, as libcni does.
const ENDINGS: [&str; 3] = ["conflist", "conf", "json"];

/// The reason for a missing network configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfError {
    /// The directory can't be read.
    #[error("cannot read the CNI configuration directory {}", path.display())]
    Directory {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// No file with a known ending.
    #[error("no network configuration (*.conflist, *.conf, *.json) in {}", .0.display())]
    Missing(PathBuf),
    /// Files, but no valid one.
    #[error("no valid network configuration in {}: {}", path.display(), faults.join("; "))]
    Invalid { path: PathBuf, faults: Vec<String> },
}

/// One plugin of a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct PluginConf {
    /// The `type`: name of the program.
    pub kind: String,
    /// Capabilities that it declares and expects in `runtimeConfig`.
    pub capabilities: Vec<String>,
    /// Its object as the file has it, less `capabilities`.
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
    /// `disableGC`; a record of an earlier version has none.
    #[serde(default)]
    pub disable_gc: bool,
    /// In the order of ADD.
    pub plugins: Vec<PluginConf>,
    /// The file it came from, for messages.
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

/// The lexically first valid configuration in `directory`.
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
    if size > FILE_LIMIT {
        return Err(format!(
            "{size} bytes are more than the {FILE_LIMIT} that are read"
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
    // 1.0 has a boolean; some files in the wild carry the string.
    let flag = |key: &str| match object.get(key) {
        Some(Value::Bool(set)) => *set,
        Some(Value::String(set)) => set == "true",
        _ => false,
    };
    let (disable_check, disable_gc) = (flag("disableCheck"), flag("disableGC"));
    let plugins = match object.remove("plugins") {
        None => vec![plugin(Value::Object(object))?],
        Some(Value::Array(list)) => list.into_iter().map(plugin).collect::<Result<_, _>>()?,
        Some(_) => return Err("plugins is no list".into()),
    };
    if plugins.is_empty() || plugins.len() > PLUGIN_LIMIT {
        return Err(format!(
            "{} plugins: must be 1 to {PLUGIN_LIMIT}",
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
        return Err("a plugin is no JSON object".into());
    };
    let kind = string(&object, "type")?.ok_or("a plugin has no type")?;
    // The type becomes a file name below bin_dirs.
    if kind.is_empty() || kind.contains('/') || kind.starts_with('.') {
        return Err(format!("plugin type {kind:?} is no program name"));
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

/// CNI: starts with an alphanumeric, then alphanumerics, `_`, `.`, `-`.
fn valid_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}
