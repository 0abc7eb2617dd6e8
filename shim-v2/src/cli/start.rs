//! The action `start`: finds or makes the shim of a pod and prints its address.
//!
//! The socket is bound here and handed to the daemon as its standard input, so that it accepts calls from the moment the
//! answer is printed; the daemon says `ok`, or what is wrong, on its standard output before `start` answers. A second
//! `start` of the same id answers with the daemon that lives. Containers whose spec names another sandbox join that one's shim.

use super::bootstrap::{self, StartRequest};
use super::{CliError, write_stdout};
use crate::containerd::config::PATH_VARIABLE;
use crate::record::{ADDRESS_FILE, write_whole};
use containerd_shim::Flags;
use sha2::{Digest, Sha256};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Name of the daemon's log in the bundle: its standard error.
pub const SHIM_LOG: &str = "shim.log";
/// Name of the configuration in the bundle, where containerd sends one instead of a path.
const CONFIG_FILE: &str = "shim.toml";
/// Annotation by which containerd's CRI plugin and boxlite-cri say to which sandbox a container belongs.
pub const SANDBOX_ID_ANNOTATION: &str = "io.kubernetes.cri.sandbox-id";
/// How long the daemon may take to say that it serves. It only sets up namespaces and a runtime; a loaded node is slow.
const DAEMON_LIMIT: Duration = Duration::from_secs(20);
/// Largest word of the daemon, in bytes.
const WORD_LIMIT: u64 = 16 << 10;
/// Largest path of a unix socket, in bytes (`sun_path` without its NUL).
const SOCKET_PATH_LIMIT: usize = 107;

/// Runs the action.
///
/// # Errors
/// When the input is not containerd's, the socket cannot be bound or the daemon does not come up. Nothing is left then.
pub fn start(flags: &Flags) -> Result<(), CliError> {
    let request = bootstrap::read(flags)?;
    let bundle = std::env::current_dir().map_err(CliError::io("find", "the bundle"))?;
    let address = match group_address(flags, &request, &bundle) {
        Some(address) => address,
        None => launch(flags, &request, &bundle)?,
    };
    write_whole(&bundle.join(ADDRESS_FILE), address.as_bytes())
        .map_err(CliError::io("write", bundle.join(ADDRESS_FILE).display()))?;
    write_stdout(&bootstrap::answer(request.dialect, &address)?)
}

/// Path of the shim's socket: `<dir of containerd's socket>/s/<sha256 of address/namespace/id>`, containerd's formula.
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

/// Address of the live shim of the sandbox that this bundle's container belongs to, if it is another's.
/// A sandboxer's bundle is elsewhere: its shim is found by the name of its socket.
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
    if path.as_os_str().len() > SOCKET_PATH_LIMIT {
        return Err(CliError::Arguments {
            reason: format!(
                "the shim's socket would be {} ({} bytes, the limit is {SOCKET_PATH_LIMIT})",
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

/// Binds the socket in its 0700 directory. None: a live shim serves there already.
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
    await_word(child)
}

/// The configuration file that the runtime handler's options name, or hold.
fn config_path(request: &StartRequest, bundle: &Path) -> Result<Option<PathBuf>, CliError> {
    let Some(options) = &request.options else {
        return Ok(None);
    };
    if !options.config_body.is_empty() {
        let path = bundle.join(CONFIG_FILE);
        write_whole(&path, &options.config_body).map_err(CliError::io("write", path.display()))?;
        return Ok(Some(path));
    }
    Ok((!options.config_path.is_empty()).then(|| PathBuf::from(&options.config_path)))
}

/// Waits for the daemon's `ok`. Anything else, silence included, is a failure and ends the daemon.
fn await_word(mut child: Child) -> Result<(), CliError> {
    let (sender, receiver) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            let mut word = String::new();
            let _ = stdout.take(WORD_LIMIT).read_to_string(&mut word);
            let _ = sender.send(word);
        });
    }
    let reason = match receiver.recv_timeout(DAEMON_LIMIT) {
        Ok(word) if word == "ok\n" => return Ok(()),
        Ok(word) if word.is_empty() => {
            "it ended without a word; see shim.log in its bundle".to_owned()
        }
        Ok(word) => word.trim_end().to_owned(),
        Err(_) => format!("no word within {} s", DAEMON_LIMIT.as_secs()),
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
    fn the_socket_is_where_containerd_looks() {
        let request = StartRequest {
            events_address: String::new(),
            address: "/run/containerd/containerd.sock".to_owned(),
            socket_dir: None,
            debug: false,
            dialect: Dialect::Plain,
            options: None,
        };
        // The value that the crate containerd-shim pins for the same input.
        assert_eq!(
            socket_path(&request, "default", "123"),
            Path::new(
                "/run/containerd/s/0ddfbd72d02b3551e75f3a0ed90b9965b533401be618f43a568bc522764e0ad0"
            )
        );
    }

    #[test]
    fn a_stale_socket_is_bound_again_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("s").join("x");
        let first = bind(&path).expect("binds").expect("nobody there");
        assert!(bind(&path).expect("connects").is_none());
        drop(first);
        assert!(bind(&path).expect("binds").is_some());
    }
}
