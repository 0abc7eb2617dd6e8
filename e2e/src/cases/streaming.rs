//! Exec, Attach and PortForward as kubectl uses them, over SPDY and WebSocket: output and exit codes, half-close,
//! terminals, many readers, clients that disconnect or stall, single-use URLs, and ports inside the VM.

use crate::case;
use crate::context::Backend;
use crate::failure::{During, Result};
use crate::pod::{Container, Pod, container_spec};
use crate::runner::{Case, Context};
use crate::stream::{self, Session, Streams, Transport, forward, spdy};
use crate::{ensure, poll, same};
use k8s_cri::v1::*;
use rand::RngCore;
use sha2::{Digest, Sha256};
use std::time::Duration;
use tonic::Code;

/// MiB sent through a forwarded port and back. `BOXLITE_E2E_FORWARD_MIB` overrides it.
const FORWARD_MIB: usize = 32;
/// `FORWARD_MIB` under nested emulation.
const KRUN_FORWARD_MIB: usize = 4;
const PLAIN: Streams = Streams {
    stdin: false,
    stderr: true,
    tty: false,
};
const TYPING: Streams = Streams {
    stdin: true,
    ..PLAIN
};
const TERMINAL: Streams = Streams {
    stdin: true,
    stderr: false,
    tty: true,
};
const BOTH: [Transport; 2] = [Transport::Spdy, Transport::WebSocket];

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(exec_streams_output_and_half_closes, 90),
        case!(exec_terminal_is_resized, 60),
        case!(exec_ends_when_its_client_disconnects, 120),
        case!(many_sessions_run_at_once, 90),
        case!(attach_serves_several_clients, 90),
        case!(attach_with_stdin_once_ends_the_input, 60),
        case!(attach_slow_reader_does_not_block_others, 90),
        case!(urls_are_single_use_and_bad_requests_refused, 60),
        case!(port_forward_connects_to_several_ports, 120),
        case!(port_forward_transfers_every_byte, 300),
    ]
}

async fn run(c: &Container, argv: &[&str], streams: Streams, over: Transport) -> Result<Session> {
    Session::open(&c.exec_url(argv, streams).await?, over, streams).await
}

/// Runs a pod with one container that sleeps.
async fn sleeper(ctx: &Context) -> Result<(Pod, Container)> {
    let pod = ctx.shared_pod().await;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    Ok((pod, c))
}

fn random(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    rand::rng().fill_bytes(&mut bytes);
    bytes
}

async fn exec_streams_output_and_half_closes(ctx: Context) -> Result {
    let (pod, c) = sleeper(&ctx).await?;
    for over in BOTH {
        let script = "echo out; echo err >&2; exit 7";
        let mut session = run(&c, &["sh", "-c", script], PLAIN, over).await?;
        same!(session.rest("stdout").await?, b"out\n", "{over:?} stdout");
        same!(session.rest("stderr").await?, b"err\n", "{over:?} stderr");
        same!(session.exit_code().await?, 7, "{over:?} exit code");
        let mut session = run(&c, &["true"], PLAIN, over).await?;
        same!(session.exit_code().await?, 0, "{over:?} success");
        let mut session = run(&c, &["/no/such/program"], PLAIN, over).await?;
        let status = session.status().await?;
        ensure!(
            status["status"] == "Failure" && status.to_string().contains("/no/such/program"),
            "{over:?}: a program that is not there: {status}"
        );
        // The command ends only at the end of its input, and returns all of it.
        let bytes = random(1 << 20);
        let mut session = run(&c, &["cat"], TYPING, over).await?;
        session.send("stdin", &bytes).await?;
        session.close("stdin").await?;
        let echoed = session.rest("stdout").await?;
        ensure!(
            echoed == bytes,
            "{over:?}: {} bytes came back",
            echoed.len()
        );
        same!(session.exit_code().await?, 0, "{over:?} cat");
    }
    pod.end().await
}

async fn exec_terminal_is_resized(ctx: Context) -> Result {
    let (pod, c) = sleeper(&ctx).await?;
    for over in BOTH {
        let script = "stty -echo; echo term=$TERM; while read line; do stty size; done; exit 4";
        let mut session = run(&c, &["sh", "-c", script], TERMINAL, over).await?;
        session.until("stdout", "term=xterm").await?;
        for (width, height) in [(80, 24), (132, 50)] {
            let resized = session.resize_and_see(width, height).await;
            resized.during(format!("{over:?}"))?;
        }
        // ^D ends a terminal's input.
        session.send("stdin", b"\x04").await?;
        same!(session.exit_code().await?, 4, "{over:?} exit code");
    }
    pod.end().await
}

/// Returns the argument lists of the processes in the container.
async fn processes(c: &Container) -> Result<String> {
    let script = "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$f; echo; done 2>/dev/null; true";
    c.out(&["sh", "-c", script]).await
}

async fn exec_ends_when_its_client_disconnects(ctx: Context) -> Result {
    let (pod, c) = sleeper(&ctx).await?;
    for (over, streams, seconds) in [
        (Transport::Spdy, PLAIN, "7001"),
        (Transport::WebSocket, TYPING, "7002"),
        (Transport::Spdy, TYPING, "7003"),
        (Transport::Spdy, TERMINAL, "7004"),
    ] {
        let script = format!("trap '' TERM; echo started; sleep {seconds} & sleep {seconds}; true");
        let mut session = run(&c, &["sh", "-c", &script], streams, over).await?;
        session.until("stdout", "started").await?;
        let seen = processes(&c).await?;
        ensure!(seen.contains(seconds), "it does not run: {seen}");
        if streams.stdin && !streams.tty {
            // Including a session blocked on input that the command does not read.
            let flood = vec![0; 64 << 20];
            let sending = session.send("stdin", &flood);
            let stalled = tokio::time::timeout(Duration::from_secs(1), sending).await;
            ensure!(stalled.is_err(), "64 MiB of input went nowhere");
        }
        drop(session);
        poll::until("the command is gone", ctx.patience(30), || async {
            let seen = processes(&c).await?;
            ensure!(!seen.contains(seconds), "{seen}");
            Ok(())
        })
        .await?;
    }
    pod.end().await
}

async fn many_sessions_run_at_once(ctx: Context) -> Result {
    let (pod, c) = sleeper(&ctx).await?;
    let sessions = (0..16).map(|number| {
        let c = c.clone();
        async move {
            let over = BOTH[number % 2];
            let bytes = random(64 << 10);
            let mut session = run(
                &c,
                &["sh", "-c", "cat; exit $0", &number.to_string()],
                TYPING,
                over,
            )
            .await?;
            session.send("stdin", &bytes).await?;
            session.close("stdin").await?;
            ensure!(
                session.rest("stdout").await? == bytes,
                "session {number} over {over:?}"
            );
            same!(
                session.exit_code().await?,
                number as i32,
                "session {number}"
            );
            Result::Ok(())
        }
    });
    futures::future::try_join_all(sessions).await?;
    pod.end().await
}

/// Starts a container that answers each line of its input.
async fn answerer(ctx: &Context, pod: &Pod, once: bool) -> Result<Container> {
    let script = "echo before; while read line; do echo got $line; done; echo end";
    let mut spec = container_spec("c", &ctx.images.base, &["sh", "-c", script]);
    spec.stdin = true;
    spec.stdin_once = once;
    let c = pod.start_with(spec).await?;
    c.printed("before", stream::MESSAGE_TIMEOUT).await?;
    Ok(c)
}

async fn attach_serves_several_clients(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let c = answerer(&ctx, &pod, false).await?;
    let mut reader = Session::open(&c.attach_url(PLAIN).await?, BOTH[0], PLAIN).await?;
    // Output is the only sign that a reader is attached, so some is produced until it arrives.
    let mut typist = Session::open(&c.attach_url(TYPING).await?, BOTH[0], TYPING).await?;
    loop {
        typist.send("stdin", b"probe\n").await?;
        let heard = reader.until("stdout", "got probe\n");
        if let Ok(heard) = tokio::time::timeout(Duration::from_millis(500), heard).await {
            heard?;
            break;
        }
    }
    drop(typist);
    for over in BOTH {
        let mut session = Session::open(&c.attach_url(TYPING).await?, over, TYPING).await?;
        let line = format!("{over:?}");
        // The answer to the first line arrives: input does not overtake the attach.
        session
            .send("stdin", format!("{line}\n").as_bytes())
            .await?;
        let seen = session.until("stdout", &format!("got {line}\n")).await?;
        ensure!(
            !seen.contains("before"),
            "output of before the attach: {seen:?}"
        );
        reader.until("stdout", &format!("got {line}\n")).await?;
        // Disconnecting, with or without half-close, does not end the container's input.
        session.close("stdin").await?;
    }
    let mut session = Session::open(&c.attach_url(TYPING).await?, BOTH[0], TYPING).await?;
    session.send("stdin", b"again\n").await?;
    session.until("stdout", "got again\n").await?;
    // The sessions end with the container.
    c.stop(0).await?;
    same!(reader.exit_code().await?, 0, "attach ends well");
    same!(session.exit_code().await?, 0, "attach ends well");
    pod.end().await
}

async fn attach_with_stdin_once_ends_the_input(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let c = answerer(&ctx, &pod, true).await?;
    let mut session = Session::open(&c.attach_url(TYPING).await?, BOTH[0], TYPING).await?;
    session.send("stdin", b"one\n").await?;
    session.until("stdout", "got one\n").await?;
    // The client disconnects without a half-close.
    drop(session);
    let status = c.exited(ctx.patience(20)).await?;
    same!(status.exit_code, 0, "its input ended");
    ensure!(c.output()?.ends_with("end\n"), "{}", c.output()?);
    pod.end().await
}

async fn attach_slow_reader_does_not_block_others(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    // More than all buffers between container and client hold, at a rate that a reading client can follow.
    let script = "read go; i=0; while [ $i -lt 100 ]; do head -c 100000 /dev/zero | tr '\\0' x; \
        usleep 40000; i=$((i+1)); done; echo done; sleep 1000";
    let mut spec = container_spec("c", &ctx.images.base, &["sh", "-c", script]);
    spec.stdin = true;
    let c = pod.start_with(spec).await?;
    // One attached client never reads.
    let (socket, _) =
        stream::upgrade_spdy(&c.attach_url(PLAIN).await?, "v4.channel.k8s.io").await?;
    let mut deaf = spdy::Client::never_reading(socket);
    for name in ["error", "stdout", "stderr"] {
        deaf.open(&[("streamtype", name)]).await?;
    }
    let mut session = Session::open(&c.attach_url(TYPING).await?, BOTH[0], TYPING).await?;
    session.send("stdin", b"go\n").await?;
    // The other client receives everything, and so does the log.
    let seen = session.until("stdout", "done\n").await?;
    same!(seen.len(), 100 * 100_000 + "done\n".len(), "bytes seen");
    c.printed("done\n", stream::MESSAGE_TIMEOUT).await?;
    drop(deaf);
    pod.end().await
}

async fn urls_are_single_use_and_bad_requests_refused(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "urls").await?;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    let url = c.exec_url(&["true"], PLAIN).await?;
    ensure!(url.starts_with("http://127.0.0.1:"), "{url}");
    let status = async |url: &str| -> Result<u16> {
        let head = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n";
        Ok(stream::request(url, "POST", head).await?.1)
    };
    same!(status(&url).await?, 101, "first use");
    same!(status(&url).await?, 404, "second use");
    let other = c.exec_url(&["true"], PLAIN).await?;
    same!(
        status(&other.replace("/exec/", "/attach/")).await?,
        404,
        "another endpoint"
    );
    let unknown = format!(
        "{}/{}",
        url.rsplit_once('/').unwrap_or_default().0,
        "0".repeat(32)
    );
    same!(status(&unknown).await?, 404, "unknown token");
    let plain = c.exec_url(&["true"], PLAIN).await?;
    same!(
        stream::request(&plain, "GET", "").await?.1,
        400,
        "no upgrade"
    );
    let odd = c.exec_url(&["true"], PLAIN).await?;
    let head = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v9.channel.k8s.io\r\n";
    same!(
        stream::request(&odd, "POST", head).await?.1,
        403,
        "unknown protocol"
    );
    // Refusals of the calls themselves.
    let mut cri = ctx.node.cri.runtime();
    let request = ExecRequest {
        container_id: c.id.clone(),
        cmd: vec!["true".into()],
        tty: true,
        stdin: false,
        stdout: true,
        stderr: true,
    };
    let code = |status: std::result::Result<_, tonic::Status>| status.err().map(|s| s.code());
    same!(
        code(cri.exec(request.clone()).await.map(drop)),
        Some(Code::InvalidArgument),
        "tty and stderr"
    );
    let nothing = ExecRequest {
        tty: false,
        stdout: false,
        stderr: false,
        ..request.clone()
    };
    same!(
        code(cri.exec(nothing).await.map(drop)),
        Some(Code::InvalidArgument),
        "no stream"
    );
    let refused = AttachRequest {
        container_id: "nobody".into(),
        stdout: true,
        ..Default::default()
    };
    same!(
        code(cri.attach(refused).await.map(drop)),
        Some(Code::NotFound),
        "unknown container"
    );
    c.stop(0).await?;
    let stopped = ExecRequest {
        tty: false,
        ..request
    };
    same!(
        code(cri.exec(stopped).await.map(drop)),
        Some(Code::FailedPrecondition),
        "stopped container"
    );
    pod.stop().await?;
    let gone = PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: vec![80],
    };
    let refused = code(cri.port_forward(gone).await.map(drop));
    ensure!(refused.is_some(), "port-forward into a stopped pod");
    pod.end().await
}

/// Runs a pod with echo servers on two ports.
async fn echoes(ctx: &Context) -> Result<Pod> {
    let pod = ctx.shared_pod().await;
    let script = "nc -ll -p 8081 -e cat & exec nc -ll -p 8080 -e cat";
    let c = pod
        .start("c", &ctx.images.base, &["sh", "-c", script])
        .await?;
    poll::until("the servers listen", ctx.patience(20), || async {
        let tcp = c.out(&["cat", "/proc/net/tcp", "/proc/net/tcp6"]).await?;
        let listens = |port| tcp.lines().any(|l| l.contains(port) && l.contains(" 0A "));
        ensure!(listens(":1F90 ") && listens(":1F91 "), "{tcp}");
        Ok(())
    })
    .await?;
    Ok(pod)
}

async fn port_forward_connects_to_several_ports(ctx: Context) -> Result {
    let pod = echoes(&ctx).await?;
    for over in BOTH {
        let mut client = forward::connect(&pod.forward_url().await?, over).await?;
        // Several connections to two ports at once, and one to a port without a listener.
        let (mut refused, mut error) = forward::dial(&mut client, "8099", "nobody").await?;
        let mut connections = Vec::new();
        for number in 0..6 {
            let port = ["8080", "8081"][number % 2];
            let (data, error) = forward::dial(&mut client, port, &number.to_string()).await?;
            connections.push((data, error, random(20_000 + number)));
        }
        for (data, _, bytes) in &connections {
            client.send(data.id, bytes, false).await?;
        }
        let said = String::from_utf8_lossy(&forward::rest(&mut error).await?).into_owned();
        ensure!(
            said.contains("8099") && said.contains("connection refused"),
            "{over:?}: {said:?}"
        );
        ensure!(
            forward::rest(&mut refused).await?.is_empty(),
            "data from a port without a listener"
        );
        for (data, error, bytes) in &mut connections {
            // The half-close reaches the server, whose own half-close follows its last byte.
            client.send(data.id, b"", true).await?;
            let echoed = forward::rest(data).await?;
            ensure!(
                echoed == *bytes,
                "{over:?}: {} of {} bytes",
                echoed.len(),
                bytes.len()
            );
            ensure!(
                forward::rest(error).await?.is_empty(),
                "an error of a connection that went well"
            );
        }
    }
    pod.end().await
}

async fn port_forward_transfers_every_byte(ctx: Context) -> Result {
    let pod = echoes(&ctx).await?;
    let mib = match std::env::var("BOXLITE_E2E_FORWARD_MIB") {
        Ok(mib) => mib.parse()?,
        Err(_) if ctx.backend == Backend::Krun => KRUN_FORWARD_MIB,
        Err(_) => FORWARD_MIB,
    };
    let mut client = forward::connect(&pod.forward_url().await?, Transport::Spdy).await?;
    let (mut data, mut error) = forward::dial(&mut client, "8080", "1").await?;
    let id = data.id;
    let begun = std::time::Instant::now();
    let sending = async {
        let mut digest = Sha256::new();
        let bytes = random(1 << 20);
        for number in 0..mib {
            // Every MiB is different.
            let mut bytes = bytes.clone();
            bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
            digest.update(&bytes);
            client.send(id, &bytes, number + 1 == mib).await?;
        }
        Result::Ok(digest.finalize())
    };
    let receiving = async {
        let (mut digest, mut length) = (Sha256::new(), 0);
        loop {
            match tokio::time::timeout(stream::MESSAGE_TIMEOUT, data.incoming.recv()).await {
                Ok(Some(bytes)) => {
                    length += bytes.len();
                    digest.update(&bytes);
                }
                Ok(None) => return Result::Ok((digest.finalize(), length)),
                Err(_) => crate::bail!("nothing more after {length} bytes"),
            }
        }
    };
    let (sent, (received, length)) = tokio::try_join!(sending, receiving)?;
    same!(length, mib << 20, "bytes");
    ensure!(sent == received, "the bytes differ");
    ensure!(forward::rest(&mut error).await?.is_empty(), "an error");
    let seconds = begun.elapsed().as_secs_f64();
    println!("      {mib} MiB through a forwarded port and back in {seconds:.1} s");
    drop(client);
    pod.end().await
}
