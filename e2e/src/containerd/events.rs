//! What containerd hears of tasks: the events of a life in their order, and an OOM kill.

use super::daemon::{Containerd, run_args};
use super::tasks::told_exit;
use super::{Case, Shared};
use crate::ensure;
use crate::outcome::{During, Failure, Result};
use crate::runner::case;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

/// All of them.
pub fn cases() -> Vec<Case> {
    vec![
        case("event::a_life_in_order", 60, life),
        case("event::an_oom_kill_is_told", 60, oom),
    ]
}

/// `ctr events`, subscribed.
struct Listener {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Listener {
    async fn start(ctr: &Containerd) -> Result<Self> {
        let mut child = ctr.ctr(&["events"]).await.stdout(Stdio::piped()).spawn()?;
        let stdout = child
            .stdout
            .take()
            .ok_or_else(|| Failure("ctr events has no output".to_owned()))?;
        let mut lines = BufReader::new(stdout).lines();
        // Subscribed once it shows something.
        for round in 0..40 {
            ctr.ok(&["namespace", "label", "default", &format!("e2e={round}")])
                .await?;
            let line = tokio::time::timeout(Duration::from_millis(250), lines.next_line()).await;
            if line.is_ok() {
                return Ok(Self { child, lines });
            }
        }
        Err(Failure("ctr events shows nothing".to_owned()))
    }

    /// The topics of tasks up to the first `last`, and the end of the listening.
    async fn until(mut self, last: &str, limit: Duration) -> Result<Vec<String>> {
        let mut seen: Vec<String> = Vec::new();
        let read = async {
            while seen.last().is_none_or(|topic| topic != last) {
                let Some(line) = self.lines.next_line().await? else {
                    break;
                };
                let mut words = line.split_whitespace();
                seen.extend(
                    words
                        .find(|word| word.starts_with("/tasks/"))
                        .map(str::to_owned),
                );
            }
            Ok::<(), std::io::Error>(())
        };
        let done = tokio::time::timeout(limit, read).await;
        self.child.start_kill()?;
        self.child.wait().await?;
        done.during(format!("the events so far: {seen:?}"))??;
        Ok(seen)
    }
}

async fn life(lab: Shared) -> Result {
    let ctr = &lab.shared;
    let listener = Listener::start(ctr).await?;
    ctr.sleeper("ev").await?;
    ctr.ok(&["task", "exec", "--exec-id", "x", "ev", "true"])
        .await?;
    ctr.ok(&["task", "pause", "ev"]).await?;
    ctr.ok(&["task", "resume", "ev"]).await?;
    ctr.remove("ev").await?;
    let wanted = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
    ];
    let mut seen = listener.until("/tasks/delete", lab.patience(10)).await?;
    // containerd itself announces some of them too: the order is what counts.
    seen.dedup();
    let mut rest = seen.iter();
    for topic in wanted {
        ensure!(
            rest.any(|seen| seen == topic),
            "{topic} is not where it should be in {seen:?}"
        );
    }
    Ok(())
}

async fn oom(lab: Shared) -> Result {
    let ctr = &lab.shared;
    let listener = Listener::start(ctr).await?;
    let limit = (32_u64 << 20).to_string();
    let flags = ["-d", "--memory-limit", &limit];
    // More than the limit, less than the VM has: that would be refused at once.
    let greedy = "tail -c 50000000 /dev/zero";
    ctr.ok(&run_args(&flags, "oom", &["sh", "-c", greedy]))
        .await?;
    ctr.stopped("oom").await?;
    told_exit(&ctr.output(&["task", "delete", "oom"]).await?, 137)?;
    ctr.ok(&["container", "delete", "oom"]).await?;
    let seen = listener.until("/tasks/delete", lab.patience(10)).await?;
    ensure!(
        seen.iter().any(|topic| topic == "/tasks/oom"),
        "no OOM event in {seen:?}"
    );
    Ok(())
}
