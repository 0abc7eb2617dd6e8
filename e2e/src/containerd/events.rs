//! Task events that containerd receives: order, OOM kills, and publishing through containerd's program.

use super::daemon::{Containerd, Version, run_args};
use super::tasks::expect_exit_code;
use super::{Case, Context};
use crate::case;
use crate::context::Backend;
use crate::failure::{During, Failure, Result};
use crate::{ensure, poll, same};
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

/// Returns the cases.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(task_events_arrive_in_order, 60),
        case!(oom_kill_is_reported, 60),
        case!(events_are_published_by_program, 90).unless(
            |ctx| ctx.version >= Version::V23 || ctx.backend == Backend::Krun,
            "2.3 passes its socket differently; on the emulated machine the program takes half a minute",
        ),
    ]
}

/// A subscribed `ctr events`.
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
        // It is subscribed once it prints an event.
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

    /// Returns the task events up to the first `last` and stops listening.
    async fn until(mut self, last: &str, limit: Duration) -> Result<Vec<TaskEvent>> {
        let mut seen: Vec<TaskEvent> = Vec::new();
        let read = async {
            while seen.last().is_none_or(|event| event.topic != last) {
                let Some(line) = self.lines.next_line().await? else {
                    break;
                };
                seen.extend(TaskEvent::read(&line));
            }
            Ok::<(), std::io::Error>(())
        };
        let done = tokio::time::timeout(limit, read).await;
        self.child.start_kill()?;
        self.child.wait().await?;
        done.during(format!("events so far: {seen:?}"))??;
        Ok(seen)
    }
}

/// An event as printed by `ctr events`: time, namespace, topic, message.
#[derive(Debug, PartialEq)]
struct TaskEvent {
    topic: String,
    message: Value,
}

impl TaskEvent {
    /// Parses a line. Returns `None` for events that are not about tasks.
    fn read(line: &str) -> Option<Self> {
        let (_, rest) = line.split_once(" /tasks/")?;
        let (topic, message) = rest.split_once(' ')?;
        Some(Self {
            topic: format!("/tasks/{topic}"),
            message: serde_json::from_str(message).ok()?,
        })
    }
}

/// Fails unless the topics occur in this order; other events may come between them.
fn in_order(seen: &[TaskEvent], topics: &[&str]) -> Result {
    let mut rest = seen.iter();
    for topic in topics {
        ensure!(
            rest.any(|event| event.topic == *topic),
            "{topic} is not in order in {seen:?}"
        );
    }
    Ok(())
}

async fn task_events_arrive_in_order(ctx: Context) -> Result {
    let ctr = &ctx.shared;
    let listener = Listener::start(ctr).await?;
    ctr.sleeper("ev").await?;
    let pid = ctr.pid("ev").await?;
    ctr.output(&["task", "exec", "--exec-id", "x", "ev", "sh", "-c", "exit 3"])
        .await?;
    ctr.ok(&["task", "pause", "ev"]).await?;
    ctr.ok(&["task", "resume", "ev"]).await?;
    ctr.remove("ev").await?;
    let seen = listener.until("/tasks/delete", ctx.patience(10)).await?;
    // containerd publishes some of them too, so only the order counts.
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
    in_order(&seen, &wanted)?;
    // Every exit has its process, code and time.
    for (id, code) in [("x", 3), ("ev", 137)] {
        let exit = seen.iter().map(|event| &event.message).find(|message| {
            message["id"] == id && message["container_id"] == "ev" && message["exit_status"] == code
        });
        let Some(exit) = exit else {
            crate::bail!("no exit of {id} with {code} in {seen:?}")
        };
        same!(exit["pid"].to_string(), pid, "pid in the exit event");
        ensure!(!exit["exited_at"].is_null(), "no time in {exit}");
    }
    Ok(())
}

/// Runs a containerd that passes no ttrpc socket: the shim executes containerd's program for each event.
async fn events_are_published_by_program(ctx: Context) -> Result {
    let ctr = &ctx.shared;
    let dir = ctr.dir.join("publish");
    std::fs::create_dir_all(&dir)?;
    let (program, runtime, log) = (dir.join("program"), dir.join("runtime"), dir.join("log"));
    // Records its arguments and runs the program.
    let text = format!(
        "#!/bin/sh\necho \"$@\" >> {}\nexec \"$PUBLISHER\" \"$@\"\n",
        log.display()
    );
    executable(&program, &text)?;
    let text = format!(
        "#!/bin/sh\nunset TTRPC_ADDRESS\nfor word; do\n  shift\n  \
         [ \"$last\" = -publish-binary ] && export PUBLISHER=\"$word\" && word={}\n  \
         last=$word\n  set -- \"$@\" \"$word\"\ndone\nexec {} \"$@\"\n",
        program.display(),
        ctx.install.shim.display()
    );
    executable(&runtime, &text)?;
    let listener = Listener::start(ctr).await?;
    let runtime = runtime.display().to_string();
    let flags = ["run", "-d", "--runtime", &runtime, super::IMAGE, "pub"];
    ctr.ok(&[&flags[..], &["sleep", "600"]].concat()).await?;
    ctr.remove("pub").await?;
    let seen = listener.until("/tasks/delete", ctx.patience(20)).await?;
    let topics = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exit",
        "/tasks/delete",
    ];
    in_order(&seen, &topics)?;
    poll::until("all were published", ctx.patience(10), || async {
        let text = std::fs::read_to_string(&log)?;
        let calls: Vec<_> = text.lines().collect();
        same!(calls.len(), topics.len(), "calls of it in {text:?}");
        for (call, topic) in calls.iter().zip(topics) {
            let wanted = format!("publish --topic {topic} --namespace default");
            ensure!(call.ends_with(&wanted), "{call}: not {wanted}");
        }
        Ok(())
    })
    .await
}

fn executable(path: &Path, text: &str) -> Result {
    std::fs::write(path, text)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}

async fn oom_kill_is_reported(ctx: Context) -> Result {
    let ctr = &ctx.shared;
    let listener = Listener::start(ctr).await?;
    let limit = (32_u64 << 20).to_string();
    let flags = ["-d", "--memory-limit", &limit];
    // More than the limit and less than the VM's memory; a larger request would fail at once.
    let greedy = "tail -c 50000000 /dev/zero";
    ctr.ok(&run_args(&flags, "oom", &["sh", "-c", greedy]))
        .await?;
    ctr.stopped("oom").await?;
    expect_exit_code(&ctr.output(&["task", "delete", "oom"]).await?, 137)?;
    ctr.ok(&["container", "delete", "oom"]).await?;
    let seen = listener.until("/tasks/delete", ctx.patience(10)).await?;
    ensure!(
        seen.iter().any(|event| event.topic == "/tasks/oom"),
        "no OOM event in {seen:?}"
    );
    Ok(())
}
