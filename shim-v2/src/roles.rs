//! Internal roles of this binary, selected by the first argument: `vmm`, `probe`, `probe-guest`, `log-program`, `passt`
//! and `user-namespace`.
//!
//! The shim itself or boxlite-cri starts the binary in these roles. The command line of the shim protocol is in [`crate::cli`].

use std::ffi::OsString;
use std::process::ExitCode;

/// Runs the role named by the first argument; None if it does not name one.
pub fn run(args: &[OsString]) -> Option<ExitCode> {
    match args.first()?.to_str()? {
        "vmm" => Some(crate::vmm::child::run()),
        crate::vmm::passt::ROLE => Some(crate::vmm::passt::run(&args[1..])),
        crate::share::idmap::ROLE => Some(crate::share::idmap::hold()),
        "probe" => Some(crate::probe::run()),
        "probe-guest" => Some(crate::probe::run_guest()),
        "log-program" => Some(crate::logs::program::run(&args[1..])),
        _ => None,
    }
}
