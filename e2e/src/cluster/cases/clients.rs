//! kubectl's streaming commands: logs, exec, attach, cp, port-forward and debug.

use crate::cluster::context::{ClusterContext, POD_TIMEOUT, container};
use crate::cluster::images::BUSYBOX;
use crate::cluster::pods::{self, IDLE, pod, script};
use crate::cluster::until;
use crate::failure::{During, Failure, Result};
use crate::runner::Case;
use crate::{case, ensure, same};
use serde_json::json;
use sha2::Digest;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::ChildStdout;

type Context = Arc<ClusterContext>;

pub(super) fn cases() -> Vec<Case<ClusterContext>> {
    vec![
        case!(logs_follow_until_the_container_ends, 240),
        case!(logs_follow_through_rotation, 300),
        case!(exec_returns_exit_codes_with_and_without_a_terminal, 240),
        case!(copied_files_keep_their_digest, 300),
        case!(port_forward_carries_parallel_requests, 240),
        case!(port_forward_half_closes, 240),
        case!(attach_reaches_the_main_process, 240),
        case!(ephemeral_container_sees_its_target, 240),
    ]
}

/// Rotations of the followed log.
const ROTATIONS: usize = 3;
/// Size of the copied file in MiB.
const COPY_MIB: usize = 100;
/// Parallel requests through one forwarded port.
const REQUESTS: usize = 16;
/// Bytes of a request that its end completes.
const HALF_CLOSED_BYTES: usize = 100_000;
/// Limit for the answer to one request or line.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

async fn logs_follow_until_the_container_ends(ctx: Context) -> Result {
    let lines = "i=0; while [ $i -lt 2000 ]; do echo line $i of the log; i=$((i+1)); done; sleep 2; echo end >&2";
    ctx.kubectl.apply(&script("talker", lines)).await?;
    ctx.wait("talker", "has started", |pod| {
        container(pod, "main")["state"]["waiting"].is_null() && !container(pod, "main").is_null()
    })
    .await?;
    let text = ctx.kubectl.run(&["logs", "-f", "talker"]).await?;
    let expected: String = (0..2000)
        .map(|i| format!("line {i} of the log\n"))
        .collect();
    same!(text, format!("{expected}end\n"), "followed log");
    same!(
        ctx.kubectl.run(&["logs", "--tail=2", "talker"]).await?,
        "line 1999 of the log\nend\n",
        "tail"
    );
    Ok(())
}

/// The kubelet rotates the log several times while a client follows it: no line is missing and none is repeated.
async fn logs_follow_through_rotation(ctx: Context) -> Result {
    let small = json!({"containerLogMaxSize": "64Ki", "containerLogMaxFiles": 5, "containerLogMonitorInterval": "3s"});
    ctx.cluster.worker.restart_kubelet(&small).await?;
    // 50 KiB at a time, until the kubelet has rotated the log three times: it removes rotated files beyond five.
    let write = "n=0; until [ -e /enough ]; do i=0; while [ $i -lt 1000 ]; do echo line $n of a log that is rotated; \
        i=$((i+1)); n=$((n+1)); done; sleep 3; done; echo total $n";
    ctx.run_pod(&script("talker", write)).await?;
    let follow = ctx
        .kubectl
        .command()
        .args(["logs", "-f", "talker"])
        .stdout(Stdio::piped())
        .spawn()?;
    let reading = tokio::spawn(follow.wait_with_output());
    let uid = ctx.pod("talker").await?["metadata"]["uid"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let dir = format!("/var/log/pods/{}_talker_{uid}/main", ctx.kubectl.namespace);
    until("three rotated logs", POD_TIMEOUT, || async {
        let rotated = std::fs::read_dir(&dir)?
            .flatten()
            .filter(|e| e.file_name() != "0.log")
            .count();
        ensure!(rotated >= ROTATIONS, "{rotated} rotated logs");
        Ok(())
    })
    .await?;
    ctx.exec("talker", "touch /enough").await?;
    let output = tokio::time::timeout(POD_TIMEOUT, reading).await???;
    let text = String::from_utf8_lossy(&output.stdout);
    let (lines, total) = text.trim_end().rsplit_once("\ntotal ").unwrap_or_default();
    let expected: Vec<_> = (0..total.parse::<usize>()?)
        .map(|n| format!("line {n} of a log that is rotated"))
        .collect();
    let differs = lines
        .lines()
        .zip(&expected)
        .find(|(seen, expected)| seen != expected);
    ensure!(differs.is_none(), "first difference: {differs:?}");
    same!(lines.lines().count(), expected.len(), "followed lines");
    Ok(())
}

async fn exec_returns_exit_codes_with_and_without_a_terminal(ctx: Context) -> Result {
    ctx.run_pod(&script("target", IDLE)).await?;
    let args = [
        "exec",
        "-i",
        "target",
        "--",
        "sh",
        "-c",
        "cat; echo error >&2; exit 7",
    ];
    let done = ctx.kubectl.try_run(&args, b"input\n").await?;
    same!(done.code, 7, "exit code: {}", done.stderr);
    same!(done.text(), "input\n", "standard output");
    ensure!(
        done.stderr.starts_with("error\n"),
        "standard error: {}",
        done.stderr
    );
    let done = ctx
        .kubectl
        .try_run(&["exec", "target", "--", "/no/such/program"], b"")
        .await?;
    ensure!(
        done.code != 0 && done.stderr.contains("/no/such/program"),
        "{done:?}"
    );
    // script(1) provides the terminal that -t needs.
    let kubectl = ctx.kubectl.program.display();
    let namespace = &ctx.kubectl.namespace;
    // The size arrives after the start.
    let inner = r#"tty; for i in 1 2 3 4 5; do [ "$(stty size)" = "33 77" ] && break; sleep 1; done; stty size; exit 9"#;
    let line = format!(
        "stty rows 33 cols 77; exec {kubectl} -n {namespace} exec -it target -- sh -c '{inner}'"
    );
    let output = tokio::process::Command::new("script")
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .env("KUBECONFIG", &ctx.kubectl.kubeconfig)
        .env("TERM", "dumb")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(POD_TIMEOUT, output).await??;
    let text = String::from_utf8_lossy(&output.stdout);
    same!(
        output.status.code(),
        Some(9),
        "exit code with a terminal: {text}"
    );
    ensure!(
        text.contains("/dev/") && text.contains("33 77"),
        "terminal: {text}"
    );
    Ok(())
}

async fn copied_files_keep_their_digest(ctx: Context) -> Result {
    ctx.run_pod(&script("copies", IDLE)).await?;
    let dir = ctx.cluster.dir.join("copies");
    std::fs::create_dir_all(&dir)?;
    let (there, back) = (dir.join("there"), dir.join("back"));
    let mut bytes = vec![0; COPY_MIB << 20];
    rand::fill(&mut bytes[..]);
    std::fs::write(&there, &bytes)?;
    let expected = hex::encode(sha2::Sha256::digest(&bytes));
    let (from, to) = (there.display().to_string(), back.display().to_string());
    ctx.kubectl.run(&["cp", &from, "copies:/tmp/file"]).await?;
    let sum = ctx.exec("copies", "sha256sum /tmp/file").await?;
    same!(
        sum.split(' ').next(),
        Some(expected.as_str()),
        "digest in the container"
    );
    ctx.kubectl.run(&["cp", "copies:/tmp/file", &to]).await?;
    let copied = std::fs::read(&back).during(&to)?;
    same!(
        hex::encode(sha2::Sha256::digest(&copied)),
        expected,
        "digest of the copy"
    );
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

/// A running `kubectl port-forward`.
struct Forward {
    process: tokio::process::Child,
    /// Local port.
    port: u16,
    /// kubectl writes a line for each connection, and ends if its output is closed.
    _lines: Lines<BufReader<ChildStdout>>,
}

async fn forward(ctx: &Context, pod: &str, port: u16) -> Result<Forward> {
    let mut process = ctx
        .kubectl
        .command()
        .args(["port-forward", pod, &format!(":{port}")])
        .stdout(Stdio::piped())
        .spawn()?;
    let stdout = process
        .stdout
        .take()
        .ok_or_else(|| Failure("no output".into()))?;
    let mut lines = BufReader::new(stdout).lines();
    // "Forwarding from 127.0.0.1:35473 -> 8080"
    let line = tokio::time::timeout(ANSWER_TIMEOUT, lines.next_line())
        .await??
        .unwrap_or_default();
    let local = line
        .split("127.0.0.1:")
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    Ok(Forward {
        process,
        port: local.unwrap_or_default().parse().during(&line)?,
        _lines: lines,
    })
}

/// The server answers only after the client has closed its side of the connection.
async fn port_forward_half_closes(ctx: Context) -> Result {
    let mut main = pods::container("main", "exec nc -ll -p 9000 -e wc -c");
    // kubectl gives up after a refused connection.
    let listens = ["sh", "-c", "netstat -ltn | grep -q :9000"];
    main["readinessProbe"] =
        json!({"exec": {"command": listens}, "periodSeconds": 1, "timeoutSeconds": 10});
    ctx.run_pod(&pod("counter", &[main])).await?;
    let mut forward = forward(&ctx, "counter", 9000).await?;
    let mut stream = TcpStream::connect(("127.0.0.1", forward.port)).await?;
    stream.write_all(&[b'x'; HALF_CLOSED_BYTES]).await?;
    stream.shutdown().await?;
    let mut answer = String::new();
    tokio::time::timeout(ANSWER_TIMEOUT, stream.read_to_string(&mut answer)).await??;
    same!(
        answer.trim(),
        HALF_CLOSED_BYTES.to_string(),
        "bytes that the server counted"
    );
    forward.process.kill().await?;
    Ok(())
}

async fn port_forward_carries_parallel_requests(ctx: Context) -> Result {
    let serve = "mkdir /www; head -c 300000 /dev/zero | tr '\\0' x > /www/page; exec httpd -f -p 8080 -h /www";
    ctx.run_pod(&script("web", serve)).await?;
    let mut forward = forward(&ctx, "web", 8080).await?;
    let url = format!("http://127.0.0.1:{}/page", forward.port);
    let client = reqwest::Client::builder()
        .no_proxy()
        .timeout(ANSWER_TIMEOUT)
        .build()?;
    let requests = (0..REQUESTS).map(|_| async {
        let answer = client.get(&url).send().await.during(&url)?;
        Ok::<_, Failure>(answer.bytes().await?.len())
    });
    for length in futures::future::try_join_all(requests).await? {
        same!(length, 300_000, "length of an answer");
    }
    forward.process.kill().await?;
    Ok(())
}

async fn attach_reaches_the_main_process(ctx: Context) -> Result {
    let mut main = pods::container("main", "read line; echo got $line; exit 5");
    main["stdin"] = json!(true);
    main["stdinOnce"] = json!(true);
    ctx.run_pod(&pod("attached", &[main])).await?;
    let mut attach = ctx
        .kubectl
        .command()
        .args(["attach", "-i", "attached"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = attach
        .stdin
        .take()
        .ok_or_else(|| Failure("no input".into()))?;
    stdin.write_all(b"a line\n").await?;
    let mut text = String::new();
    let mut stdout = attach
        .stdout
        .take()
        .ok_or_else(|| Failure("no output".into()))?;
    tokio::time::timeout(ANSWER_TIMEOUT, stdout.read_to_string(&mut text)).await??;
    same!(text, "got a line\n", "output of the attached process");
    let done = ctx
        .wait("attached", "has ended", |pod| {
            container(pod, "main")["state"]["terminated"].is_object()
        })
        .await?;
    same!(
        container(&done, "main")["state"]["terminated"]["exitCode"],
        5,
        "exit code"
    );
    Ok(())
}

/// `kubectl debug --target`: the new container shares the target's PID namespace.
async fn ephemeral_container_sees_its_target(ctx: Context) -> Result {
    ctx.run_pod(&script(
        "debugged",
        "echo marker > /marker; exec sleep 98765",
    ))
    .await?;
    let image = format!("--image={BUSYBOX}");
    let look = "ps | grep [9]8765; cat /proc/1/root/marker";
    let args = [
        "debug",
        "debugged",
        &image,
        "--target=main",
        "--container=dbg",
        "--",
        "sh",
        "-c",
        look,
    ];
    ctx.kubectl.run(&args).await?;
    let seen = ctx
        .wait("debugged", "has an ended debug container", |pod| {
            container(pod, "dbg")["state"]["terminated"].is_object()
        })
        .await?;
    let log = ctx.kubectl.run(&["logs", "debugged", "-c", "dbg"]).await?;
    ensure!(
        log.contains("sleep 98765"),
        "processes seen by the debugger: {log}"
    );
    ensure!(
        container(&seen, "main")["state"]["running"].is_object(),
        "{}",
        seen["status"]
    );
    until("the target still runs", ANSWER_TIMEOUT, || async {
        same!(
            ctx.exec("debugged", "cat /marker").await?,
            "marker\n",
            "marker"
        );
        Ok(())
    })
    .await
}
