//! [`Writer`]: the end of a pump that formats and writes.
//!
//! One batch at a time: takes what is queued, formats it into one buffer, has a blocking thread write the buffer, then
//! lets the offset be acknowledged. So a stalled disk holds up this task and nothing else.

use super::super::cri::Formatter;
use super::super::program::Program;
use super::super::sink::{FileTarget, Sink};
use super::super::stamp::Clock;
use super::{Command, Piece, Progress, refuse_reopen};
use crate::error::Result;
use boxlite_proto::boxlite::v1::OutputStream;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Output formatted into one batch, in bytes: large enough that a write costs nothing beside its copy.
const BATCH: usize = 1 << 20;
/// First pause after a failed write; doubled up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause between two tries of a write: a disk that has room again is noticed this much later.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// See the module.
pub(super) struct Writer {
    output: Output,
    orders: mpsc::UnboundedReceiver<Command>,
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
        orders: mpsc::UnboundedReceiver<Command>,
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
            orders,
            acks,
            progress,
            give_up,
        }
    }

    /// Writes until the queue ends, then what is held back, then closes the sink. Gives the logging program, if one read
    /// it: its input has ended, it may still run.
    pub(super) async fn run(
        mut self,
        mut queue: mpsc::UnboundedReceiver<Piece>,
    ) -> Option<Program> {
        let mut batch = Vec::new();
        loop {
            let order = tokio::select! {
                biased;
                Some(order) = self.orders.recv() => Some(order),
                piece = queue.recv() => match piece {
                    Some(piece) => {
                        batch.push(piece);
                        None
                    }
                    None => break,
                },
            };
            let mut size: usize = batch.iter().map(|piece| piece.chunk.data.len()).sum();
            // Before a reopen everything queued so far goes to the old file; it is bounded by the queue.
            while order.is_some() || size < BATCH {
                let Ok(piece) = queue.try_recv() else { break };
                size += piece.chunk.data.len();
                batch.push(piece);
            }
            self.write(&mut batch, false).await;
            if let Some(Command::Reopen(reply)) = order {
                self.reopen(reply).await;
            }
        }
        self.write(&mut batch, true).await;
        // Everything is in the file: who asked meanwhile has nothing to fear.
        self.orders.close();
        while let Ok(Command::Reopen(reply)) = self.orders.try_recv() {
            drop(reply.send(Ok(())));
        }
        match self.output {
            Output::Fifos { program, .. } => program,
            Output::Cri { .. } | Output::Raw(_) | Output::Discard => None,
        }
    }

    async fn write(&mut self, batch: &mut Vec<Piece>, last: bool) {
        let end = batch
            .last()
            .map(|piece| piece.chunk.offset + piece.chunk.data.len() as u64);
        let mut settled = end;
        let written = match &mut self.output {
            Output::Cri {
                file,
                formatter,
                clock,
            } => {
                let stamp = clock.stamp();
                for Piece { chunk, .. } in batch.iter() {
                    formatter.push(
                        chunk.stream,
                        chunk.offset,
                        &chunk.data,
                        &stamp,
                        &mut file.buffer,
                    );
                }
                if last {
                    formatter.finish(&stamp, &mut file.buffer);
                }
                settled = Some(formatter.settled());
                file.flush(&mut self.orders, &self.progress, &self.give_up)
                    .await
            }
            Output::Raw(file) => {
                for Piece { chunk, .. } in batch.iter() {
                    file.buffer.extend_from_slice(&chunk.data);
                }
                file.flush(&mut self.orders, &self.progress, &self.give_up)
                    .await
            }
            Output::Fifos { stdout, stderr, .. } => {
                let all = async {
                    for Piece { chunk, .. } in batch.iter() {
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
        if let Some(settled) = settled.filter(|_| written) {
            self.acks
                .send_if_modified(|acked| std::mem::replace(acked, settled) != settled);
        }
    }

    async fn reopen(&mut self, reply: oneshot::Sender<Result<()>>) {
        match &mut self.output {
            Output::Cri { file, .. } | Output::Raw(file) => drop(reply.send(file.reopen().await)),
            Output::Fifos { .. } | Output::Discard => refuse_reopen(Command::Reopen(reply)),
        }
    }
}

/// Writes all of `data`; waits while nobody reads. A broken FIFO takes nothing any more, and that is not the process's
/// fault: the rest is dropped.
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
                tracing::warn!(%error, "output FIFO is broken");
                return;
            }
        }
    }
}

/// A log file with the bytes that are on their way to it.
struct FileWriter {
    /// None only while a blocking thread has it.
    target: Option<FileTarget>,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are in the file.
    done: usize,
    complained: bool,
}

impl FileWriter {
    fn new(target: FileTarget) -> Self {
        Self {
            target: Some(target),
            buffer: Vec::new(),
            done: 0,
            complained: false,
        }
    }

    /// Writes the whole buffer, however long it takes. False: given up.
    async fn flush(
        &mut self,
        orders: &mut mpsc::UnboundedReceiver<Command>,
        progress: &Arc<Progress>,
        give_up: &CancellationToken,
    ) -> bool {
        let mut pause = PAUSE_MIN;
        while self.done < self.buffer.len() {
            let before = self.done;
            let Err(error) = self.write_once(progress).await else {
                break;
            };
            if self.done > before {
                pause = PAUSE_MIN;
            }
            if !std::mem::replace(&mut self.complained, true) {
                let path = self
                    .target
                    .as_ref()
                    .map(|target| target.path.display().to_string());
                tracing::error!(path, %error, "log cannot be written; trying until it can");
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(PAUSE_MAX),
                Some(Command::Reopen(reply)) = orders.recv() => {
                    self.take_back_record();
                    drop(reply.send(self.reopen().await));
                }
                () = give_up.cancelled() => return false,
            }
        }
        if std::mem::take(&mut self.complained) {
            tracing::info!("log is written again");
        }
        self.buffer.clear();
        self.done = 0;
        true
    }

    /// Writes as much as goes, on a blocking thread.
    async fn write_once(&mut self, progress: &Arc<Progress>) -> io::Result<()> {
        let Some(mut target) = self.target.take() else {
            return Err(io::Error::other("the log file is lost"));
        };
        let buffer = std::mem::take(&mut self.buffer);
        let mut done = self.done;
        let progress = progress.clone();
        let write = move || {
            let mut result = Ok(());
            while done < buffer.len() {
                match target.file.append(&buffer[done..]) {
                    Ok(count) => {
                        progress.add(count);
                        done += count;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        result = Err(error);
                        break;
                    }
                }
            }
            (target, buffer, done, result)
        };
        match tokio::task::spawn_blocking(write).await {
            Ok((target, buffer, done, result)) => {
                self.target = Some(target);
                self.buffer = buffer;
                self.done = done;
                result
            }
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Before the rest of the buffer goes to another file: cuts the record off that is there in part, so that it is
    /// whole in the next.
    fn take_back_record(&mut self) {
        let start = memchr::memrchr(b'\n', &self.buffer[..self.done]).map_or(0, |end| end + 1);
        let part = self.done - start;
        let Some(target) = &mut self.target else {
            return;
        };
        if part > 0 && target.file.cut(part as u64).is_ok() {
            self.done = start;
        }
    }

    /// The old file stays where the new one cannot be opened.
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
