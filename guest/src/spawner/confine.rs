//! The last steps of every program: capabilities, no_new_privs, seccomp, exec. The order is the same for init and
//! exec'd processes.
//!
//! ```text
//! user changed ─► bounding set ─► requested sets (CAP_SYS_ADMIN kept aside for the filter) ─► program looked up
//!     ─► no_new_privs, or CAP_SYS_ADMIN raised ─► seccomp ─► CAP_SYS_ADMIN dropped ─► exec
//! ```
//! The kernel accepts a filter from a process that has no_new_privs or CAP_SYS_ADMIN, and a filter cannot be removed.
//! Everything that a profile might forbid is therefore done first; only one capset (as in runc, and only without
//! no_new_privs) and the exec come after it.
//!
//! The caller has changed the user with the permitted capabilities kept, and still has all of them.

use super::executable::{self, Program};
use super::wire::{Confinement, Failure};
use crate::seccomp::install;
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use oci_spec::runtime::{Capabilities, LinuxCapabilities};
use std::convert::Infallible;

/// The five capability sets, without names unknown to this kernel.
struct Sets {
    bounding: CapsHashSet,
    effective: CapsHashSet,
    permitted: CapsHashSet,
    inheritable: CapsHashSet,
    ambient: CapsHashSet,
}

impl Sets {
    fn of(capabilities: Option<&LinuxCapabilities>) -> Self {
        let set = |choose: fn(&LinuxCapabilities) -> &Option<Capabilities>| -> CapsHashSet {
            let names = capabilities.and_then(|all| choose(all).as_ref());
            names
                .into_iter()
                .flatten()
                .filter_map(|name| {
                    caps::to_canonical(&name.to_string())
                        .parse::<Capability>()
                        .ok()
                })
                .collect()
        };
        Self {
            bounding: set(LinuxCapabilities::bounding),
            effective: set(LinuxCapabilities::effective),
            permitted: set(LinuxCapabilities::permitted),
            inheritable: set(LinuxCapabilities::inheritable),
            ambient: set(LinuxCapabilities::ambient),
        }
    }
}

fn set(kind: CapSet, value: &CapsHashSet) -> Result<(), Failure> {
    caps::set(None, kind, value).map_err(|error| Failure::step("set capabilities", error))
}

/// A process whose capabilities are set and whose filter is not installed yet.
#[derive(Debug)]
pub(crate) struct Confined<'a> {
    confinement: &'a Confinement,
    /// The requested permitted set, if a larger one is kept until the filter is installed.
    permitted: Option<CapsHashSet>,
}

impl<'a> Confined<'a> {
    /// Sets the capabilities.
    ///
    /// # Errors
    /// If the kernel rejects a set because the caller lacks a capability.
    pub(crate) fn set(confinement: &'a Confinement) -> Result<Self, Failure> {
        let sets = Sets::of(confinement.capabilities.as_ref());
        let failed = |error| Failure::step("read capabilities", error);
        // A change of the user clears the effective set.
        let all = caps::read(None, CapSet::Permitted).map_err(failed)?;
        set(CapSet::Effective, &all)?;
        let bounding = caps::read(None, CapSet::Bounding).map_err(failed)?;
        for capability in bounding.difference(&sets.bounding) {
            caps::drop(None, CapSet::Bounding, *capability)
                .map_err(|error| Failure::step("drop from the bounding set", error))?;
        }
        let privileged_filter = confinement.seccomp.is_some() && !confinement.no_new_privileges;
        let mut permitted = sets.permitted.clone();
        let kept = privileged_filter && permitted.insert(Capability::CAP_SYS_ADMIN);
        // Effective before permitted: the kernel requires one to be a subset of the other at every step.
        set(CapSet::Inheritable, &sets.inheritable)?;
        set(CapSet::Effective, &sets.effective)?;
        set(CapSet::Permitted, &permitted)?;
        for capability in &sets.ambient {
            // Like runc: an ambient capability that is not permitted and inheritable is not an error.
            let _ = caps::raise(None, CapSet::Ambient, *capability);
        }
        Ok(Self {
            confinement,
            permitted: kept.then_some(sets.permitted),
        })
    }

    /// Executes the program.
    ///
    /// # Errors
    /// If the program cannot be found or executed, or the filter is rejected. An installed filter remains in force.
    pub(crate) fn execute(self, args: &[String], env: &[String]) -> Result<Infallible, Failure> {
        let name = args.first().map_or("", String::as_str);
        let program = Program::new(&executable::find(name, env)?, args, env)?;
        if self.confinement.no_new_privileges {
            prctl::set_no_new_privs().map_err(|errno| Failure::step("set no_new_privs", errno))?;
        }
        if let Some(filter) = &self.confinement.seccomp {
            let effective = caps::read(None, CapSet::Effective)
                .map_err(|error| Failure::step("read capabilities", error))?;
            if !self.confinement.no_new_privileges {
                let mut raised = effective.clone();
                raised.insert(Capability::CAP_SYS_ADMIN);
                set(CapSet::Effective, &raised)?;
            }
            install::install(filter)
                .map_err(|error| Failure::step("install the seccomp filter", error))?;
            if !self.confinement.no_new_privileges {
                set(CapSet::Effective, &effective)?;
            }
            if let Some(permitted) = &self.permitted {
                set(CapSet::Permitted, permitted)?;
            }
        }
        program.execute()
    }
}
