//! Entry point: runs an internal role (`vmm`, `probe`, …) or the command line of the shim protocol.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<std::ffi::OsString> = std::env::args_os().skip(1).collect();
    if let Some(code) = boxlite_shim_v2::roles::run(&args) {
        return code;
    }
    boxlite_shim_v2::cli::main(&args)
}
