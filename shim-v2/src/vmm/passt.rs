//! Starts passt for the NIC of a VM without CNI.
//!
//! The vmm child starts it before the jail: passt builds one itself (a user namespace, an empty root, an allow-list of system
//! calls), by calls that the jail refuses. It remains in the network namespace of the shim, the node's; the vmm child and
//! everything it starts later move to an empty one. It is in the VM's PID namespace and cgroup, so it ends with the VM.
//!
//! ```text
//! start → this binary in the role ROLE → user, limits, no_new_privs → passt
//! ```

use super::step::{StepExt, inherit, require};
use crate::jail;
use crate::net::passt::{LOOPBACK_OPTION, args};
use boxlite_proto::error::{BoxliteError, BoxliteResult};
use boxlite_proto::exit::ExitCode;
use boxlite_proto::vmm::InstanceSpec;
use boxlite_sys::report::Report;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// First argument of this binary in the role that becomes passt.
pub const ROLE: &str = "passt";
/// Argument for passt as the shim's user.
const NO_USER: &str = "-";
/// Maximum number of open files of passt: one per connection of the guest.
const MAX_OPEN_FILES: u64 = 8192;

/// Starts passt, moves this process to an empty network namespace, and returns the VM's end of the NIC's socket. Called with one
/// thread.
///
/// # Errors
/// passt is missing, too old, or cannot be started.
pub(super) fn start(spec: &InstanceSpec) -> BoxliteResult<OwnedFd> {
    let program = &spec.installation.passt;
    require("passt", program)?;
    check_version(program)?;
    let step = "start passt";
    let (ours, theirs) = UnixStream::pair().step(step)?;
    inherit(&theirs, true)?;
    let user = spec.user.map_or(NO_USER.to_owned(), |id| id.to_string());
    // Not waited for here: this process is PID 1 of the VM's namespace.
    let spawned = Command::new("/proc/self/exe")
        .arg(ROLE)
        .arg(user)
        .arg(program)
        .args(args(theirs.as_raw_fd()))
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn();
    spawned.step(step)?;
    unshare(CloneFlags::CLONE_NEWNET).step("leave the node's network namespace")?;
    Ok(ours.into())
}

/// Checks that passt knows an option without which the guest must not have it.
fn check_version(program: &Path) -> BoxliteResult<()> {
    let mut trial = Command::new(program);
    trial.args([LOOPBACK_OPTION, "none", "--version"]);
    trial.env_clear().stdin(Stdio::null());
    let output = trial.output().step(format!("run {}", program.display()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(BoxliteError::Step {
            step: format!("use passt {}", program.display()),
            source: format!(
                "it refuses {LOOPBACK_OPTION}, without which guests reach the node's loopback: passt 2025_05_03 or newer is \
                 needed; it printed {:?}",
                last_line(&output.stderr)
            )
            .into(),
        }),
    }
}

fn last_line(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    text.trim().lines().last().unwrap_or_default().to_owned()
}

/// Waits until passt has closed its end of `socket`.
///
/// # Errors
/// The kernel refused to poll.
pub(super) fn wait_closed(socket: &impl AsFd) -> nix::Result<()> {
    loop {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(()),
        }
    }
}

/// Runs the role. The arguments are the user, the program and its arguments.
pub fn run(arguments: &[OsString]) -> std::process::ExitCode {
    match become_passt(arguments) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("vmm: {}", Report(&error));
            ExitCode::VmmStart.into()
        }
    }
}

fn missing(what: &str) -> BoxliteError {
    BoxliteError::Step {
        step: "start passt".to_owned(),
        source: format!("the role has no valid {what}").into(),
    }
}

fn become_passt(arguments: &[OsString]) -> BoxliteResult<Infallible> {
    let [user, program, rest @ ..] = arguments else {
        return Err(missing("arguments"));
    };
    // The VM's user may not be able to reach it by name.
    let opened = File::open(program).step(format!("open {}", Path::new(program).display()))?;
    jail::limit_files(MAX_OPEN_FILES).step("limit open files")?;
    // passt writes no files.
    jail::limit_resources(0).step("limit resources")?;
    if user != NO_USER {
        let id = user.to_str().and_then(|text| text.parse().ok());
        let id = id.ok_or_else(|| missing(&format!("user {user:?}")))?;
        jail::become_user(id, &[]).step("become the VM's user")?;
        jail::drop_all_capabilities().step("drop capabilities")?;
    }
    jail::forbid_new_privileges().step("set no_new_privs")?;
    let mut error = Command::new(program).args(rest).exec();
    if error.kind() == ErrorKind::PermissionDenied {
        let mut command = Command::new(format!("/proc/self/fd/{}", opened.as_raw_fd()));
        error = command.arg0(program).args(rest).exec();
    }
    Err(error).step(format!("start {}", Path::new(program).display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn passt_without_the_loopback_option_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let program = directory.path().join("passt");
        for (option, accepted) in [("--no-map-gw", false), (LOOPBACK_OPTION, true)] {
            let script = format!("#!/bin/sh\n[ \"$1\" = {option} ]\n");
            fs::write(&program, script).expect("written");
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("executable");
            let checked = check_version(&program);
            assert_eq!(checked.is_ok(), accepted, "{option}: {checked:?}");
            if let Err(error) = checked {
                let text = Report(&error).to_string();
                assert!(
                    text.contains("passt") && text.contains(LOOPBACK_OPTION),
                    "{text}"
                );
            }
        }
    }

    #[test]
    fn wait_closed_ends_with_the_other_end() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let waiting = std::thread::spawn(move || wait_closed(&ours));
        assert!(!waiting.is_finished());
        drop(theirs);
        waiting.join().expect("a thread").expect("polled");
    }
}
