//! Log files: CRI format, both streams in order, long lines, binary bytes, nothing lost in 256 MiB or on a disk that stalls,
//! and ReopenContainerLog.

use crate::client::answer;
use crate::ext4::Ext4;
use crate::logs;
use crate::outcome::{During, Result};
use crate::pod::{Pod, container_spec, pod_spec};
use crate::runner::{Case, Shared, case};
use crate::{ensure, same, wait};
use k8s_cri::v1::{ContainerState, ReopenContainerLogRequest};
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

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
        case("logs::many_mib_of_numbered_lines", 300, numbered_lines),
        case(
            "logs::stalled_disk_holds_up_its_writer_alone",
            120,
            stalled_disk,
        ),
    ]
}

async fn format_and_order(world: Shared) -> Result {
    let pod = world.pod().await;
    // One process, two pipes, and between the lines time for the agent to read each: what it finds at once has no order.
    let pause = world.patience(20).as_secs() * 1000;
    let script = format!(
        "for i in 1 2 3 4 5; do echo out $i; usleep {pause}; echo err $i >&2; usleep {pause}; done"
    );
    let container = pod
        .start("c", &world.images.base, &["sh", "-c", &script])
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
    let pod = world.pod().await;
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
    let pod = world.pod().await;
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
    let pod = world.pod().await;
    // A pause, which is a process, only now and then.
    let script = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); [ $((i % 10)) = 0 ] && usleep 50000; done";
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
    let pod = world.pod().await;
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

/// Bytes of a line, with number and newline.
const LINE: usize = 256;
/// Lines of a block; the container makes one with awk and prints it over and over, each time below a numbered line of its
/// own: awk is slower than the log.
const BLOCK_LINES: usize = 8192;
/// Blocks of a run: 256 MiB, and 64 MiB in the emulated KVM host.
const BLOCKS: (usize, usize) = (128, 32);

/// Makes a block of so many lines as /block.
fn block_script(lines: usize) -> String {
    let filler = "x".repeat(LINE - 11);
    format!("awk 'BEGIN{{for(i=0;i<{lines};i++) printf \"%09d {filler}\\n\", i}}' > /block")
}

/// What the log must hold after `blocks` blocks of so many lines: bytes and SHA-256.
fn wanted(blocks: usize, lines: usize) -> (usize, String) {
    let filler = "x".repeat(LINE - 11);
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

async fn numbered_lines(world: Shared) -> Result {
    let blocks = world.rounds(BLOCKS.0, BLOCKS.1);
    let pod = world.pod().await;
    let script = format!(
        "{}; i=0; while [ $i -lt {blocks} ]; do echo block $i; cat /block; i=$((i+1)); done",
        block_script(BLOCK_LINES)
    );
    let container = pod
        .start("c", &world.images.base, &["sh", "-c", &script])
        .await?;
    let status = container.exited(world.patience(300)).await?;
    same!(status.exit_code, 0, "exit code");
    let found = sum_of(&container.log()).during("reading the log")?;
    same!(
        found,
        wanted(blocks, BLOCK_LINES),
        "bytes and SHA-256 of the log"
    );
    pod.end().await
}

/// Lines of a block, and blocks, of the case with the stalled disk: 8 MiB, several times what may be under way.
const STALLED_LINES: usize = 1024;
const STALLED_BLOCKS: usize = 32;
/// What a container may have written that is not in its log: the agent's buffer, which only an acknowledgement frees, the
/// pipe, and the block under way.
const UNDER_WAY: usize = 2 << 20;

/// The log's disk stalls (a frozen ext4, where a write blocks in the kernel): the container is held up and nothing else, and
/// afterwards every line is there.
async fn stalled_disk(world: Shared) -> Result {
    let config = pod_spec(&world.node, "stall");
    let disk = Ext4::mount(
        &world.scratch.join("slow.img"),
        64 << 20,
        &Path::new(&config.log_directory).join("slow"),
    )?;
    let pod = Pod::run_with(&world.node, config).await?;
    let script = format!(
        "{}; mkfifo /gate; echo 0 > /done; read go < /gate; i=0; while [ $i -lt {STALLED_BLOCKS} ]; do echo block $i; \
         cat /block; i=$((i+1)); echo $i > /done; done",
        block_script(STALLED_LINES)
    );
    let mut spec = container_spec("c", &world.images.base, &["sh", "-c", &script]);
    spec.log_path = "slow/c.log".into();
    let container = pod.start_with(spec).await?;
    disk.freeze()?;
    // Both an exec and a neighbour's start and log, while the disk stands.
    container
        .out(&[
            "sh",
            "-c",
            "until test -p /gate; do usleep 50000; done; echo go > /gate",
        ])
        .await?;
    let neighbour = pod
        .start(
            "n",
            &world.images.base,
            &["sh", "-c", "echo beside; sleep 1000"],
        )
        .await?;
    neighbour.printed("beside\n", world.patience(20)).await?;
    let before = AtomicUsize::new(0);
    let held = wait::until("the container stands", world.patience(40), || async {
        let done = container.out(&["sh", "-c", "sleep 1; cat /done"]).await?;
        let done: usize = done.trim().parse()?;
        let stands = done > 0 && before.swap(done, Ordering::Relaxed) == done;
        ensure!(stands, "{done} blocks");
        Ok(done)
    })
    .await?;
    ensure!(
        held * STALLED_LINES * LINE <= UNDER_WAY,
        "{held} blocks left the container for a disk that takes nothing"
    );
    same!(
        container.status().await?.state(),
        ContainerState::ContainerRunning,
        "the container, held up"
    );
    disk.thaw()?;
    let status = container.exited(world.patience(60)).await?;
    same!(status.exit_code, 0, "exit code");
    let found = sum_of(&container.log()).during("reading the log")?;
    same!(
        found,
        wanted(STALLED_BLOCKS, STALLED_LINES),
        "bytes and SHA-256 of the log"
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
