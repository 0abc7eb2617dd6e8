//! Tasks through `ctr`: every way to run, exec, signals, pausing, metrics, deletion, and their events.

use super::daemon::{Containerd, RUNTIME, STATE_TIMEOUT, Version, run_args};
use super::{Case, Context, before};
use crate::case;
use crate::disk::Disk;
use crate::failure::{During, Failure, Result};
use crate::{ensure, poll, same};
use std::process::{Output, Stdio};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

/// Returns the cases.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(foreground_run_returns_output_and_exit_code, 60),
        case!(input_reaches_the_process_and_ends, 60),
        case!(terminal_has_its_size, 60),
        case!(detached_task_is_paused_measured_and_deleted, 90),
        case!(attach_follows_a_disconnected_client, 60),
        case!(limits_size_the_vm_and_pid_is_on_the_host, 60),
        case!(host_network_is_reachable, 60),
        case!(host_block_device_is_attached, 60),
        case!(many_waiters_receive_one_exit, 60),
        case!(erofs_layers_are_handed_over, 90)
            .unless(before(Version::V2), "1.x has no EROFS snapshotter"),
    ]
}

fn some<T>(end: Option<T>) -> Result<T> {
    end.ok_or_else(|| Failure("ctr has no such stream".to_owned()))
}

/// Converts output to a string without surrounding line ends.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

/// Expects `ctr task delete` to report the exit code: 1.6 exits with it, 2.x prints a warning.
pub(crate) fn expect_exit_code(output: &Output, code: i32) -> Result {
    let warned = text(&output.stderr).contains(&format!("exit code {code}"));
    ensure!(
        warned || output.status.code() == Some(code),
        "no exit code {code}: {}, {}",
        output.status,
        text(&output.stderr)
    );
    Ok(())
}

/// Returns the standard output of a command that must have succeeded.
pub(crate) fn succeeded(output: &Output) -> Result<String> {
    ensure!(
        output.status.success(),
        "{}: {}",
        output.status,
        text(&output.stderr)
    );
    Ok(text(&output.stdout))
}

async fn foreground_run_returns_output_and_exit_code(ctx: Context) -> Result {
    let output = ctx.shared.run(&["--rm"], "fg1", &["echo", "hi"]).await?;
    same!(succeeded(&output)?, "hi", "standard output");
    let script = "cat /opt/second; echo to-stderr >&2; exit 7";
    let output = ctx
        .shared
        .run(&["--rm"], "fg2", &["sh", "-c", script])
        .await?;
    same!(output.status.code(), Some(7), "exit code");
    same!(
        text(&output.stdout),
        "from the second layer",
        "standard output"
    );
    // ctr 2.3 prints a warning about cgroup v1 first.
    let errors = text(&output.stderr);
    same!(errors.lines().last(), Some("to-stderr"), "standard error");
    // A real VM: a separate kernel and one process tree.
    let output = ctx
        .shared
        .run(&["--rm"], "fg3", &["sh", "-c", "uname -r; echo $$"])
        .await?;
    let own = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let seen = succeeded(&output)?;
    ensure!(
        !seen.contains(own.trim()) && seen.ends_with("\n1"),
        "{seen:?}"
    );
    let output = ctx
        .shared
        .run(&["--rm"], "fg4", &["/no/such/program"])
        .await?;
    ensure!(
        !output.status.success() && text(&output.stderr).contains("/no/such/program"),
        "{}",
        text(&output.stderr)
    );
    Ok(())
}

async fn input_reaches_the_process_and_ends(ctx: Context) -> Result {
    let mut child = ctx
        .shared
        .ctr(&run_args(
            &["--rm"],
            "in1",
            &["sh", "-c", "wc -c; echo done"],
        ))
        .await
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = some(child.stdin.take())?;
    stdin.write_all(&vec![b'x'; 300_000]).await?;
    drop(stdin);
    same!(
        succeeded(&child.wait_with_output().await?)?,
        "300000\ndone",
        "counted"
    );
    Ok(())
}

async fn terminal_has_its_size(ctx: Context) -> Result {
    let run = ctx
        .shared
        .ctr(&run_args(
            &["--rm", "-t"],
            "tty1",
            &["sh", "-c", "tty; stty size"],
        ))
        .await;
    let words: Vec<_> = std::iter::once(run.as_std().get_program())
        .chain(run.as_std().get_args())
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    // script(1) provides a terminal of this size.
    let inner = format!("stty rows 33 cols 77; {}", words.join(" "));
    let output = Command::new("script")
        .args(["-q", "-e", "-c", &inner, "/dev/null"])
        .stdin(Stdio::null())
        .output()
        .await
        .during("script (bsdutils)")?;
    let seen = succeeded(&output)?;
    ensure!(
        seen.contains("/dev/pts/") || seen.contains("/dev/console"),
        "{seen:?}"
    );
    ensure!(seen.contains("33 77"), "{seen:?}");
    Ok(())
}

async fn detached_task_is_paused_measured_and_deleted(ctx: Context) -> Result {
    let ctr = &ctx.shared;
    ctr.sleeper("life").await?;
    ctr.state("life", "RUNNING").await?;
    let exec = |id: &'static str, argv: &'static [&'static str]| async move {
        let mut args = vec!["task", "exec", "--exec-id", id, "life"];
        args.extend(argv);
        ctr.output(&args).await
    };
    let first = exec("e1", &["sh", "-c", "echo in; exit 3"]).await?;
    same!(
        (first.status.code(), text(&first.stdout)),
        (Some(3), "in".to_owned()),
        "exec"
    );
    let missing = exec("e2", &["/no/such"]).await?;
    ensure!(
        !missing.status.success(),
        "an exec of an unknown program succeeded"
    );
    pids_and_counters(ctr).await?;
    ctr.ok(&["task", "pause", "life"]).await?;
    ctr.state("life", "PAUSED").await?;
    ctr.ok(&["task", "resume", "life"]).await?;
    ctr.state("life", "RUNNING").await?;
    ctr.ok(&["task", "kill", "-s", "SIGKILL", "life"]).await?;
    ctr.stopped("life").await?;
    let deleted = ctr.output(&["task", "delete", "life"]).await?;
    expect_exit_code(&deleted, 137)?;
    ctr.ok(&["container", "delete", "life"]).await?;
    // ctr does not remove the FIFOs of a detached exec.
    clear_fifos()
}

/// Checks `ctr task ps` and `ctr task metrics` of the task `life` and of an exec, which is killed alone.
async fn pids_and_counters(ctr: &Containerd) -> Result {
    let beside = [
        "task",
        "exec",
        "-d",
        "--exec-id",
        "e3",
        "life",
        "sleep",
        "600",
    ];
    ctr.ok(&beside).await?;
    // One guest pid per process, below a header line.
    let pids = async || -> Result<usize> {
        Ok(ctr.ok(&["task", "ps", "life"]).await?.lines().count() - 1)
    };
    same!(pids().await?, 2, "processes");
    let metrics = ctr.ok(&["task", "metrics", "life"]).await?;
    // containerd's cgroup v2 metrics, as named by ctr.
    for name in ["memory.usage", "cpu.usage_usec", "pids.current"] {
        let line = metrics.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split_whitespace().last()?.parse::<u64>().ok());
        ensure!(value.is_some_and(|value| value > 0), "{name} in {metrics}");
    }
    ctr.ok(&["task", "kill", "-s", "SIGKILL", "--exec-id", "e3", "life"])
        .await?;
    poll::until("the exec is gone", STATE_TIMEOUT, || async {
        same!(pids().await?, 1, "processes");
        Ok(())
    })
    .await?;
    ctr.state("life", "RUNNING").await
}

async fn attach_follows_a_disconnected_client(ctx: Context) -> Result {
    let ctr = &ctx.shared;
    // Reads a line and answers it; its first client is killed before that.
    let script = "echo ready; read line; echo \"got $line\"; sleep 600";
    let mut first = ctr
        .ctr(&run_args(&[], "att", &["sh", "-c", script]))
        .await
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(some(first.stdout.take())?).lines();
    let line = lines.next_line().await?;
    same!(line.as_deref(), Some("ready"), "the first client");
    first.start_kill()?;
    first.wait().await?;

    let mut second = ctr
        .ctr(&["task", "attach", "att"])
        .await
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = some(second.stdin.take())?;
    stdin.write_all(b"hello\n").await?;
    let mut lines = BufReader::new(some(second.stdout.take())?).lines();
    let line = tokio::time::timeout(ctx.patience(20), lines.next_line()).await;
    let line = line.during("the second client")??;
    same!(line.as_deref(), Some("got hello"), "after attach");
    second.start_kill()?;
    second.wait().await?;
    ctr.remove("att").await?;
    clear_fifos()
}

/// Removes the FIFOs that ctr leaves when it is killed or when its task disappears. No other FIFOs exist here.
pub(crate) fn clear_fifos() -> Result {
    for entry in std::fs::read_dir("/run/containerd/fifo")? {
        std::fs::remove_dir_all(entry?.path())?;
    }
    Ok(())
}

async fn limits_size_the_vm_and_pid_is_on_the_host(ctx: Context) -> Result {
    let ctr = &ctx.shared;
    let flags = ["-d", "--memory-limit", "402653184"];
    ctr.ok(&run_args(&flags, "big", &["sleep", "600"])).await?;
    let meminfo = ctr
        .ok(&[
            "task",
            "exec",
            "--exec-id",
            "e",
            "big",
            "grep",
            "MemTotal",
            "/proc/meminfo",
        ])
        .await?;
    let kib: u64 = meminfo
        .split_whitespace()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(0);
    // 384 MiB and 108 MiB for the guest, minus the kernel's share; libkrun rounds up.
    ensure!((380 << 10..=480 << 10).contains(&kib), "{meminfo}");
    // The task's pid is a process of this machine in a different network namespace.
    let pid = ctr.pid("big").await?;
    let theirs = std::fs::read_link(format!("/proc/{pid}/ns/net")).during(pid)?;
    ensure!(
        theirs != std::fs::read_link("/proc/self/ns/net")?,
        "the VM is in the host's network namespace"
    );
    ctr.remove("big").await
}

async fn host_block_device_is_attached(ctx: Context) -> Result {
    let disk = Disk::new(&ctx.shared.dir)?;
    disk.write(0, b"of the host")?;
    let node = disk.node.display().to_string();
    let script = format!(
        "head -c 11 {node}; printf 'from the task' | dd of={node} conv=notrunc,fsync 2>/dev/null"
    );
    let flags = ["--rm", "--device", &node];
    let output = ctx
        .shared
        .run(&flags, "blk1", &["sh", "-c", &script])
        .await?;
    same!(succeeded(&output)?, "of the host", "read");
    same!(disk.read(0, 13)?, b"from the task", "on the host");
    disk.detached().await
}

/// Runs with `--net-host`: servers on the node's loopback are reachable. boxlite-cri's suite tests the rest.
async fn host_network_is_reachable(ctx: Context) -> Result {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8097").await?;
    let caller = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await?;
        stream.write_all(b"from the node\n").await
    });
    let script = "nc 127.0.0.1 8097 < /dev/null";
    let output = ctx
        .shared
        .run(&["--rm", "--net-host"], "host", &["sh", "-c", script])
        .await?;
    same!(succeeded(&output)?, "from the node", "the node's loopback");
    caller.await??;
    Ok(())
}

/// Runs one foreground client and two attached clients: all receive the exit.
async fn many_waiters_receive_one_exit(ctx: Context) -> Result {
    let ctr = &ctx.shared;
    let start = async |args: &[&str]| {
        ctr.ctr(args)
            .await
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    };
    let script = "echo ready; sleep 600";
    let run = run_args(&["--null-io"], "many", &["sh", "-c", script]);
    let mut waiting = vec![start(&run).await?];
    ctr.state("many", "RUNNING").await?;
    for _ in 0..2 {
        waiting.push(start(&["task", "attach", "many"]).await?);
    }
    // None of them ends early.
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    for child in &mut waiting {
        ensure!(child.try_wait()?.is_none(), "a client did not wait");
    }
    ctr.ok(&["task", "kill", "-s", "SIGKILL", "many"]).await?;
    for child in waiting {
        let ended = tokio::time::timeout(ctx.patience(20), child.wait_with_output());
        let output = ended.await.during("a client of the task")??;
        same!(
            output.status.code(),
            Some(137),
            "exit code seen by a client that printed {:?}",
            text(&output.stderr)
        );
    }
    // The first client has deleted the task.
    ctr.output(&["task", "delete", "many"]).await?;
    ctr.ok(&["container", "delete", "many"]).await?;
    clear_fifos()
}

async fn erofs_layers_are_handed_over(ctx: Context) -> Result {
    let ctr = &ctx.shared;
    let archive = ctx.archive.display().to_string();
    ctr.ok(&[
        "-n",
        "erofs",
        "image",
        "import",
        "--local",
        "--snapshotter",
        "erofs",
        &archive,
    ])
    .await?;
    let script = "grep ' / ' /proc/mounts; grep -c erofs /proc/mounts; cat /opt/second; echo new > /opt/second; cat /opt/second";
    let run = [
        "-n",
        "erofs",
        "run",
        "--rm",
        "--snapshotter",
        "erofs",
        "--runtime",
        RUNTIME,
        super::IMAGE,
        "ero",
        "sh",
        "-c",
        script,
    ];
    let seen = succeeded(&ctr.output(&run).await?)?;
    ensure!(seen.contains("from the second layer\nnew"), "{seen}");
    ensure!(
        seen.lines()
            .next()
            .is_some_and(|line| line.starts_with("overlay")),
        "{seen}"
    );
    poll::until("the image is gone", ctx.patience(10), || async {
        ctr.ok(&["-n", "erofs", "image", "delete", "--sync", super::IMAGE])
            .await
            .map(drop)
    })
    .await
}
