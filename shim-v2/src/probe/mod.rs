//! Roles `probe` and `probe-guest`: whether this machine's KVM really runs guest code.
//!
//! /dev/kvm may exist and be unable to run a guest, and then libkrun dies late and in odd ways. So a throw-away VM runs
//! what every kernel needs early: long mode with paging, SSE, cmpxchg16b, cpuid. That happens in a child process with a
//! time limit, since a broken KVM may hang or kill its caller. It draws no conclusion; runtime's `vmm_probe` does.
//!
//! Flow: boxlite-cri → `containerd-shim-boxlite-v2 probe` → `/proc/self/exe probe-guest` → [`guest::run`].

mod guest;

use boxlite_proto::probe::ProbeReport;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// How long the throw-away VM may take: it runs some twenty instructions; emulated KVM hosts need a second or two.
const LIMIT: Duration = Duration::from_secs(10);
/// How often the child is looked at.
const TICK: Duration = Duration::from_millis(10);
/// Most bytes read of what the child says.
const SAID_LIMIT: u64 = 1024;
const DEVICE: &str = "/dev/kvm";

/// Role `probe`: prints a [`ProbeReport`] as JSON.
pub fn run() -> ExitCode {
    match serde_json::to_string(&report()) {
        Ok(json) => {
            println!("{json}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("probe: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Role `probe-guest`: runs the VM in this process; says what happened on standard output.
pub fn run_guest() -> ExitCode {
    match guest::run(Path::new(DEVICE)) {
        Ok(ran) => {
            println!("{ran}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn report() -> ProbeReport {
    if !Path::new(DEVICE).exists() {
        return ProbeReport {
            kvm_present: false,
            kvm_usable: false,
            reason: format!("no {DEVICE}"),
        };
    }
    let (kvm_usable, reason) = match ask(Path::new("/proc/self/exe"), LIMIT) {
        Ok(said) => said,
        Err(error) => (
            false,
            format!("the test VM's process could not be started: {error}"),
        ),
    };
    ProbeReport {
        kvm_present: true,
        kvm_usable,
        reason,
    }
}

fn ask(program: &Path, limit: Duration) -> std::io::Result<(bool, String)> {
    let mut child = Command::new(program)
        .arg("probe-guest")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(TICK);
    };
    let mut said = String::new();
    if let Some(from) = child.stdout.take() {
        from.take(SAID_LIMIT).read_to_string(&mut said)?;
    }
    let said = said.trim().to_owned();
    Ok(match status {
        None => (
            false,
            format!("the test VM did not end within {} s", limit.as_secs()),
        ),
        Some(status) if status.success() => (true, said),
        Some(status) => match status.signal() {
            Some(signal) => (
                false,
                format!("the test VM's process died of signal {signal}"),
            ),
            None => (false, said),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_that_hangs_or_dies_is_a_no() {
        let script = tempfile::NamedTempFile::new().expect("file");
        let path = script.into_temp_path();
        let run = |text: &str| {
            std::fs::write(&path, text).expect("script");
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(&path, mode).expect("mode");
            ask(&path, Duration::from_millis(300)).expect("ran")
        };
        assert_eq!(
            run("#!/bin/sh\nexec sleep 5\n"),
            (false, "the test VM did not end within 0 s".to_owned())
        );
        assert_eq!(
            run("#!/bin/sh\nkill -9 $$\n"),
            (false, "the test VM's process died of signal 9".to_owned())
        );
        assert_eq!(
            run("#!/bin/sh\necho no; exit 1\n"),
            (false, "no".to_owned())
        );
        assert_eq!(run("#!/bin/sh\necho yes\n"), (true, "yes".to_owned()));
    }

    #[test]
    fn the_answer_has_a_reason() {
        let (_, said) = match guest::run(Path::new("/dev/null")) {
            Ok(said) => (true, said),
            Err(error) => (false, error.to_string()),
        };
        assert!(said.contains("/dev/null"), "{said}");
    }
}
