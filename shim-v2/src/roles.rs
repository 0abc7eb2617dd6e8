//! The roles in which this binary is started by itself or by boxlite-cri: `vmm`, `probe`, `probe-guest`, `log-program` and
//! `user-namespace`.
//!
//! The shim protocol's own command line (`start`, `delete`, …) belongs to the cli module; main asks here first.

use std::ffi::OsString;
use std::process::ExitCode;

/// Runs the role named by the first argument. None: the arguments are not a role's.
pub fn run(args: &[OsString]) -> Option<ExitCode> {
    match args.first()?.to_str()? {
        "vmm" => Some(crate::vmm::child::run()),
        crate::share::idmap::ROLE => Some(crate::share::idmap::hold()),
        "probe" => Some(crate::probe::run()),
        "probe-guest" => Some(crate::probe::run_guest()),
        "log-program" => Some(crate::logs::program::run(&args[1..])),
        _ => None,
    }
}
