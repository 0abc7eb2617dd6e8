//! Powers the VM off.
//!
//! QEMU runs with `-no-reboot` and the kernel with `reboot=t`, and libkrun exits on a reboot, so a *reboot* ends the
//! VM on both. A regular power-off would leave the microvm, which has no ACPI, halted forever.

use nix::sys::reboot::{RebootMode, reboot};

/// Ends the VM. Dirty pages of mounted disks are written first (the scratch disk may be reused after a restart).
pub(crate) fn off() -> ! {
    rustix::fs::sync();
    let refused = match reboot(RebootMode::RB_AUTOBOOT) {
        Ok(never) => match never {},
        Err(errno) => errno,
    };
    eprintln!("boxlite-guest: failed to reboot: {refused}");
    // The exit of PID 1 panics the kernel, which also ends the VM (libkrunfw boots with panic=-1).
    std::process::exit(1)
}

/// Makes a panic in any thread of the agent end the VM: a half-working agent would leave the host waiting for its
/// deadlines.
pub(crate) fn off_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        eprintln!("boxlite-guest: {info}");
        // The spawner and its children are copies of this process and must not end the VM.
        if std::process::id() == 1 {
            off()
        }
    }));
}
