//! The role `vmm`: reads an InstanceSpec, creates the VM, enters the jail and starts the VM.
//!
//! Single-threaded until the VMM starts threads. Started only by [`super::supervisor`]. Exits with a code of
//! [`boxlite_proto::exit::ExitCode`] and a message on standard error.

use super::VmmFactory;
use super::parent::require_shim;
use super::step::{StepExt, invalid};
use crate::jail;
use boxlite_proto::error::{BoxliteError, BoxliteResult};
use boxlite_proto::exit::ExitCode;
use boxlite_proto::vmm::InstanceSpec;
use boxlite_sys::report::Report;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use std::convert::Infallible;
use std::io::{BufRead, BufReader, Read};

/// Maximum size of a spec in bytes.
const MAX_SPEC_BYTES: u64 = 1 << 20;

/// Runs the role with the standard VMMs. Returns only if no VM could be started.
pub fn run() -> std::process::ExitCode {
    run_with(&VmmFactory::standard())
}

/// Runs the role with the VMMs of `factory`.
pub fn run_with(factory: &VmmFactory) -> std::process::ExitCode {
    match start(factory) {
        Ok(never) => match never {},
        Err(Failure::Vmm(error)) => {
            report(&error);
            error.exit_code().into()
        }
        Err(Failure::Jail(error)) => {
            report(&error);
            ExitCode::Jail.into()
        }
    }
}

enum Failure {
    Vmm(BoxliteError),
    Jail(jail::JailError),
}

impl From<BoxliteError> for Failure {
    fn from(error: BoxliteError) -> Self {
        Self::Vmm(error)
    }
}

fn report(error: &(dyn std::error::Error + 'static)) {
    eprintln!("vmm: {}", Report(error));
}

fn start(factory: &VmmFactory) -> Result<Infallible, Failure> {
    boxlite_sys::descriptors::close_inherited().step("close inherited descriptors")?;
    // The VM's own user, without capabilities, reads the derived files and passes through the jail's directories.
    umask(Mode::from_bits_truncate(0o022));
    // Set before the spec is read: if the shim died earlier, the pipe is closed; if it dies later, the signal arrives.
    set_pdeathsig(Signal::SIGKILL).step("set the parent-death signal")?;
    let spec = read_spec()?;
    jail::raise_file_limit();
    jail::forbid_core_dumps().map_err(Failure::Jail)?;
    if let Some(netns) = &spec.netns {
        jail::enter_netns(netns).map_err(Failure::Jail)?;
    }
    let instance = factory.make(&spec.kind)?.create(spec)?;
    jail::close(&instance.host_files()).map_err(Failure::Jail)?;
    Ok(instance.enter()?)
}

fn read_spec() -> BoxliteResult<InstanceSpec> {
    let stdin = std::io::stdin();
    let mut line = String::new();
    let mut reader = BufReader::new(stdin.lock().take(MAX_SPEC_BYTES));
    reader.read_line(&mut line).step("read the instance spec")?;
    require_shim()?;
    serde_json::from_str(&line)
        .map_err(|error| invalid("json", format!("{} bytes", line.len()), error.to_string()))
}
