//! Tasks by `ctr`: run in every way, exec, signals, freezing, counters, deletion, and the events of it all.

use super::daemon::{Containerd, RUNTIME, STATE, Version, run_args};
use super::{Case, Shared, before};
use crate::disk::Disk;
use crate::outcome::{During, Failure, Result};
use crate::runner::case;
use crate::{ensure, same, wait};
use std::process::{Output, Stdio};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

/// All of them.
pub fn cases() -> Vec<Case> {
    vec![
        case(
            "task::output_and_exit_code_of_a_foreground_run",
            60,
            foreground,
        ),
        case("task::input_reaches_the_process_and_ends", 60, input),
        case("task::a_terminal_with_its_size", 60, terminal),
        case("task::detached_exec_freeze_counters_kill_delete", 90, life),
        case("task::a_client_that_went_is_followed_by_attach", 60, attach),
        case(
            "task::limits_make_the_vm_and_pids_are_the_hosts",
            60,
            limits,
        ),
        case("task::the_hosts_network", 60, host_network),
        case("task::a_block_device_of_the_host", 60, block_device),
        case("task::many_wait_for_one_exit", 60, many_waiters),
        case("task::erofs_layers_are_handed_over", 90, erofs)
            .unless(before(Version::V2), "1.x has no EROFS snapshotter"),
    ]
}

fn some<T>(end: Option<T>) -> Result<T> {
    end.ok_or_else(|| Failure("ctr has no such end".to_owned()))
}

/// As a string, without the line ends around it.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

/// `ctr task delete` of 1.6 ends with the task's exit code, that of 2.x warns of it.
pub fn told_exit(output: &Output, code: i32) -> Result {
    let warned = text(&output.stderr).contains(&format!("exit code {code}"));
    ensure!(
        warned || output.status.code() == Some(code),
        "no exit code {code}: {}, {}",
        output.status,
        text(&output.stderr)
    );
    Ok(())
}

/// The standard output of what must have succeeded.
pub fn succeeded(output: &Output) -> Result<String> {
    ensure!(
        output.status.success(),
        "{}: {}",
        output.status,
        text(&output.stderr)
    );
    Ok(text(&output.stdout))
}

async fn foreground(lab: Shared) -> Result {
    let output = lab.shared.run(&["--rm"], "fg1", &["echo", "hi"]).await?;
    same!(succeeded(&output)?, "hi", "standard output");
    let script = "cat /opt/second; echo to-stderr >&2; exit 7";
    let output = lab
        .shared
        .run(&["--rm"], "fg2", &["sh", "-c", script])
        .await?;
    same!(output.status.code(), Some(7), "exit code");
    same!(
        text(&output.stdout),
        "from the second layer",
        "standard output"
    );
    // ctr of 2.3 warns of cgroup v1 in front of it.
    let errors = text(&output.stderr);
    same!(errors.lines().last(), Some("to-stderr"), "standard error");
    // A real VM: its own kernel, and one process tree.
    let output = lab
        .shared
        .run(&["--rm"], "fg3", &["sh", "-c", "uname -r; echo $$"])
        .await?;
    let own = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let seen = succeeded(&output)?;
    ensure!(
        !seen.contains(own.trim()) && seen.ends_with("\n1"),
        "{seen:?}"
    );
    let output = lab
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

async fn input(lab: Shared) -> Result {
    let mut child = lab
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

async fn terminal(lab: Shared) -> Result {
    let run = lab
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
    // script(1) gives it a terminal of this size.
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

async fn life(lab: Shared) -> Result {
    let ctr = &lab.shared;
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
    ensure!(!missing.status.success(), "an exec of nothing succeeded");
    pids_and_counters(ctr).await?;
    ctr.ok(&["task", "pause", "life"]).await?;
    ctr.state("life", "PAUSED").await?;
    ctr.ok(&["task", "resume", "life"]).await?;
    ctr.state("life", "RUNNING").await?;
    ctr.ok(&["task", "kill", "-s", "SIGKILL", "life"]).await?;
    ctr.stopped("life").await?;
    let deleted = ctr.output(&["task", "delete", "life"]).await?;
    told_exit(&deleted, 137)?;
    ctr.ok(&["container", "delete", "life"]).await?;
    // ctr leaves those of a detached exec.
    clear_fifos()
}

/// `ctr task ps` and `ctr task metrics` of the task `life` with an exec beside it, which is killed alone.
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
    // A pid of the guest for each process, below a head line.
    let pids = async || -> Result<usize> {
        Ok(ctr.ok(&["task", "ps", "life"]).await?.lines().count() - 1)
    };
    same!(pids().await?, 2, "processes");
    let metrics = ctr.ok(&["task", "metrics", "life"]).await?;
    // containerd's metrics of cgroup v2, by ctr's names.
    for name in ["memory.usage", "cpu.usage_usec", "pids.current"] {
        let line = metrics.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split_whitespace().last()?.parse::<u64>().ok());
        ensure!(value.is_some_and(|value| value > 0), "{name} in {metrics}");
    }
    ctr.ok(&["task", "kill", "-s", "SIGKILL", "--exec-id", "e3", "life"])
        .await?;
    wait::until("the exec is gone", STATE, || async {
        same!(pids().await?, 1, "processes");
        Ok(())
    })
    .await?;
    ctr.state("life", "RUNNING").await
}

async fn attach(lab: Shared) -> Result {
    let ctr = &lab.shared;
    // Reads a line, answers it; its first client is killed before that.
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
    let line = tokio::time::timeout(lab.patience(20), lines.next_line()).await;
    let line = line.during("the second client")??;
    same!(line.as_deref(), Some("got hello"), "after attach");
    second.start_kill()?;
    second.wait().await?;
    ctr.remove("att").await?;
    clear_fifos()
}

/// ctr leaves its FIFOs where it was killed, or its task went without it; nobody else's are there.
pub fn clear_fifos() -> Result {
    for entry in std::fs::read_dir("/run/containerd/fifo")? {
        std::fs::remove_dir_all(entry?.path())?;
    }
    Ok(())
}

async fn limits(lab: Shared) -> Result {
    let ctr = &lab.shared;
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
    // 384 MiB and 64 MiB of overhead, less what the kernel keeps; libkrun rounds up.
    ensure!((380 << 10..=480 << 10).contains(&kib), "{meminfo}");
    // A task's pid is a process of this machine, in a network namespace that is not this one.
    let pid = ctr.pid("big").await?;
    let theirs = std::fs::read_link(format!("/proc/{pid}/ns/net")).during(pid)?;
    ensure!(
        theirs != std::fs::read_link("/proc/self/ns/net")?,
        "the VM is in the host's network namespace"
    );
    ctr.remove("big").await
}

async fn block_device(lab: Shared) -> Result {
    let disk = Disk::new(&lab.shared.dir)?;
    disk.write(0, b"of the host")?;
    let node = disk.node.display().to_string();
    let script = format!(
        "head -c 11 {node}; printf 'from the task' | dd of={node} conv=notrunc,fsync 2>/dev/null"
    );
    let flags = ["--rm", "--device", &node];
    let output = lab
        .shared
        .run(&flags, "blk1", &["sh", "-c", &script])
        .await?;
    same!(succeeded(&output)?, "of the host", "read");
    same!(disk.read(0, 13)?, b"from the task", "on the host");
    disk.given_up().await
}

/// `--net-host`: what listens on the node's loopback can be reached. More of it is boxlite-cri's suite's.
async fn host_network(lab: Shared) -> Result {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8097").await?;
    let caller = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await?;
        stream.write_all(b"from the node\n").await
    });
    let script = "nc 127.0.0.1 8097 < /dev/null";
    let output = lab
        .shared
        .run(&["--rm", "--net-host"], "host", &["sh", "-c", script])
        .await?;
    same!(succeeded(&output)?, "from the node", "the node's loopback");
    caller.await??;
    Ok(())
}

/// One run in the foreground and two attached clients: all of them hear the one exit.
async fn many_waiters(lab: Shared) -> Result {
    let ctr = &lab.shared;
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
        let ended = tokio::time::timeout(lab.patience(20), child.wait_with_output());
        let output = ended.await.during("a client of the task")??;
        same!(
            output.status.code(),
            Some(137),
            "exit code a client heard; it said {:?}",
            text(&output.stderr)
        );
    }
    // Whoever was the first has deleted the task.
    ctr.output(&["task", "delete", "many"]).await?;
    ctr.ok(&["container", "delete", "many"]).await?;
    clear_fifos()
}

async fn erofs(lab: Shared) -> Result {
    let ctr = &lab.shared;
    let archive = lab.archive.display().to_string();
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
    wait::until("the image is gone", lab.patience(10), || async {
        ctr.ok(&["-n", "erofs", "image", "delete", "--sync", super::IMAGE])
            .await
            .map(drop)
    })
    .await
}
