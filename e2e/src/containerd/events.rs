//! What containerd hears of tasks: the events of a life in their order, an OOM kill, and the way by containerd's program.

use super::daemon::{Containerd, Version, run_args};
use super::tasks::told_exit;
use super::{Case, Shared};
use crate::outcome::{During, Failure, Result};
use crate::runner::case;
use crate::world::Home;
use crate::{ensure, same, wait};
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

/// All of them.
pub fn cases() -> Vec<Case> {
    vec![
        case("event::a_life_in_order", 60, life),
        case("event::an_oom_kill_is_told", 60, oom),
        case("event::by_containerds_program", 90, by_program).unless(
            |lab| lab.version >= Version::V23 || lab.home == Home::Krun,
            "2.3 names its socket otherwise; the emulated machine takes half a minute for the program's runs",
        ),
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

    /// The events of tasks up to the first `last`, and the end of the listening.
    async fn until(mut self, last: &str, limit: Duration) -> Result<Vec<Seen>> {
        let mut seen: Vec<Seen> = Vec::new();
        let read = async {
            while seen.last().is_none_or(|event| event.topic != last) {
                let Some(line) = self.lines.next_line().await? else {
                    break;
                };
                seen.extend(Seen::read(&line));
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

/// An event as `ctr events` shows it: time, namespace, topic, message.
#[derive(Debug, PartialEq)]
struct Seen {
    topic: String,
    message: Value,
}

impl Seen {
    /// None for an event that is no task's.
    fn read(line: &str) -> Option<Self> {
        let (_, rest) = line.split_once(" /tasks/")?;
        let (topic, message) = rest.split_once(' ')?;
        Some(Self {
            topic: format!("/tasks/{topic}"),
            message: serde_json::from_str(message).ok()?,
        })
    }
}

/// Whether the topics are there in this order, other events among them.
fn in_order(seen: &[Seen], topics: &[&str]) -> Result {
    let mut rest = seen.iter();
    for topic in topics {
        ensure!(
            rest.any(|event| event.topic == *topic),
            "{topic} is not where it should be in {seen:?}"
        );
    }
    Ok(())
}

async fn life(lab: Shared) -> Result {
    let ctr = &lab.shared;
    let listener = Listener::start(ctr).await?;
    ctr.sleeper("ev").await?;
    let pid = ctr.pid("ev").await?;
    ctr.output(&["task", "exec", "--exec-id", "x", "ev", "sh", "-c", "exit 3"])
        .await?;
    ctr.ok(&["task", "pause", "ev"]).await?;
    ctr.ok(&["task", "resume", "ev"]).await?;
    ctr.remove("ev").await?;
    let seen = listener.until("/tasks/delete", lab.patience(10)).await?;
    // containerd itself announces some of them too: the order is what counts.
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
    // Each end with its process, code and time.
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

/// A containerd that names no ttrpc socket: the shim runs containerd's own program for each event.
async fn by_program(lab: Shared) -> Result {
    let ctr = &lab.shared;
    let dir = ctr.dir.join("publish");
    std::fs::create_dir_all(&dir)?;
    let (program, runtime, log) = (dir.join("program"), dir.join("runtime"), dir.join("log"));
    // Notes what it is asked, and does it.
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
        lab.install.shim.display()
    );
    executable(&runtime, &text)?;
    let listener = Listener::start(ctr).await?;
    let runtime = runtime.display().to_string();
    let flags = ["run", "-d", "--runtime", &runtime, super::IMAGE, "pub"];
    ctr.ok(&[&flags[..], &["sleep", "600"]].concat()).await?;
    ctr.remove("pub").await?;
    let seen = listener.until("/tasks/delete", lab.patience(20)).await?;
    let topics = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exit",
        "/tasks/delete",
    ];
    in_order(&seen, &topics)?;
    wait::until("all were published", lab.patience(10), || async {
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
        seen.iter().any(|event| event.topic == "/tasks/oom"),
        "no OOM event in {seen:?}"
    );
    Ok(())
}
