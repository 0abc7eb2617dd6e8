//! Commands on the node: [`Host`] runs them in the mount namespace of the node's PID 1.
//!
//! The program executes itself as `host-exec`, because only a process with a single thread may enter a mount namespace.

use crate::error::{InstallError, Result};
use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Longest part of a command's output in an error.
const MAX_OUTPUT_CHARS: usize = 600;

/// Runs commands on a node.
pub(crate) trait Host {
    /// Runs a command to completion and returns its standard output.
    fn run(&self, command: &[String]) -> Result<String>;
}

/// The node that this pod runs on; the pod shares its PID namespace.
pub(crate) struct Node;

impl Host for Node {
    fn run(&self, command: &[String]) -> Result<String> {
        let failed = |reason: String| InstallError::Command {
            command: command.join(" "),
            reason,
        };
        let output = Command::new("/proc/self/exe")
            .args(["host-exec", "--"])
            .args(command)
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .output()
            .map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            let tail: Vec<char> = errors.trim().chars().collect();
            let tail: String = tail[tail.len().saturating_sub(MAX_OUTPUT_CHARS)..]
                .iter()
                .collect();
            return Err(failed(format!("{}: {tail}", output.status)));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Enters the mount namespace of PID 1 and replaces this process by the command.
pub(crate) fn exec(command: &[String]) -> io::Result<Infallible> {
    let namespace = File::open("/proc/1/ns/mnt")?;
    nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNS)?;
    std::env::set_current_dir("/")?;
    let (program, args) = command
        .split_first()
        .ok_or_else(|| io::Error::other("no command"))?;
    Err(Command::new(program).args(args).exec())
}
