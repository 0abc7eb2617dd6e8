//! Undo record of a pod's network: one JSON file per sandbox below `root/cni`.
//!
//! It is written before the first plugin runs and again with the result, by rename, so readers see a complete version.

use super::CniError;
use super::attachment::PodNetwork;
use super::conf::NetworkConf;
use super::result::CniResult;
use boxlite_sys::replace_file::replace_synced;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::{self, DirBuilder};
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Extension of a record that is being written.
const DRAFT: &str = "tmp";

/// A pod's network, as ADD created it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct CniRecord {
    /// The pod.
    pub pod: PodNetwork,
    /// Configuration at ADD. DEL uses it even if the directory has changed since.
    pub conf: NetworkConf,
    /// Path of the network namespace.
    pub netns: PathBuf,
    /// Result of the last plugin; `None` until all have succeeded.
    pub result: Option<Value>,
}

impl CniRecord {
    /// Creates a record without a result.
    pub(crate) fn new(pod: &PodNetwork, conf: NetworkConf, netns: PathBuf) -> Self {
        Self {
            pod: pod.clone(),
            conf,
            netns,
            result: None,
        }
    }

    /// Returns the pod's addresses, the primary one first.
    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        self.result
            .as_ref()
            .map(|value| CniResult::from_value(value).addresses().collect())
            .unwrap_or_default()
    }

    /// Writes the record (0600, in a 0700 directory).
    pub(crate) fn save(&self, directory: &Path) -> Result<(), CniError> {
        let path = file(directory, &self.pod.sandbox_id);
        let fail = |step| {
            let path = path.clone();
            move |source| CniError::Record { path, step, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(fail("create the directory of"))?;
        let text = serde_json::to_vec(self)
            .map_err(std::io::Error::other)
            .map_err(fail("encode"))?;
        let draft = path.with_extension(DRAFT);
        replace_synced(&path, &draft, &text).map_err(fail("write"))
    }

    /// Reads the record of `sandbox`. A record that cannot be decoded (the machine crashed during a write) is an error.
    pub(crate) fn load(directory: &Path, sandbox: &str) -> Result<Option<Self>, CniError> {
        let path = file(directory, sandbox);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                let step = "read";
                return Err(CniError::Record { path, step, source });
            }
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| CniError::Record {
                path,
                step: "decode",
                source: std::io::Error::other(error),
            })
    }

    /// Removes the record of `sandbox`; succeeds if it does not exist.
    pub(crate) fn remove(directory: &Path, sandbox: &str) -> Result<(), CniError> {
        let path = file(directory, sandbox);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(CniError::Record {
                path,
                step: "remove",
                source,
            }),
            _ => Ok(()),
        }
    }

    /// Deletes temporary files of a daemon that was killed during a write. Call before the first write.
    pub(crate) fn sweep(directory: &Path) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|ending| ending == DRAFT)
                && let Err(error) = fs::remove_file(&path)
            {
                tracing::warn!(path = %path.display(), %error, "failed to remove unfinished CNI record");
            }
        }
    }

    /// Returns the sandboxes that have a record.
    pub(crate) fn names(directory: &Path) -> Vec<String> {
        let Ok(entries) = fs::read_dir(directory) else {
            return Vec::new();
        };
        entries
            .filter_map(|entry| {
                let name = entry.ok()?.file_name().into_string().ok()?;
                name.strip_suffix(".json").map(str::to_owned)
            })
            .collect()
    }
}

fn file(directory: &Path, sandbox: &str) -> PathBuf {
    directory.join(format!("{sandbox}.json"))
}
