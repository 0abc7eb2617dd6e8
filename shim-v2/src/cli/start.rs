//! The action `start`: finds or starts the shim of a pod and prints its address.
//!
//! The socket is bound here and passed to the daemon as its standard input, so that it accepts connections as soon as the
//! address is printed. The daemon reports `ok` or an error on its standard output before `start` responds. A second
//! `start` of the same id returns the running daemon. A container whose spec names another sandbox joins that one's shim.

use super::bootstrap::{self, StartRequest};
use super::{CliError, write_stdout};
use crate::containerd::config::PATH_VARIABLE;
use crate::flags::Flags;
use crate::shim_state::{ADDRESS_FILE, write_atomically};
use boxlite_proto::names::SHIM_LOG;
use boxlite_sys::unix_socket::MAX_SOCKET_PATH_BYTES;
use sha2::{Digest, Sha256};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Name of the configuration in the bundle if containerd sends its content instead of a path.
const CONFIG_FILE: &str = "shim.toml";
/// Annotation with a container's sandbox id, set by containerd's CRI plugin and boxlite-cri.
pub const SANDBOX_ID_ANNOTATION: &str = "io.kubernetes.cri.sandbox-id";
/// Timeout for the daemon's readiness line. It only sets up namespaces and a runtime, but a loaded node is slow.
const DAEMON_READY_TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum size of the daemon's readiness line.
const MAX_READY_LINE_BYTES: u64 = 16 << 10;

/// Runs the action.
///
/// # Errors
/// The input is invalid, the socket cannot be bound or the daemon does not become ready. Everything is removed then.
pub fn start(flags: &Flags) -> Result<(), CliError> {
    let request = bootstrap::read(flags)?;
    let bundle = std::env::current_dir().map_err(CliError::io("find", "the bundle"))?;
    let address = match group_address(flags, &request, &bundle) {
        Some(address) => address,
        None => launch(flags, &request, &bundle)?,
    };
    write_atomically(&bundle.join(ADDRESS_FILE), address.as_bytes())
        .map_err(CliError::io("write", bundle.join(ADDRESS_FILE).display()))?;
    write_stdout(&bootstrap::response(request.dialect, &address)?)
}

/// Returns the path of the shim's socket, `<dir of containerd's socket>/s/<sha256 of address/namespace/id>` as in containerd.
pub fn socket_path(request: &StartRequest, namespace: &str, id: &str) -> PathBuf {
    let dir = match &request.socket_dir {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(request.address.trim_start_matches("unix://"))
            .parent()
            .unwrap_or(Path::new("/run/containerd"))
            .join("s"),
    };
    let name = Path::new(&request.address).join(namespace).join(id);
    dir.join(hex::encode(Sha256::digest(
        name.as_os_str().as_encoded_bytes(),
    )))
}

/// Returns the address of the running shim of another sandbox, if this bundle's container belongs to one.
/// If the sandbox's bundle is not beside this one (sandboxer), its shim is found by its socket name.
fn group_address(flags: &Flags, request: &StartRequest, bundle: &Path) -> Option<String> {
    let spec = std::fs::read(bundle.join("config.json")).ok()?;
    let spec: serde_json::Value = serde_json::from_slice(&spec).ok()?;
    let sandbox = spec["annotations"][SANDBOX_ID_ANNOTATION].as_str()?;
    let plain = !sandbox.is_empty() && !sandbox.contains('/') && !sandbox.starts_with('.');
    if sandbox == flags.id || !plain {
        return None;
    }
    let beside = std::fs::read_to_string(bundle.parent()?.join(sandbox).join(ADDRESS_FILE));
    let address = match beside {
        Ok(address) => address.trim().to_owned(),
        Err(_) => {
            let path = socket_path(request, &flags.namespace, sandbox);
            format!("unix://{}", path.display())
        }
    };
    UnixStream::connect(address.strip_prefix("unix://")?).ok()?;
    Some(address)
}

fn launch(flags: &Flags, request: &StartRequest, bundle: &Path) -> Result<String, CliError> {
    let path = socket_path(request, &flags.namespace, &flags.id);
    let address = format!("unix://{}", path.display());
    if path.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
        return Err(CliError::Arguments {
            reason: format!(
                "socket path {} has {} bytes, which exceeds the maximum of {MAX_SOCKET_PATH_BYTES}",
                path.display(),
                path.as_os_str().len()
            ),
        });
    }
    let Some(listener) = bind(&path)? else {
        return Ok(address);
    };
    let outcome = spawn_daemon(flags, request, bundle, &path, listener.into());
    if outcome.is_err() {
        let _ = std::fs::remove_file(&path);
    }
    outcome.map(|()| address)
}

/// Binds the socket in its 0700 directory; None if a running shim serves there already.
fn bind(path: &Path) -> Result<Option<UnixListener>, CliError> {
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(CliError::io("create", dir.display()))?;
    }
    match UnixListener::bind(path) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            std::fs::remove_file(path).map_err(CliError::io("remove", path.display()))?;
            UnixListener::bind(path)
                .map(Some)
                .map_err(CliError::io("bind", path.display()))
        }
        Err(error) => Err(CliError::io("bind", path.display())(error)),
    }
}

fn spawn_daemon(
    flags: &Flags,
    request: &StartRequest,
    bundle: &Path,
    socket: &Path,
    listener: OwnedFd,
) -> Result<(), CliError> {
    let log = bundle.join(SHIM_LOG);
    let log = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&log)
        .map_err(CliError::io("open", log.display()))?;
    let program =
        std::env::current_exe().map_err(CliError::io("find", "the shim's own program"))?;
    let mut command = Command::new(&program);
    command
        .args(["-namespace", &flags.namespace, "-id", &flags.id])
        .args(["-address", &request.address])
        .arg("-socket")
        .arg(socket)
        .current_dir(bundle)
        .env("TTRPC_ADDRESS", &request.events_address)
        .stdin(Stdio::from(listener))
        .stdout(Stdio::piped())
        .stderr(Stdio::from(log));
    if let Some(path) = config_path(request, bundle)? {
        command.env(PATH_VARIABLE, path);
    }
    if !flags.publish_binary.is_empty() {
        command.args(["-publish-binary", &flags.publish_binary]);
    }
    if request.debug {
        command.arg("-debug");
    }
    let child = command
        .spawn()
        .map_err(CliError::io("run", program.display()))?;
    await_ready(child)
}

/// Returns the configuration file named by the runtime handler's options, or written from their content.
fn config_path(request: &StartRequest, bundle: &Path) -> Result<Option<PathBuf>, CliError> {
    let Some(options) = &request.options else {
        return Ok(None);
    };
    if !options.config_body.is_empty() {
        let path = bundle.join(CONFIG_FILE);
        write_atomically(&path, &options.config_body)
            .map_err(CliError::io("write", path.display()))?;
        return Ok(Some(path));
    }
    Ok((!options.config_path.is_empty()).then(|| PathBuf::from(&options.config_path)))
}

/// Waits for the daemon's `ok`. Any other line, or a timeout, is an error, and the daemon is killed.
fn await_ready(mut child: Child) -> Result<(), CliError> {
    let (sender, receiver) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        // Not joined: it ends with the daemon's end of the pipe, at the latest with this short-lived program.
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = stdout.take(MAX_READY_LINE_BYTES).read_to_string(&mut line);
            let _ = sender.send(line);
        });
    }
    let reason = match receiver.recv_timeout(DAEMON_READY_TIMEOUT) {
        Ok(line) if line == "ok\n" => return Ok(()),
        Ok(line) if line.is_empty() => {
            "exited before reporting readiness; see shim.log in its bundle".to_owned()
        }
        Ok(line) => line.trim_end().to_owned(),
        Err(_) => format!("not ready within {} s", DAEMON_READY_TIMEOUT.as_secs()),
    };
    let _ = child.kill();
    let _ = child.wait();
    Err(CliError::Daemon { reason })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bootstrap::Dialect;

    #[test]
    fn socket_path_matches_containerd() {
        let request = StartRequest {
            events_address: String::new(),
            address: "/run/containerd/containerd.sock".to_owned(),
            socket_dir: None,
            debug: false,
            dialect: Dialect::Plain,
            options: None,
        };
        // The value that containerd's shim library pins for the same input.
        assert_eq!(
            socket_path(&request, "default", "123"),
            Path::new(
                "/run/containerd/s/0ddfbd72d02b3551e75f3a0ed90b9965b533401be618f43a568bc522764e0ad0"
            )
        );
    }

    #[test]
    fn bind_replaces_stale_socket_only() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("s").join("x");
        let first = bind(&path).expect("binds").expect("no live shim");
        assert!(bind(&path).expect("connects").is_none());
        drop(first);
        assert!(bind(&path).expect("binds").is_some());
    }
}
