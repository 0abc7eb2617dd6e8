//! The end of a container in its row, with containerd's reasons. Used by the driver and by recovery.

use crate::database::ContainerRow;
use crate::litebox::now_ns;
use crate::shim_controller::TaskExit;
use crate::types::ContainerState;

/// Exit code of a container that was killed with its VM: 128 + SIGKILL.
const KILLED_EXIT_CODE: i32 = 137;

/// Marks a row as exited, with containerd's reasons.
pub(crate) fn finish(row: &mut ContainerRow, exit: TaskExit, message: &str) {
    let snapshot = &mut row.snapshot;
    snapshot.state = ContainerState::Exited;
    snapshot.exit_code = exit.code;
    // Derived from the guest's report, so not before the start, not in the future.
    let now = now_ns();
    snapshot.finished_at_ns = match exit.at_ns {
        at if at > 0 => at.max(snapshot.started_at_ns).min(now),
        _ => now,
    };
    snapshot.message = message.to_owned();
    snapshot.reason = match exit.code {
        _ if row.oom => "OOMKilled",
        0 => "Completed",
        _ => "Error",
    }
    .to_owned();
}

/// Marks a row as exited with its VM, with an unknown exit code.
pub(crate) fn finish_unknown(row: &mut ContainerRow, message: &str) {
    let exit = TaskExit {
        code: KILLED_EXIT_CODE,
        at_ns: 0,
    };
    finish(row, exit, message);
    if !row.oom {
        row.snapshot.reason = "Unknown".to_owned();
    }
}
