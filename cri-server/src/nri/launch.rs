//! Pre-installed plugins: programs named `NN-name` in a directory, started with a connected socket as descriptor 3.
//!
//! Their configuration is `NN-name.conf` or `name.conf` of another directory. As published, their environment has
//! only NRI's three variables. A plugin that exits is not restarted: its adjustments remain. The protocol is in
//! [`super::plugin`].

use super::plugin::{check_index, check_name};
use command_fds::{CommandFdExt, FdMapping, FdMappingCollision};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};

/// Descriptor of the plugin's end of the connection.
const SOCKET_FD: i32 = 3;
/// Maximum size of a plugin's configuration: it must fit into one message with space to spare.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Time that a plugin has to exit after its connection is closed.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// Reason why a plugin is not launched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    /// A directory or file cannot be read.
    #[error("failed to read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// An executable with an invalid name.
    #[error("{}: {reason}", path.display())]
    Name { path: PathBuf, reason: String },
    /// The socket pair cannot be created.
    #[error("failed to create socket pair")]
    Socket(#[source] io::Error),
    /// The descriptor cannot be passed.
    #[error("failed to pass the socket")]
    Descriptor(#[source] FdMappingCollision),
    /// The program cannot be started.
    #[error("failed to start {}", path.display())]
    Start {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// An installed plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Installed {
    pub path: PathBuf,
    pub index: String,
    pub name: String,
    pub config: String,
}

impl Installed {
    /// Returns the name with its index, `00-name`.
    pub(crate) fn full_name(&self) -> String {
        format!("{}-{}", self.index, self.name)
    }
}

/// Returns the executable files of `plugins`, sorted by name, with their configuration. A missing directory has none.
pub(crate) fn discover(plugins: &Path, configs: &Path) -> Result<Vec<Installed>, LaunchError> {
    let read = |source| LaunchError::Read {
        path: plugins.to_owned(),
        source,
    };
    let entries = match fs::read_dir(plugins) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(read(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(read)?.path();
        let Ok(metadata) = fs::metadata(&path) else {
            continue;
        };
        if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
            continue;
        }
        found.push(installed(path, configs)?);
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn installed(path: PathBuf, configs: &Path) -> Result<Installed, LaunchError> {
    let file = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
        .to_owned();
    let wrong = |reason: String| LaunchError::Name {
        path: path.clone(),
        reason,
    };
    let (index, name) = file
        .split_once('-')
        .ok_or_else(|| wrong("invalid name: must be NN-name".into()))?;
    check_index(index)
        .and_then(|()| check_name(name))
        .map_err(&wrong)?;
    let mut config = String::new();
    for candidate in [format!("{file}.conf"), format!("{name}.conf")] {
        let candidate = configs.join(candidate);
        let read = |source| LaunchError::Read {
            path: candidate.clone(),
            source,
        };
        match fs::metadata(&candidate) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(read(error)),
            Ok(metadata) if metadata.len() > MAX_CONFIG_BYTES => {
                return Err(read(io::Error::other(format!(
                    "more than {MAX_CONFIG_BYTES} bytes"
                ))));
            }
            Ok(_) => {}
        }
        config = fs::read_to_string(&candidate).map_err(read)?;
        break;
    }
    Ok(Installed {
        index: index.to_owned(),
        name: name.to_owned(),
        path,
        config,
    })
}

/// Process of a plugin. Killed on drop.
#[derive(Debug)]
pub(crate) struct Launched {
    child: Child,
    name: String,
}

impl Launched {
    /// Starts the plugin and returns its connection.
    pub(crate) fn start(installed: &Installed) -> Result<(Self, UnixStream), LaunchError> {
        let (ours, theirs) = UnixStream::pair().map_err(LaunchError::Socket)?;
        let mut command = Command::new(&installed.path);
        command
            .env_clear()
            .env("NRI_PLUGIN_NAME", &installed.name)
            .env("NRI_PLUGIN_IDX", &installed.index)
            .env("NRI_PLUGIN_SOCKET", SOCKET_FD.to_string())
            .current_dir("/")
            .stdin(Stdio::null())
            // Its output goes to the daemon's.
            .process_group(0)
            .kill_on_drop(true);
        command
            .as_std_mut()
            .fd_mappings(vec![FdMapping {
                parent_fd: OwnedFd::from(theirs),
                child_fd: SOCKET_FD,
            }])
            .map_err(LaunchError::Descriptor)?;
        let child = command.spawn().map_err(|source| LaunchError::Start {
            path: installed.path.clone(),
            source,
        })?;
        let launched = Self {
            child,
            name: installed.full_name(),
        };
        Ok((launched, ours))
    }

    /// Returns the name with its index, `00-name`.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Waits a moment for the exit after the connection is closed, then kills it.
    pub(crate) async fn end(mut self) {
        if tokio::time::timeout(EXIT_TIMEOUT, self.child.wait())
            .await
            .is_err()
            && let Err(error) = self.child.kill().await
        {
            tracing::warn!(plugin = self.name, %error, "failed to kill NRI plugin");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(directory: &Path, name: &str, text: &str, mode: u32) {
        let path = directory.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn discover_finds_programs_with_configuration() {
        let (plugins, configs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        put(plugins.path(), "20-b", "", 0o755);
        put(plugins.path(), "10-a", "", 0o700);
        put(plugins.path(), "README", "", 0o644);
        put(configs.path(), "a.conf", "of a", 0o600);
        put(configs.path(), "20-b.conf", "of 20-b", 0o600);
        put(configs.path(), "b.conf", "of b", 0o600);
        let found = discover(plugins.path(), configs.path()).unwrap();
        let seen: Vec<_> = found
            .iter()
            .map(|found| (found.full_name(), found.config.as_str()))
            .collect();
        assert_eq!(
            seen,
            [("10-a".to_owned(), "of a"), ("20-b".to_owned(), "of 20-b")]
        );
        put(plugins.path(), "x-c", "", 0o755);
        let error = discover(plugins.path(), configs.path()).unwrap_err();
        assert!(error.to_string().contains("x-c"), "{error}");
        assert_eq!(
            discover(Path::new("/nonexistent"), configs.path()).unwrap(),
            []
        );
    }
}
