//! Finds and executes a container's program, with the error texts of other runtimes.
//!
//! Called in the container's root, as its user, by the last code before the program itself.

use super::wire::{Failure, FailureKind};
use nix::errno::Errno;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::unistd::{AccessFlags, execve, faccessat};
use std::convert::Infallible;
use std::ffi::CString;
use std::path::{Path, PathBuf};

/// Search path used if the environment has no PATH.
pub(crate) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Resolves `name` to a file, using PATH of the environment `env`.
pub(crate) fn find(name: &str, env: &[String]) -> Result<PathBuf, Failure> {
    if name.is_empty() {
        return Err(not_found(name, "no command specified"));
    }
    if name.contains('/') {
        return match check(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(Errno::EACCES) => Err(not_found(name, "permission denied")),
            Err(Errno::EISDIR) => Err(not_found(name, "is a directory")),
            Err(errno) => Err(not_found(
                name,
                &format!("stat {name}: {}", errno_text(errno)),
            )),
        };
    }
    let path = env
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    let mut denied = false;
    for directory in path.split(':') {
        let candidate = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        match check(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::EACCES) => denied = true,
            Err(_) => {}
        }
    }
    let reason = if denied {
        "permission denied"
    } else {
        "executable file not found in $PATH"
    };
    Err(not_found(name, reason))
}

/// Checks that the effective user may execute the file.
fn check(path: &Path) -> Result<(), Errno> {
    let metadata = std::fs::metadata(path)
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    if metadata.is_dir() {
        return Err(Errno::EISDIR);
    }
    faccessat(
        nix::fcntl::AT_FDCWD,
        path,
        AccessFlags::X_OK,
        nix::fcntl::AtFlags::AT_EACCESS,
    )
}

/// A program with everything its exec needs, so that no other system call is made between the last check and the
/// exec.
#[derive(Debug)]
pub(crate) struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// Prepares the strings, and resets signal dispositions to those a program expects.
    ///
    /// # Errors
    /// If a string contains a NUL byte.
    pub(crate) fn new(path: &Path, args: &[String], env: &[String]) -> Result<Self, Failure> {
        let invalid = |what: &str| {
            Failure::new(
                FailureKind::InvalidArgument,
                format!("{what} contains a NUL byte"),
            )
        };
        let strings = |list: &[String], what: &str| -> Result<Vec<CString>, Failure> {
            list.iter()
                .map(|text| CString::new(text.as_str()).map_err(|_| invalid(what)))
                .collect()
        };
        let program = Self {
            path: CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| invalid("path"))?,
            args: strings(args, "argument")?,
            env: strings(env, "environment")?,
        };
        // The standard library ignores SIGPIPE, which would be inherited. SAFETY: SIG_DFL installs no handler code.
        let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
        Ok(program)
    }

    /// Replaces this process by the program.
    ///
    /// # Errors
    /// If the kernel cannot execute it.
    pub(crate) fn execute(&self) -> Result<Infallible, Failure> {
        execve(&self.path, &self.args, &self.env).map_err(|errno| {
            let kind = match errno {
                Errno::ENOENT | Errno::EACCES | Errno::ENOEXEC | Errno::ENOTDIR => {
                    FailureKind::ExecutableNotFound
                }
                Errno::E2BIG => FailureKind::InvalidArgument,
                _ => FailureKind::Internal,
            };
            let path = self.path.to_string_lossy();
            Failure::new(kind, format!("exec {path}: {}", errno_text(errno)))
        })
    }
}

fn not_found(name: &str, reason: &str) -> Failure {
    Failure::new(
        FailureKind::ExecutableNotFound,
        format!("exec: {name:?}: {reason}"),
    )
}

/// Returns the C library's text of an errno, without the symbol.
pub(crate) fn errno_text(errno: Errno) -> String {
    errno.desc().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn find_errors_match_other_runtimes() {
        let env = vec!["PATH=/nowhere".to_owned()];
        assert_eq!(
            find("foo", &env).unwrap_err().message,
            "exec: \"foo\": executable file not found in $PATH"
        );
        assert_eq!(
            find("/nowhere/foo", &env).unwrap_err().message,
            "exec: \"/nowhere/foo\": stat /nowhere/foo: no such file or directory"
        );
        assert_eq!(
            find("/tmp", &env).unwrap_err().message,
            "exec: \"/tmp\": is a directory"
        );
        assert_eq!(
            find("/etc/passwd", &env).unwrap_err().message,
            "exec: \"/etc/passwd\": permission denied"
        );
    }

    #[test]
    fn find_searches_path_in_order() {
        assert_eq!(
            find("sh", &["PATH=/nowhere:/bin".to_owned()]).unwrap(),
            Path::new("/bin/sh")
        );
        assert!(find("sh", &[]).is_ok());
    }
}
