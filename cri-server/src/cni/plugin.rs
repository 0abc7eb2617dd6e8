//! Runs one plugin: finds the program, writes its input, limits its time and output, and decodes its error object.
//!
//! A plugin is a child in a separate process group, which is killed whenever the wait for it ends early.

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

/// Maximum size of a plugin's standard output in bytes. A result has a few KiB.
const MAX_STDOUT_BYTES: u64 = 1 << 20;
/// Maximum number of bytes of standard error that an error message keeps.
const MAX_STDERR_BYTES: usize = 4 << 10;

/// Failures of a plugin's run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PluginError {
    /// No such program.
    #[error("program {name:?} not found in {}", dirs.iter().map(|d| d.display().to_string()).collect::<Vec<_>>().join(", "))]
    Missing { name: String, dirs: Vec<PathBuf> },
    /// It could not be started, or its pipes failed.
    #[error("failed to {step}")]
    Io {
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// It timed out and was killed with its process group.
    #[error("did not answer within {} s and was killed", .0.as_secs_f32())]
    Timeout(Duration),
    /// It wrote too much output.
    #[error("wrote more than {MAX_STDOUT_BYTES} bytes and was killed")]
    Output,
    /// It returned an error object of the protocol.
    #[error("returned error code {code}: {message}{}", if details.is_empty() { String::new() } else { format!(" ({details})") })]
    Refused {
        code: u64,
        message: String,
        details: String,
    },
    /// It failed without an error object.
    #[error("{status}: {stderr}")]
    Failed { status: ExitStatus, stderr: String },
    /// It succeeded, but its output is not JSON.
    #[error("invalid result: not JSON")]
    NoJson {
        #[source]
        source: serde_json::Error,
    },
    /// It succeeded, but its output is JSON other than an object.
    #[error("invalid result: not a JSON object")]
    NoObject,
}

/// The error object of the protocol.
#[derive(Deserialize)]
struct ErrorObject {
    code: u64,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

/// Directories of the plugins and the time limit of each run.
#[derive(Debug, Clone)]
pub(crate) struct Plugins {
    dirs: Vec<PathBuf>,
    timeout: Duration,
}

impl Plugins {
    /// Creates a runner; `timeout` applies to one run of one plugin.
    pub(crate) fn new(dirs: Vec<PathBuf>, timeout: Duration) -> Self {
        Self { dirs, timeout }
    }

    /// Returns the path of the program in the first directory that has it.
    pub(crate) fn find(&self, name: &str) -> Result<PathBuf, PluginError> {
        self.dirs
            .iter()
            .map(|dir| dir.join(name))
            .find(|path| path.is_file())
            .ok_or_else(|| PluginError::Missing {
                name: name.to_owned(),
                dirs: self.dirs.clone(),
            })
    }

    /// Runs it and returns its standard output. Dropping the future kills the process group.
    pub(crate) async fn run(
        &self,
        name: &str,
        environment: &[(&'static str, String)],
        input: &Value,
    ) -> Result<Vec<u8>, PluginError> {
        let program = self.find(name)?;
        let path = std::env::join_paths(&self.dirs).map_err(|error| PluginError::Io {
            step: "join bin_dirs to CNI_PATH",
            source: std::io::Error::other(error),
        })?;
        let input = serde_json::to_vec(input).map_err(|error| PluginError::Io {
            step: "encode its input",
            source: error.into(),
        })?;
        let child = Command::new(program)
            .env_clear()
            // Plugins call programs such as iptables and ip by name.
            .env(
                "PATH",
                std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()),
            )
            .env("CNI_PATH", path)
            .envs(environment.iter().map(|(key, value)| (key, value)))
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| PluginError::Io {
                step: "start it",
                source,
            })?;
        let mut group = Group::of(child);
        match tokio::time::timeout(self.timeout, group.talk(&input)).await {
            Ok(done) => done,
            Err(_) => Err(PluginError::Timeout(self.timeout)),
        }
    }
}

/// A child and its process group. Dropping this kills the group, unless the child was waited for.
struct Group {
    child: Child,
    leader: Option<Pid>,
}

impl Group {
    fn of(child: Child) -> Self {
        let leader = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .map(Pid::from_raw);
        Self { child, leader }
    }

    async fn talk(&mut self, input: &[u8]) -> Result<Vec<u8>, PluginError> {
        let io = |step| move |source| PluginError::Io { step, source };
        let mut stdin = self.child.stdin.take();
        let stdout = self.child.stdout.take();
        let stderr = self.child.stderr.take();
        let write = async move {
            if let Some(stdin) = stdin.as_mut() {
                // A plugin may exit without reading its input; its exit status decides.
                let _ = stdin.write_all(input).await;
            }
            drop(stdin);
        };
        let ((), output, errors) = tokio::join!(write, read(stdout), read(stderr));
        let output = output.map_err(io("read its output"))?;
        if output.len() as u64 > MAX_STDOUT_BYTES {
            return Err(PluginError::Output);
        }
        let status = self.child.wait().await.map_err(io("wait for it"))?;
        self.leader = None;
        if status.success() {
            return Ok(output);
        }
        Err(refusal(status, &output, &errors.unwrap_or_default()))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.leader {
            // Fails only if the group has already ended.
            let _ = killpg(leader, Signal::SIGKILL);
        }
    }
}

async fn read(pipe: Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(MAX_STDOUT_BYTES + 1)
            .read_to_end(&mut bytes)
            .await?;
    }
    Ok(bytes)
}

fn refusal(status: ExitStatus, output: &[u8], errors: &[u8]) -> PluginError {
    if let Ok(object) = serde_json::from_slice::<ErrorObject>(output) {
        return PluginError::Refused {
            code: object.code,
            message: shorten(&object.msg),
            details: shorten(&object.details),
        };
    }
    let text = if errors.is_empty() { output } else { errors };
    PluginError::Failed {
        status,
        stderr: shorten(String::from_utf8_lossy(text).trim()),
    }
}

fn shorten(text: &str) -> String {
    let mut end = text.len().min(MAX_STDERR_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}
