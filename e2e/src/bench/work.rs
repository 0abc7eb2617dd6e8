//! Guest instructions: a number of an operation's cost that neither load nor the machine changes.
//!
//! QEMU runs with a plugin (`e2e/bench/count.c`) that counts the guest's instructions in a memfd. The plugin replaces QEMU in
//! the VMM's jail, and executes it. Emulated guests only. `e2e/bench/instructions` has the numbers that `cases::work` compares with.

use crate::failure::{During, Result};
use crate::install::Install;
use crate::namespaces::run as command;
use crate::pod::Pod;
use crate::process::family;
use crate::{bail, ensure, poll};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// Source of the plugin.
const PLUGIN: &str = include_str!("../../bench/count.c");
/// Name of the memfd that the plugin creates.
const COUNTERS: &str = "guest-instructions";
/// Interval in which an idle guest executes at most [`IDLE_INSTRUCTIONS`]. Long enough for QEMU to get a turn on a busy host.
const IDLE_INTERVAL: Duration = Duration::from_millis(150);
/// Maximum number of instructions of an idle guest in an interval.
const IDLE_INSTRUCTIONS: u64 = 200_000;
/// Timeout for a guest to become idle.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);

/// Compiles the plugin and returns an installation whose QEMU counts. Its files are below `scratch`.
pub(crate) fn counting(scratch: &Path, install: &Install) -> Result<Install> {
    let (source, qemu) = (scratch.join("count.c"), scratch.join("qemu-counting"));
    std::fs::write(&source, PLUGIN)?;
    let program = format!("-DQEMU=\"{}\"", install.qemu.display());
    let (to, from) = (qemu.display().to_string(), source.display().to_string());
    // Lazy binding: as a program it has no functions of QEMU.
    let args = [
        "-shared",
        "-fPIC",
        "-O2",
        "-s",
        "-Wl,-z,lazy",
        "-Wl,-e,start",
        &program,
        "-o",
        &to,
        &from,
    ];
    command("cc", &args).during("compile the plugin")?;
    Ok(Install {
        qemu,
        ..install.clone()
    })
}

/// Numbers of a guest since its boot.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Work {
    /// Executed instructions.
    pub instructions: u64,
    /// Those of the guest's kernel.
    pub kernel: u64,
    /// Blocks of code that QEMU translated.
    pub translated: u64,
}

impl Work {
    /// Returns the difference to an earlier state.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            instructions: self.instructions.saturating_sub(before.instructions),
            kernel: self.kernel.saturating_sub(before.kernel),
            translated: self.translated.saturating_sub(before.translated),
        }
    }
}

/// The counters of one pod's guest; readable until this is dropped, also when the VM has ended.
pub(crate) struct Counters(File);

impl Counters {
    /// Opens the counters of a pod of a node with a counting QEMU.
    pub(crate) fn open(pod: &Pod) -> Result<Self> {
        for pid in family(&pod.id)?.1 {
            for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
                let path = entry?.path();
                let target = std::fs::read_link(&path).unwrap_or_default();
                if target.to_string_lossy().contains(COUNTERS) {
                    return Ok(Self(File::open(&path).during(path.display())?));
                }
            }
        }
        bail!("no process of the VM has counters")
    }

    /// Reads the counters.
    pub(crate) fn read(&self) -> Result<Work> {
        let mut bytes = [0; 24];
        self.0.read_exact_at(&mut bytes, 0)?;
        let mut numbers = bytes.chunks_exact(8).map(|part| {
            let part: [u8; 8] = part.try_into().unwrap_or_default();
            u64::from_ne_bytes(part)
        });
        let mut next = || numbers.next().unwrap_or_default();
        Ok(Work {
            instructions: next(),
            kernel: next(),
            translated: next(),
        })
    }

    /// Waits until the guest is idle, so that an operation is not charged with the work of the one before.
    pub(crate) async fn idle(&self) -> Result<Work> {
        poll::until("the guest is idle", IDLE_TIMEOUT, || async {
            let before = self.read()?;
            tokio::time::sleep(IDLE_INTERVAL).await;
            let now = self.read()?;
            let work = now.since(before).instructions;
            ensure!(work < IDLE_INSTRUCTIONS, "{work} instructions");
            Ok(now)
        })
        .await
    }
}
