//! Log files: CRI format, order of both streams, long lines, binary bytes, no loss in 256 MiB or on a stalled disk, and
//! ReopenContainerLog.

use crate::case;
use crate::client::answer;
use crate::ext4::Ext4;
use crate::failure::{During, Result};
use crate::logs;
use crate::pod::{Pod, container_spec, pod_spec};
use crate::runner::{Case, Context};
use crate::{ensure, poll, same};
use k8s_cri::v1::{ContainerState, ReopenContainerLogRequest};
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(format_streams_and_order_are_kept, 60),
        case!(long_lines_and_binary_bytes_are_kept, 60),
        case!(last_line_without_newline_is_kept, 60),
        case!(reopen_continues_after_rotation, 60),
        case!(terminal_output_is_logged, 60),
        case!(many_numbered_lines_are_all_logged, 300),
        case!(stalled_disk_blocks_only_its_writer, 120),
    ]
}

async fn format_streams_and_order_are_kept(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    // One process, two pipes: the agent needs time between the lines, since lines that it reads together have no order.
    let pause = ctx.patience(20).as_secs() * 1000;
    let script = format!(
        "for i in 1 2 3 4 5; do echo out $i; usleep {pause}; echo err $i >&2; usleep {pause}; done"
    );
    let container = pod
        .start("c", &ctx.images.base, &["sh", "-c", &script])
        .await?;
    container.exited(ctx.patience(20)).await?;
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
        "the log file is world-readable: {mode:o}"
    );
    pod.end().await
}

async fn long_lines_and_binary_bytes_are_kept(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let script =
        "head -c 100000 /dev/zero | tr '\\0' x; echo; printf 'a\\000b\\377\\r\\n'; echo; echo end";
    let container = pod
        .start("c", &ctx.images.base, &["sh", "-c", script])
        .await?;
    container.exited(ctx.patience(20)).await?;
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

async fn last_line_without_newline_is_kept(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let container = pod
        .start(
            "c",
            &ctx.images.base,
            &["sh", "-c", "echo whole; printf half"],
        )
        .await?;
    container.exited(ctx.patience(20)).await?;
    let lines = logs::read(&container.log())?;
    same!(
        lines.iter().map(|l| l.full).collect::<Vec<_>>(),
        [true, false],
        "tags"
    );
    same!(logs::stream(&lines, "stdout"), b"whole\nhalf", "content");
    pod.end().await
}

async fn reopen_continues_after_rotation(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    // Only every tenth line, since each sleep is a process.
    let script = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); [ $((i % 10)) = 0 ] && usleep 50000; done";
    let container = pod
        .start("c", &ctx.images.base, &["sh", "-c", script])
        .await?;
    let mut rotated = Vec::new();
    for turn in 0..3 {
        poll::until("some lines", ctx.patience(20), || async {
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
            ctx.node.cri.runtime().reopen_container_log(request).await,
        )?;
        ensure!(
            container.log().exists(),
            "no new log file after ReopenContainerLog"
        );
        rotated.push(old);
    }
    container.exited(ctx.patience(40)).await?;
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

async fn terminal_output_is_logged(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let mut config = container_spec(
        "c",
        &ctx.images.base,
        &["sh", "-c", "test -t 1 && echo a terminal; echo err >&2"],
    );
    config.tty = true;
    let container = pod.start_with(config).await?;
    container.exited(ctx.patience(20)).await?;
    let lines = logs::read(&container.log())?;
    ensure!(
        lines.iter().all(|l| l.stream == "stdout"),
        "a terminal has one stream"
    );
    // The carriage returns of the terminal are not logged.
    let text = logs::stream(&lines, "stdout");
    same!(
        String::from_utf8_lossy(&text),
        "a terminal\nerr\n",
        "content"
    );
    pod.end().await
}

/// Bytes of a line, including number and newline.
const LINE_BYTES: usize = 256;
/// Lines of a block. The container generates one with awk and prints it repeatedly below a numbered line, since awk is
/// slower than the log.
const BLOCK_LINES: usize = 8192;
/// Blocks of a run: 256 MiB, or 64 MiB in the emulated KVM host.
const BLOCKS: (usize, usize) = (128, 32);

/// Returns a script that writes a block of `lines` lines to /block.
fn block_script(lines: usize) -> String {
    let filler = "x".repeat(LINE_BYTES - 11);
    format!("awk 'BEGIN{{for(i=0;i<{lines};i++) printf \"%09d {filler}\\n\", i}}' > /block")
}

/// Returns the expected size and SHA-256 of the log after `blocks` blocks of `lines` lines.
fn wanted(blocks: usize, lines: usize) -> (usize, String) {
    let filler = "x".repeat(LINE_BYTES - 11);
    let block: String = (0..lines).map(|i| format!("{i:09} {filler}\n")).collect();
    let (mut sum, mut bytes) = (Sha256::new(), 0);
    for i in 0..blocks {
        let head = format!("block {i}\n");
        sum.update(&head);
        sum.update(&block);
        bytes += head.len() + block.len();
    }
    (bytes, hex::encode(sum.finalize()))
}

async fn many_numbered_lines_are_all_logged(ctx: Context) -> Result {
    let blocks = ctx.rounds(BLOCKS.0, BLOCKS.1);
    let pod = ctx.shared_pod().await;
    let script = format!(
        "{}; i=0; while [ $i -lt {blocks} ]; do echo block $i; cat /block; i=$((i+1)); done",
        block_script(BLOCK_LINES)
    );
    let container = pod
        .start("c", &ctx.images.base, &["sh", "-c", &script])
        .await?;
    let status = container.exited(ctx.patience(300)).await?;
    same!(status.exit_code, 0, "exit code");
    let found = sum_of(&container.log()).during("reading the log")?;
    same!(
        found,
        wanted(blocks, BLOCK_LINES),
        "bytes and SHA-256 of the log"
    );
    pod.end().await
}

/// Lines of a block in the stalled disk case: 8 MiB in total, several times the data in flight.
const STALLED_LINES: usize = 1024;
const STALLED_BLOCKS: usize = 32;
/// Limit of the bytes written by a container and not in its log: the agent's buffer, which is freed by acknowledgements
/// only, the pipe, and the block in flight.
const MAX_IN_FLIGHT_BYTES: usize = 2 << 20;

/// Stalls the log's disk (a frozen ext4, on which a write blocks in the kernel): only the container is blocked, and
/// every line arrives afterwards.
async fn stalled_disk_blocks_only_its_writer(ctx: Context) -> Result {
    let config = pod_spec(&ctx.node, "stall");
    let disk = Ext4::mount(
        &ctx.scratch.join("slow.img"),
        64 << 20,
        &Path::new(&config.log_directory).join("slow"),
    )?;
    let pod = Pod::run_with(&ctx.node, config).await?;
    let script = format!(
        "{}; mkfifo /gate; echo 0 > /done; read go < /gate; i=0; while [ $i -lt {STALLED_BLOCKS} ]; do echo block $i; \
         cat /block; i=$((i+1)); echo $i > /done; done",
        block_script(STALLED_LINES)
    );
    let mut spec = container_spec("c", &ctx.images.base, &["sh", "-c", &script]);
    spec.log_path = "slow/c.log".into();
    let container = pod.start_with(spec).await?;
    disk.freeze()?;
    // An exec and another container's start and log work while the disk stalls.
    container
        .out(&[
            "sh",
            "-c",
            "until test -p /gate; do usleep 50000; done; echo go > /gate",
        ])
        .await?;
    let neighbor = pod
        .start(
            "n",
            &ctx.images.base,
            &["sh", "-c", "echo beside; sleep 1000"],
        )
        .await?;
    neighbor.printed("beside\n", ctx.patience(20)).await?;
    let before = AtomicUsize::new(0);
    let held = poll::until("the container is blocked", ctx.patience(40), || async {
        let done = container.out(&["sh", "-c", "sleep 1; cat /done"]).await?;
        let done: usize = done.trim().parse()?;
        let stands = done > 0 && before.swap(done, Ordering::Relaxed) == done;
        ensure!(stands, "{done} blocks");
        Ok(done)
    })
    .await?;
    ensure!(
        held * STALLED_LINES * LINE_BYTES <= MAX_IN_FLIGHT_BYTES,
        "{held} blocks left the container for a disk that takes nothing"
    );
    same!(
        container.status().await?.state(),
        ContainerState::ContainerRunning,
        "the container, held up"
    );
    disk.thaw()?;
    let status = container.exited(ctx.patience(60)).await?;
    same!(status.exit_code, 0, "exit code");
    let found = sum_of(&container.log()).during("reading the log")?;
    same!(
        found,
        wanted(STALLED_BLOCKS, STALLED_LINES),
        "bytes and SHA-256 of the log"
    );
    pod.end().await
}

/// Returns the size and SHA-256 of the content. Reads line by line, since the file is larger than a test should hold in
/// memory.
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
