//! Log files: CRI format, both streams in order, long lines, binary bytes, nothing lost in 256 MiB (16 on libkrun), and
//! ReopenContainerLog.

use crate::client::answer;
use crate::logs;
use crate::outcome::{During, Result};
use crate::pod::{Pod, container_spec};
use crate::runner::{Case, Shared, case};
use crate::world::Home;
use crate::{ensure, same, wait};
use k8s_cri::v1::ReopenContainerLogRequest;
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader};
use std::path::Path;

pub fn cases() -> Vec<Case> {
    vec![
        case("logs::format_streams_and_order", 60, format_and_order),
        case(
            "logs::long_lines_and_bytes_that_are_no_text",
            60,
            long_and_binary,
        ),
        case("logs::last_line_without_newline", 60, unfinished_line),
        case("logs::reopen_after_rotation", 60, reopen),
        case("logs::terminal", 60, terminal),
        case("logs::many_mib_of_numbered_lines", 400, numbered_lines),
    ]
}

async fn format_and_order(world: Shared) -> Result {
    let pod = Pod::run(&world.node, "order").await?;
    // Written one after the other with a flush between: one process, two pipes.
    let script =
        "for i in 1 2 3 4 5; do echo out $i; usleep 20000; echo err $i >&2; usleep 20000; done";
    let container = pod
        .start("c", &world.images.base, &["sh", "-c", script])
        .await?;
    container.exited(world.patience(20)).await?;
    let lines = logs::read(&container.log())?;
    let seen: Vec<_> = lines
        .iter()
        .map(|l| {
            (
                l.stream.as_str(),
                String::from_utf8_lossy(&l.content).into_owned(),
            )
        })
        .collect();
    let wanted: Vec<_> = (1..=5)
        .flat_map(|i| {
            [
                ("stdout", format!("out {i}\n")),
                ("stderr", format!("err {i}\n")),
            ]
        })
        .collect();
    same!(seen, wanted, "lines");
    ensure!(
        lines.windows(2).all(|w| w[0].time <= w[1].time),
        "times go backwards"
    );
    ensure!(lines.iter().all(|l| l.full), "a short line is partial");
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(container.log())?.permissions())
            & 0o777;
    ensure!(
        mode & 0o007 == 0,
        "the log file is open to the world: {mode:o}"
    );
    pod.end().await
}

async fn long_and_binary(world: Shared) -> Result {
    let pod = Pod::run(&world.node, "long").await?;
    let script =
        "head -c 100000 /dev/zero | tr '\\0' x; echo; printf 'a\\000b\\377\\r\\n'; echo; echo end";
    let container = pod
        .start("c", &world.images.base, &["sh", "-c", script])
        .await?;
    container.exited(world.patience(20)).await?;
    let lines = logs::read(&container.log())?;
    let mut wanted = vec![b'x'; 100_000];
    wanted.extend(b"\na\0b\xff\r\n\nend\n");
    ensure!(
        logs::stream(&lines, "stdout") == wanted,
        "bytes differ; first lines: {:?}",
        lines.iter().map(|l| l.content.len()).collect::<Vec<_>>()
    );
    ensure!(
        lines.iter().all(|l| l.content.len() <= 16 << 10 | 1),
        "a line of the file is over 16 KiB"
    );
    ensure!(
        lines.iter().filter(|l| !l.full).count() >= 6,
        "100,000 bytes without a newline in fewer than 6 partial lines"
    );
    pod.end().await
}

async fn unfinished_line(world: Shared) -> Result {
    let pod = Pod::run(&world.node, "tail").await?;
    let container = pod
        .start(
            "c",
            &world.images.base,
            &["sh", "-c", "echo whole; printf half"],
        )
        .await?;
    container.exited(world.patience(20)).await?;
    let lines = logs::read(&container.log())?;
    same!(
        lines.iter().map(|l| l.full).collect::<Vec<_>>(),
        [true, false],
        "tags"
    );
    same!(logs::stream(&lines, "stdout"), b"whole\nhalf", "content");
    pod.end().await
}

async fn reopen(world: Shared) -> Result {
    let pod = Pod::run(&world.node, "rotate").await?;
    let script = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); usleep 5000; done";
    let container = pod
        .start("c", &world.images.base, &["sh", "-c", script])
        .await?;
    let mut rotated = Vec::new();
    for turn in 0..3 {
        wait::until("some lines", world.patience(20), || async {
            let n = logs::read(&container.log())?.len();
            ensure!(n > 20, "{n} lines");
            Ok(())
        })
        .await?;
        let old = container.log().with_extension(format!("{turn}"));
        std::fs::rename(container.log(), &old)?;
        let request = ReopenContainerLogRequest {
            container_id: container.id.clone(),
        };
        answer(
            "ReopenContainerLog",
            world.node.cri.runtime().reopen_container_log(request).await,
        )?;
        ensure!(
            container.log().exists(),
            "no new log file after ReopenContainerLog"
        );
        rotated.push(old);
    }
    container.exited(world.patience(40)).await?;
    rotated.push(container.log());
    let mut all = Vec::new();
    for path in &rotated {
        all.extend(logs::stream(&logs::read(path)?, "stdout"));
    }
    let wanted: String = (0..400).map(|i| format!("line {i}\n")).collect();
    ensure!(
        all == wanted.as_bytes(),
        "lines over three rotations: {} of {} bytes",
        all.len(),
        wanted.len()
    );
    pod.end().await
}

async fn terminal(world: Shared) -> Result {
    let pod = Pod::run(&world.node, "tty").await?;
    let mut config = container_spec(
        "c",
        &world.images.base,
        &["sh", "-c", "test -t 1 && echo a terminal; echo err >&2"],
    );
    config.tty = true;
    let container = pod.start_with(config).await?;
    container.exited(world.patience(20)).await?;
    let lines = logs::read(&container.log())?;
    ensure!(
        lines.iter().all(|l| l.stream == "stdout"),
        "a terminal has one stream"
    );
    let text = String::from_utf8_lossy(&logs::stream(&lines, "stdout")).replace('\r', "");
    same!(text, "a terminal\nerr\n", "content");
    pod.end().await
}

/// 256 bytes each with number and newline.
const LINE: usize = 256;
/// 256 MiB, and 16 MiB in the emulated KVM host, where a guest is emulated twice over.
fn lines(home: Home) -> usize {
    match home {
        Home::Qemu => 1 << 20,
        Home::Krun => 1 << 16,
    }
}

async fn numbered_lines(world: Shared) -> Result {
    let count = lines(world.home);
    let pod = Pod::run(&world.node, "many").await?;
    let filler = "x".repeat(LINE - 11);
    let script = format!("BEGIN{{for(i=0;i<{count};i++) printf \"%09d {filler}\\n\", i}}");
    let container = pod
        .start("c", &world.images.base, &["awk", &script])
        .await?;
    let status = container.exited(world.patience(300)).await?;
    same!(status.exit_code, 0, "exit code");
    let mut wanted = Sha256::new();
    for i in 0..count {
        wanted.update(format!("{i:09} {filler}\n"));
    }
    let (bytes, sum) = sum_of(&container.log()).during("reading the log")?;
    same!(bytes, count * LINE, "bytes in the log");
    same!(
        sum,
        hex::encode(wanted.finalize()),
        "SHA-256 of {bytes} bytes"
    );
    pod.end().await
}

/// Bytes and SHA-256 of the content, line by line: the file is larger than a test should hold in memory.
fn sum_of(path: &Path) -> Result<(usize, String)> {
    let mut reader = BufReader::with_capacity(1 << 20, std::fs::File::open(path)?);
    let (mut raw, mut sum, mut bytes) = (Vec::new(), Sha256::new(), 0);
    while reader.read_until(b'\n', &mut raw)? > 0 {
        let line = logs::parse(raw.strip_suffix(b"\n").unwrap_or(&raw))?;
        sum.update(&line.content);
        bytes += line.content.len();
        raw.clear();
    }
    Ok((bytes, hex::encode(sum.finalize())))
}
