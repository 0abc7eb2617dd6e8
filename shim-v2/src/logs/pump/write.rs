//! [`Writer`]: the task of a pump that formats and writes output.
//!
//! It handles one batch at a time: it formats the queued chunks into one buffer, writes the buffer on a blocking thread whenever
//! it is large, and then releases the offset for acknowledgement. A stalled disk blocks only this task.

use super::super::cri::Formatter;
use super::super::program::Program;
use super::super::sink::{FileTarget, Sink};
use super::super::stamp::Clock;
use super::{Command, Progress, QueuedChunk, refuse_reopen};
use crate::error::Result;
use boxlite_proto::boxlite::v1::OutputStream;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Size of a batch, large enough that the cost of a write is dominated by the copy.
const BATCH_BYTES: usize = 1 << 20;
/// Size from which formatted records are written. A record of CRI format is up to 41 times as large as its line.
const FLUSH_BYTES: usize = 1 << 20;
/// Initial delay after a failed write; doubled up to [`MAX_RETRY_DELAY`].
const MIN_RETRY_DELAY: Duration = Duration::from_millis(50);
/// Maximum delay between write attempts, and so the delay until a disk with free space again is used.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(2);

/// State of the writing task.
pub(super) struct Writer {
    output: Output,
    commands: mpsc::UnboundedReceiver<Command>,
    acks: watch::Sender<u64>,
    progress: Arc<Progress>,
    give_up: CancellationToken,
}

enum Output {
    Cri {
        file: FileWriter,
        formatter: Formatter,
        clock: Clock,
    },
    Raw(FileWriter),
    Fifos {
        stdout: Option<pipe::Sender>,
        stderr: Option<pipe::Sender>,
        program: Option<Program>,
    },
    Discard,
}

impl Writer {
    pub(super) fn new(
        sink: Sink,
        commands: mpsc::UnboundedReceiver<Command>,
        acks: watch::Sender<u64>,
        progress: Arc<Progress>,
        give_up: CancellationToken,
    ) -> Self {
        let output = match sink {
            Sink::Cri(target) => Output::Cri {
                file: FileWriter::new(target),
                formatter: Formatter::default(),
                clock: Clock::default(),
            },
            Sink::CriTerminal(target) => Output::Cri {
                file: FileWriter::new(target),
                formatter: Formatter::for_terminal(),
                clock: Clock::default(),
            },
            Sink::Raw(target) => Output::Raw(FileWriter::new(target)),
            Sink::Fifos {
                stdout,
                stderr,
                program,
            } => Output::Fifos {
                stdout,
                stderr,
                program,
            },
            Sink::Discard => Output::Discard,
        };
        Self {
            output,
            commands,
            acks,
            progress,
            give_up,
        }
    }

    /// Writes until the queue ends, then writes held bytes and closes the sink. Returns the logging program, if any, which may
    /// still run after the end of its input.
    pub(super) async fn run(
        mut self,
        mut queue: mpsc::UnboundedReceiver<QueuedChunk>,
    ) -> Option<Program> {
        let mut batch = Vec::new();
        loop {
            let command = tokio::select! {
                biased;
                Some(command) = self.commands.recv() => Some(command),
                piece = queue.recv() => match piece {
                    Some(piece) => {
                        batch.push(piece);
                        None
                    }
                    None => break,
                },
            };
            let mut size: usize = batch.iter().map(|piece| piece.chunk.data.len()).sum();
            // Before a reopen, all queued output goes to the old file; the queue bounds its size.
            while command.is_some() || size < BATCH_BYTES {
                let Ok(piece) = queue.try_recv() else { break };
                size += piece.chunk.data.len();
                batch.push(piece);
            }
            self.write(&mut batch, false).await;
            if let Some(Command::Reopen(reply)) = command {
                self.reopen(reply).await;
            }
        }
        self.write(&mut batch, true).await;
        // All output is written, so pending reopens succeed without effect.
        self.commands.close();
        while let Ok(Command::Reopen(reply)) = self.commands.try_recv() {
            drop(reply.send(Ok(())));
        }
        match self.output {
            Output::Fifos { program, .. } => program,
            Output::Cri { .. } | Output::Raw(_) | Output::Discard => None,
        }
    }

    async fn write(&mut self, batch: &mut Vec<QueuedChunk>, last: bool) {
        let end = batch
            .last()
            .map(|piece| piece.chunk.offset + piece.chunk.data.len() as u64);
        let mut written_offset = end;
        let written = match &mut self.output {
            Output::Cri {
                file,
                formatter,
                clock,
            } => {
                let stamp = clock.stamp();
                let mut written = true;
                for QueuedChunk { chunk, .. } in batch.iter() {
                    formatter.push(
                        chunk.stream,
                        chunk.offset,
                        &chunk.data,
                        &stamp,
                        &mut file.buffer,
                    );
                    if written && file.buffer.len() >= FLUSH_BYTES {
                        written = file
                            .flush(&mut self.commands, &self.progress, &self.give_up)
                            .await;
                    }
                }
                if last {
                    formatter.finish(&stamp, &mut file.buffer);
                }
                written_offset = Some(formatter.written_offset());
                written
                    && file
                        .flush(&mut self.commands, &self.progress, &self.give_up)
                        .await
            }
            Output::Raw(file) => {
                for QueuedChunk { chunk, .. } in batch.iter() {
                    file.buffer.extend_from_slice(&chunk.data);
                }
                file.flush(&mut self.commands, &self.progress, &self.give_up)
                    .await
            }
            Output::Fifos { stdout, stderr, .. } => {
                let all = async {
                    for QueuedChunk { chunk, .. } in batch.iter() {
                        let to = match chunk.stream {
                            OutputStream::Stderr => &stderr,
                            OutputStream::Stdout | OutputStream::Unspecified => &stdout,
                        };
                        if let Some(to) = to {
                            write_fifo(to, &chunk.data, &self.progress).await;
                        }
                    }
                };
                tokio::select! {
                    () = all => true,
                    () = self.give_up.cancelled() => false,
                }
            }
            Output::Discard => true,
        };
        batch.clear();
        if let Some(offset) = written_offset.filter(|_| written) {
            self.acks
                .send_if_modified(|acked| std::mem::replace(acked, offset) != offset);
        }
    }

    async fn reopen(&mut self, reply: oneshot::Sender<Result<()>>) {
        match &mut self.output {
            Output::Cri { file, .. } | Output::Raw(file) => drop(reply.send(file.reopen().await)),
            Output::Fifos { .. } | Output::Discard => refuse_reopen(Command::Reopen(reply)),
        }
    }
}

/// Writes all of `data` and waits while there is no reader. If the FIFO is broken, the rest is dropped.
async fn write_fifo(to: &pipe::Sender, mut data: &[u8], progress: &Progress) {
    while !data.is_empty() {
        if to.writable().await.is_err() {
            return;
        }
        match to.try_write(data) {
            Ok(count) => {
                progress.add(count);
                data = &data[count..];
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(error) => {
                tracing::warn!(%error, "failed to write to output FIFO, dropping output");
                return;
            }
        }
    }
}

/// A log file with its write buffer.
struct FileWriter {
    /// None only while a blocking thread uses it.
    target: Option<FileTarget>,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are in the file.
    written: usize,
    error_logged: bool,
}

impl FileWriter {
    fn new(target: FileTarget) -> Self {
        Self {
            target: Some(target),
            buffer: Vec::new(),
            written: 0,
            error_logged: false,
        }
    }

    /// Writes the whole buffer, retrying as long as needed. Returns false if the pump is closed meanwhile.
    async fn flush(
        &mut self,
        commands: &mut mpsc::UnboundedReceiver<Command>,
        progress: &Arc<Progress>,
        give_up: &CancellationToken,
    ) -> bool {
        let mut delay = MIN_RETRY_DELAY;
        while self.written < self.buffer.len() {
            let before = self.written;
            let Err(error) = self.write_once(progress).await else {
                break;
            };
            if self.written > before {
                delay = MIN_RETRY_DELAY;
            }
            if !std::mem::replace(&mut self.error_logged, true) {
                let path = self
                    .target
                    .as_ref()
                    .map(|target| target.path.display().to_string());
                tracing::error!(path, %error, "failed to write container log; retrying");
            }
            tokio::select! {
                () = tokio::time::sleep(delay) => delay = (delay * 2).min(MAX_RETRY_DELAY),
                Some(Command::Reopen(reply)) = commands.recv() => {
                    self.remove_partial_record();
                    drop(reply.send(self.reopen().await));
                }
                () = give_up.cancelled() => return false,
            }
        }
        if std::mem::take(&mut self.error_logged) {
            tracing::info!("container log is writable again");
        }
        self.buffer.clear();
        self.written = 0;
        true
    }

    /// Writes as much of the buffer as possible, on a blocking thread.
    async fn write_once(&mut self, progress: &Arc<Progress>) -> io::Result<()> {
        let Some(mut target) = self.target.take() else {
            return Err(io::Error::other(
                "the thread that wrote the log file panicked",
            ));
        };
        let buffer = std::mem::take(&mut self.buffer);
        let mut written = self.written;
        let progress = progress.clone();
        let write = move || {
            let mut result = Ok(());
            while written < buffer.len() {
                match target.file.append(&buffer[written..]) {
                    Ok(count) => {
                        progress.add(count);
                        written += count;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        result = Err(error);
                        break;
                    }
                }
            }
            (target, buffer, written, result)
        };
        match tokio::task::spawn_blocking(write).await {
            Ok((target, buffer, written, result)) => {
                self.target = Some(target);
                self.buffer = buffer;
                self.written = written;
                result
            }
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Removes a partially written record from the file, so that the next file contains it completely.
    fn remove_partial_record(&mut self) {
        let start = memchr::memrchr(b'\n', &self.buffer[..self.written]).map_or(0, |end| end + 1);
        let part = self.written - start;
        let Some(target) = &mut self.target else {
            return;
        };
        if part > 0 && target.file.truncate_tail(part as u64).is_ok() {
            self.written = start;
        }
    }

    /// Opens the path again. The old file remains open if that fails.
    async fn reopen(&mut self) -> Result<()> {
        let Some(target) = &mut self.target else {
            return Ok(());
        };
        let (path, opener) = (target.path.clone(), target.opener.clone());
        let opened = tokio::task::spawn_blocking(move || FileTarget::open(&path, opener)).await;
        match opened {
            Ok(opened) => {
                *target = opened?;
                Ok(())
            }
            Err(error) => Err(crate::error::ShimError::io(
                "open the log file",
                target.path.display(),
            )(io::Error::other(error))),
        }
    }
}
