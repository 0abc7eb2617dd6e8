//! Finds and executes a container's program, with the words other runtimes use when it can't be found.
//!
//! Called in the container's root, as its user, by the last code before the program itself.

use super::wire::{Failure, FailureKind};
use nix::errno::Errno;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::unistd::{AccessFlags, execve, faccessat};
use std::convert::Infallible;
use std::ffi::CString;
use std::path::{Path, PathBuf};

/// Where a program is looked for when the environment has no PATH.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The file that `name` means with the environment `env`.
pub fn find(name: &str, env: &[String]) -> Result<PathBuf, Failure> {
    if name.is_empty() {
        return Err(not_found(name, "no command specified"));
    }
    if name.contains('/') {
        return match check(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(Errno::EACCES) => Err(not_found(name, "permission denied")),
            Err(Errno::EISDIR) => Err(not_found(name, "is a directory")),
            Err(errno) => Err(not_found(name, &format!("stat {name}: {}", words(errno)))),
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

/// Whether the effective user may execute the file.
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

/// A program with all that its exec needs: between the last check and the exec no other system call is made.
#[derive(Debug)]
pub struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// Puts the strings together, and the process's signals as a program expects them.
    ///
    /// # Errors
    /// A NUL byte.
    pub fn new(path: &Path, args: &[String], env: &[String]) -> Result<Self, Failure> {
        let invalid = |what: &str| {
            Failure::new(
                FailureKind::InvalidArgument,
                format!("{what} holds a NUL byte"),
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
        // The standard library ignores SIGPIPE, and that would be inherited.
        // SAFETY: SIG_DFL installs no handler code.
        let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
        Ok(program)
    }

    /// Replaces this process by the program.
    ///
    /// # Errors
    /// The kernel can't execute it.
    pub fn execute(&self) -> Result<Infallible, Failure> {
        execve(&self.path, &self.args, &self.env).map_err(|errno| {
            let kind = match errno {
                Errno::ENOENT | Errno::EACCES | Errno::ENOEXEC | Errno::ENOTDIR => {
                    FailureKind::ExecutableNotFound
                }
                Errno::E2BIG => FailureKind::InvalidArgument,
                _ => FailureKind::Internal,
            };
            let path = self.path.to_string_lossy();
            Failure::new(kind, format!("exec {path}: {}", words(errno)))
        })
    }
}

fn not_found(name: &str, reason: &str) -> Failure {
    Failure::new(
        FailureKind::ExecutableNotFound,
        format!("exec: {name:?}: {reason}"),
    )
}

/// An errno in the words of the C library, without the symbol.
pub fn words(errno: Errno) -> String {
    errno.desc().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_those_of_other_runtimes() {
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
    fn path_is_searched_in_order_and_defaults() {
        assert_eq!(
            find("sh", &["PATH=/nowhere:/bin".to_owned()]).unwrap(),
            Path::new("/bin/sh")
        );
        assert!(find("sh", &[]).is_ok());
    }
}
