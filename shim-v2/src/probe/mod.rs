//! Roles `probe` and `probe-guest`: test whether this machine's KVM runs guest code.
//!
//! /dev/kvm may exist without being able to run a guest, and then libkrun fails late and obscurely. So a small test VM runs
//! code that every kernel needs early: long mode with paging, SSE, cmpxchg16b, cpuid. It runs in a child process with a timeout,
//! because a broken KVM may hang or kill its caller. boxlite-config's `vmm_probe` evaluates the report.
//!
//! Flow: boxlite-cri → `containerd-shim-boxlite-v2 probe` → `/proc/self/exe probe-guest` → [`guest::run`].

mod guest;

use boxlite_proto::probe::ProbeReport;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Timeout of the test VM: it runs some twenty instructions; emulated KVM hosts need a second or two.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval at which the child is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Maximum number of bytes read of the child's output.
const MAX_OUTPUT_BYTES: u64 = 1024;
const KVM_DEVICE: &str = "/dev/kvm";

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

/// Role `probe-guest`: runs the VM in this process and prints the result to standard output.
pub fn run_guest() -> ExitCode {
    match guest::run(Path::new(KVM_DEVICE)) {
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

/// Runs the test VM in a child process. Blocks, at most [`PROBE_TIMEOUT`].
pub fn report() -> ProbeReport {
    if !Path::new(KVM_DEVICE).exists() {
        return ProbeReport {
            kvm_present: false,
            kvm_usable: false,
            reason: format!("{KVM_DEVICE} not found"),
        };
    }
    let (kvm_usable, reason) = match ask(Path::new("/proc/self/exe"), PROBE_TIMEOUT) {
        Ok(output) => output,
        Err(error) => (
            false,
            format!("failed to start the test VM's process: {error}"),
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
        std::thread::sleep(POLL_INTERVAL);
    };
    let mut output = String::new();
    if let Some(from) = child.stdout.take() {
        from.take(MAX_OUTPUT_BYTES).read_to_string(&mut output)?;
    }
    let output = output.trim().to_owned();
    Ok(match status {
        None => (
            false,
            format!("the test VM did not exit within {} s", limit.as_secs()),
        ),
        Some(status) if status.success() => (true, output),
        Some(status) => match status.signal() {
            Some(signal) => (
                false,
                format!("the test VM's process was killed by signal {signal}"),
            ),
            None => (false, output),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ask_child_that_hangs_or_dies_is_unusable() {
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
            (false, "the test VM did not exit within 0 s".to_owned())
        );
        assert_eq!(
            run("#!/bin/sh\nkill -9 $$\n"),
            (
                false,
                "the test VM's process was killed by signal 9".to_owned()
            )
        );
        assert_eq!(
            run("#!/bin/sh\necho no; exit 1\n"),
            (false, "no".to_owned())
        );
        assert_eq!(run("#!/bin/sh\necho yes\n"), (true, "yes".to_owned()));
    }

    #[test]
    fn run_failure_names_the_device() {
        let (_, output) = match guest::run(Path::new("/dev/null")) {
            Ok(output) => (true, output),
            Err(error) => (false, error.to_string()),
        };
        assert!(output.contains("/dev/null"), "{output}");
    }
}
