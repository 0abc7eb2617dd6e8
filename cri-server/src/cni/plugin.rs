//! Runs one plugin: finds the program, feeds it, bounds its time and output, and decodes its error object.
//!
//! A plugin is a child in a separate process group; every early end of the wait kills the group.

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

/// Most bytes read from a plugin's standard output. A result has a few KiB.
const OUTPUT_LIMIT: u64 = 1 << 20;
/// Most bytes kept of standard error, for the message.
const STDERR_LIMIT: usize = 4 << 10;

/// Failures of a plugin's run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PluginError {
    /// No such program.
    #[error("no program {name:?} in {}", dirs.iter().map(|d| d.display().to_string()).collect::<Vec<_>>().join(", "))]
    Missing { name: String, dirs: Vec<PathBuf> },
    /// It could not be started, or talking to it failed.
    #[error("{step} failed")]
    Io {
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// It ran for too long and was killed with all it started.
    #[error("no answer within {} s; killed", .0.as_secs_f32())]
    Timeout(Duration),
    /// It wrote without end.
    #[error("wrote more than {OUTPUT_LIMIT} bytes; killed")]
    Output,
    /// It answered an error object of the protocol.
    #[error("code {code}: {message}{}", if details.is_empty() { String::new() } else { format!(" ({details})") })]
    Refused {
        code: u64,
        message: String,
        details: String,
    },
    /// It failed without an error object.
    #[error("{status}: {stderr}")]
    Failed { status: ExitStatus, stderr: String },
    /// It succeeded and its output is no JSON.
    #[error("its result is not JSON")]
    NoJson {
        #[source]
        source: serde_json::Error,
    },
    /// It succeeded and its output is JSON but no object.
    #[error("its result is no JSON object")]
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
    /// `timeout` is for one run of one plugin.
    pub(crate) fn new(dirs: Vec<PathBuf>, timeout: Duration) -> Self {
        Self { dirs, timeout }
    }

    /// The program of that name in the first directory that has it.
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
            step: "joining bin_dirs to CNI_PATH",
            source: std::io::Error::other(error),
        })?;
        let input = serde_json::to_vec(input).map_err(|error| PluginError::Io {
            step: "encoding its input",
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
                step: "starting it",
                source,
            })?;
        let mut group = Group::of(child);
        match tokio::time::timeout(self.timeout, group.talk(&input)).await {
            Ok(done) => done,
            Err(_) => Err(PluginError::Timeout(self.timeout)),
        }
    }
}

/// A child and its process group; the group is killed when this goes, unless the child was waited for.
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
        let output = output.map_err(io("reading its output"))?;
        if output.len() as u64 > OUTPUT_LIMIT {
            return Err(PluginError::Output);
        }
        let status = self.child.wait().await.map_err(io("waiting for it"))?;
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
            // Gone already is the only failure, and it is fine.
            let _ = killpg(leader, Signal::SIGKILL);
        }
    }
}

async fn read(pipe: Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(OUTPUT_LIMIT + 1).read_to_end(&mut bytes).await?;
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
    let mut end = text.len().min(STDERR_LIMIT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}
