//! The one way out: powering the VM off.
//!
//! QEMU runs with `-no-reboot` and the kernel with `reboot=t`, libkrun ends on a reboot: so *reboot* is what ends the VM
//! on both. A plain power-off would leave the microvm, which has no ACPI, halted for ever.

use nix::sys::reboot::{RebootMode, reboot};

/// Ends the VM. Dirty pages of mounted disks are written first (the scratch disk may be reused after a restart).
pub fn off() -> ! {
    rustix::fs::sync();
    let refused = match reboot(RebootMode::RB_AUTOBOOT) {
        Ok(never) => match never {},
        Err(errno) => errno,
    };
    eprintln!("boxlite-guest: reboot refused: {refused}");
    // PID 1 going away panics the kernel, and that too ends the VM (libkrunfw boots with panic=-1).
    std::process::exit(1)
}

/// Makes a panic anywhere in the agent end the VM: half an agent would leave the host waiting for its deadlines.
pub fn off_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        eprintln!("boxlite-guest: {info}");
        // The spawner and its children are copies of this process and must not take the VM with them.
        if std::process::id() == 1 {
            off()
        }
    }));
}
