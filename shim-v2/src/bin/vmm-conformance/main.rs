//! A conformance suite for every Vmm: real VMs with the real agent, tested through the VMM boundary, the share, the tap and
//! vsock.
//!
//! Pods and shim services are tested by e2e. `make test` runs it once per VMM as root, each on the backend on which that VMM
//! works: `boxlite-vmm-conformance <krun|qemu> [case…]`. Prints one line per case and a count at the end. Fails without root
//! or an installation.

mod cases;
mod harness;

use boxlite_proto::vmm::VmmKind;
use std::ffi::OsString;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Timeout of one case. A nested krun VM boots in 4 s on a quiet machine, in 40 s on a busy one.
const CASE_TIMEOUT: Duration = Duration::from_secs(180);

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let words: Vec<&str> = args.iter().filter_map(|arg| arg.to_str()).collect();
    let result = match words.as_slice() {
        // The role of a shim to be killed; see cases::shim_death.
        ["hold", kind, directory] => {
            parse(kind).and_then(|kind| harness::hold(&kind, directory.as_ref()))
        }
        [kind, filter @ ..] => parse(kind).and_then(|kind| run(&kind, filter)),
        [] => Err("usage: boxlite-vmm-conformance <krun|qemu> [case…]".into()),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("boxlite-vmm-conformance: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(kind: &str) -> Result<VmmKind, harness::Error> {
    Ok(kind.parse()?)
}

fn run(kind: &VmmKind, filter: &[&str]) -> Result<bool, harness::Error> {
    // Before any thread starts: this process's own namespaces, so that nothing remains on the machine.
    harness::isolate()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let (mut passed, mut failed) = (0, 0);
    for (name, case) in cases::ALL {
        if !filter.is_empty() && !filter.contains(name) {
            continue;
        }
        let start = Instant::now();
        let outcome = runtime.block_on(async {
            match tokio::time::timeout(CASE_TIMEOUT, case(kind.clone())).await {
                Ok(outcome) => outcome,
                Err(_) => Err(format!("timed out after {CASE_TIMEOUT:?}").into()),
            }
        });
        let took = start.elapsed().as_millis();
        match outcome {
            Ok(note) => {
                passed += 1;
                println!("ok      {name} ({took} ms) {note}");
            }
            Err(error) => {
                failed += 1;
                println!(
                    "FAILED  {name} ({took} ms): {}",
                    boxlite_sys::report::report(&*error)
                );
            }
        }
    }
    println!("e2e vmm-{kind}: {passed} passed, {failed} failed, 0 skipped");
    Ok(failed == 0 && passed > 0)
}
