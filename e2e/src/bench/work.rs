//! Guest instructions: a number of an operation's cost that neither load nor the machine changes.
//!
//! QEMU runs with a plugin (`e2e/bench/count.c`) that counts the guest's instructions in a file of the VM's working
//! directory. The plugin reaches the VMM's jail as a part of the script that replaces QEMU there. Emulated guests only.

use crate::failure::{During, Result};
use crate::install::Install;
use crate::namespaces::run as command;
use crate::node::Node;
use crate::pod::Pod;
use crate::{ensure, poll};
use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Source of the plugin.
const PLUGIN: &str = include_str!("../../bench/count.c");
/// File that the plugin creates in the VM's working directory.
const COUNTERS: &str = "guest-instructions";
/// Interval in which an idle guest executes at most [`IDLE_INSTRUCTIONS`]. Long enough for QEMU to get a turn on a busy host.
const IDLE_INTERVAL: Duration = Duration::from_millis(150);
/// Maximum number of instructions of an idle guest in an interval.
const IDLE_INSTRUCTIONS: u64 = 200_000;
/// Timeout for a guest to become idle.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);

/// Compiles the plugin and returns an installation whose QEMU counts. Its files are below `scratch`.
pub(crate) fn counting(scratch: &Path, install: &Install) -> Result<Install> {
    let (source, plugin) = (scratch.join("count.c"), scratch.join("count.so"));
    std::fs::write(&source, PLUGIN)?;
    let args = ["-shared", "-fPIC", "-O2", "-s", "-o"];
    let paths = [plugin.display().to_string(), source.display().to_string()];
    let args: Vec<&str> = args
        .into_iter()
        .chain(paths.iter().map(String::as_str))
        .collect();
    command("cc", &args).during("compile the plugin")?;
    let qemu = scratch.join("qemu-counting");
    let head = |length: usize| {
        format!(
            "#!/bin/sh\ntail -c +{length:04} \"$0\" > count.so && exec {} -plugin ./count.so \"$@\"\nexit 1\n",
            install.qemu.display()
        )
    };
    let mut script = head(head(0).len() + 1).into_bytes();
    script.extend(std::fs::read(&plugin)?);
    std::fs::write(&qemu, script)?;
    std::fs::set_permissions(&qemu, std::fs::Permissions::from_mode(0o755))?;
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
        let path = path(&pod.node, &pod.id);
        Ok(Self(File::open(&path).during(path.display())?))
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

fn path(node: &Node, id: &str) -> PathBuf {
    node.dir.join("state/s").join(id).join("vm").join(COUNTERS)
}
