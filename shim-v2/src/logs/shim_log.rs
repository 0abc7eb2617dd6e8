//! [`ShimLog`]: the shim's own log, `shim.log` in the bundle, bounded in size and rate.
//!
//! Standard error is that file. Messages may have values of the guest, which is hostile: they are escaped, a flood is cut, and a
//! full file becomes `shim.log.1`, which replaces the previous one. Warnings go to containerd's log, too ([`ManagerLog`]).
//! Container logs are in `pump`; nothing here waits.

use super::manager_log::ManagerLog;
use boxlite_proto::names::{OLD_SHIM_LOG, SHIM_LOG};
use boxlite_proto::vmm::PodName;
use boxlite_sys::log_line::escape_line;
use boxlite_sys::sync::Mutex;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// Size at which the file is rotated. A pod's life takes some KiB.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Maximum number of lines at once.
const BURST_LINES: u32 = 500;
/// Lines per second after a burst.
const LINES_PER_SECOND: u32 = 20;

/// The shim's log. Clones share it.
#[derive(Clone)]
pub struct ShimLog(Arc<Mutex<State>>);

struct State {
    file: File,
    /// The file's path; None if the output is not a file of this name and cannot be rotated.
    path: Option<PathBuf>,
    /// Replaces standard error after a rotation, so that a panic's message is in the new file.
    redirect: fn(&File) -> io::Result<()>,
    bytes: u64,
    bucket: Bucket,
    manager: ManagerLog,
    /// Names that each event ends with, once they are known.
    pod: Arc<OnceLock<PodName>>,
}

impl ShimLog {
    /// Creates the log for this process' standard error. Lines in containerd's log are attributed to `subject`. Events end
    /// with the names in `pod`.
    ///
    /// # Errors
    /// Standard error or the bundle cannot be accessed.
    pub fn of_stderr(subject: &str, pod: Arc<OnceLock<PodName>>) -> io::Result<Self> {
        use std::os::fd::AsFd;
        let file = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let bundle = std::env::current_dir()?;
        let redirect = |file: &File| nix::unistd::dup2_stderr(file).map_err(io::Error::from);
        Self::new(file, &bundle, redirect, subject, pod)
    }

    fn new(
        file: File,
        bundle: &Path,
        redirect: fn(&File) -> io::Result<()>,
        subject: &str,
        pod: Arc<OnceLock<PodName>>,
    ) -> io::Result<Self> {
        let meta = file.metadata()?;
        let path = bundle.join(SHIM_LOG);
        let same = std::fs::symlink_metadata(&path)
            .is_ok_and(|named| (named.dev(), named.ino()) == (meta.dev(), meta.ino()));
        Ok(Self(Arc::new(Mutex::new(State {
            file,
            path: same.then_some(path),
            redirect,
            bytes: meta.len(),
            bucket: Bucket::new(Instant::now()),
            manager: ManagerLog::new(bundle, subject),
            pod,
        }))))
    }
}

impl State {
    fn event(&mut self, event: &[u8], for_manager: bool, now: Instant) -> io::Result<()> {
        let Some(suppressed) = self.bucket.take(now) else {
            return Ok(());
        };
        if suppressed > 0 {
            self.line(format!(" WARN {suppressed} messages suppressed: too many\n").as_bytes())?;
        }
        let mut line = escape_line(event);
        if let Some(pod) = self.pod.get() {
            line.pop();
            let names = format!(" namespace={:?} pod={:?}\n", pod.namespace, pod.name);
            line.extend_from_slice(names.as_bytes());
        }
        if for_manager {
            self.manager.send(&line);
        }
        self.line(&line)
    }

    fn line(&mut self, line: &[u8]) -> io::Result<()> {
        if self.bytes + line.len() as u64 > MAX_FILE_BYTES {
            self.rotate()?;
        }
        self.bytes += line.len() as u64;
        self.file.write_all(line)
    }

    fn rotate(&mut self) -> io::Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        match std::fs::rename(path, path.with_file_name(OLD_SHIM_LOG)) {
            // A previous rotation has failed behind this step, for example on a full disk.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed?,
        }
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        (self.redirect)(&file)?;
        (self.file, self.bytes) = (file, 0);
        Ok(())
    }
}

/// Limits the rate of lines.
struct Bucket {
    lines: f64,
    since: Instant,
    suppressed: u64,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        Self {
            lines: BURST_LINES.into(),
            since: now,
            suppressed: 0,
        }
    }

    /// Takes a line; returns the number of lines refused before it, or `None` if it is refused.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let elapsed: Duration = now.saturating_duration_since(self.since);
        self.since = now;
        let refilled = self.lines + elapsed.as_secs_f64() * f64::from(LINES_PER_SECOND);
        self.lines = refilled.min(BURST_LINES.into());
        if self.lines < 1.0 {
            self.suppressed += 1;
            return None;
        }
        self.lines -= 1.0;
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// Writes one event.
pub struct EventWriter {
    log: ShimLog,
    for_manager: bool,
}

impl Write for EventWriter {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let mut state = self.log.0.lock();
        state.event(event, self.for_manager, Instant::now())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for ShimLog {
    type Writer = EventWriter;

    fn make_writer(&'a self) -> EventWriter {
        EventWriter {
            log: self.clone(),
            for_manager: false,
        }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> EventWriter {
        EventWriter {
            log: self.clone(),
            for_manager: *event.level() <= Level::WARN,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(dir: &Path) -> (ShimLog, PathBuf) {
        let path = dir.join(SHIM_LOG);
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .expect("a file");
        let log = ShimLog::new(file, dir, |_| Ok(()), "ns/a", Arc::default()).expect("a log");
        (log, path)
    }

    #[test]
    fn flood_is_bounded_on_disk() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (log, _) = log(dir.path());
        let start = Instant::now();
        let message = format!("WARN guest said {}\n", "x".repeat(9000));
        // Below the limit of the rate; 18 MB in all.
        for n in 0..2000 {
            let now = start + n * Duration::from_millis(100);
            let written = log.0.lock().event(message.as_bytes(), false, now);
            written.expect("written");
        }
        let names: Vec<_> = std::fs::read_dir(dir.path())
            .expect("a directory")
            .flatten()
            .collect();
        assert_eq!(names.len(), 2, "{names:?}");
        for entry in names {
            let bytes = entry.metadata().expect("metadata").len();
            assert!(bytes <= MAX_FILE_BYTES, "{entry:?}: {bytes}");
        }
    }

    #[test]
    fn rotation_after_a_failed_one_creates_the_file() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (log, path) = log(dir.path());
        // As a rotation that renamed the file and failed to create the next one.
        std::fs::rename(&path, dir.path().join("renamed")).expect("renamed");
        let mut state = log.0.lock();
        state.bytes = MAX_FILE_BYTES;
        state
            .event(b"WARN x\n", false, Instant::now())
            .expect("written");
        assert_eq!(std::fs::read(&path).expect("the log"), b"WARN x\n");
    }

    #[test]
    fn flood_is_cut_and_counted() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (log, path) = log(dir.path());
        let start = Instant::now();
        for _ in 0..BURST_LINES + 100 {
            let mut state = log.0.lock();
            state.event(b"WARN x\n", false, start).expect("written");
        }
        let later = start + Duration::from_secs(10);
        let mut state = log.0.lock();
        state.event(b"WARN later\n", false, later).expect("written");
        let text = std::fs::read_to_string(path).expect("the log");
        assert_eq!(text.lines().count(), BURST_LINES as usize + 2);
        assert!(
            text.ends_with(" WARN 100 messages suppressed: too many\nWARN later\n"),
            "{text}"
        );
    }

    #[test]
    fn guest_string_forges_no_line() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (log, path) = log(dir.path());
        let subscriber = tracing_subscriber::fmt()
            .with_writer(log)
            .with_ansi(false)
            .finish();
        let forged = "bad\n2026-01-01T00:00:00Z ERROR boxlite_shim_v2: forged\u{1b}[2J";
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(error = %forged, guest = forged, "guest failed");
        });
        let text = std::fs::read_to_string(path).expect("the log");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(
            text.contains("forged") && !text.contains('\u{1b}'),
            "{text}"
        );
    }

    #[test]
    fn events_end_with_the_names_of_the_pod() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (log, path) = log(dir.path());
        let event = |text: &[u8]| log.0.lock().event(text, false, Instant::now());
        event(b"INFO shim serving\n").expect("written");
        let pod = log.0.lock().pod.clone();
        let names = PodName {
            namespace: "default".to_owned(),
            name: "web\nforged".to_owned(),
            uid: String::new(),
        };
        pod.set(names).expect("not set before");
        event(b"INFO sandbox state changed phase=Ready\n").expect("written");
        assert_eq!(
            std::fs::read_to_string(path).expect("the log"),
            "INFO shim serving\n\
             INFO sandbox state changed phase=Ready namespace=\"default\" pod=\"web\\nforged\"\n"
        );
    }

    #[test]
    fn warnings_go_to_the_manager() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (log, _) = log(dir.path());
        let fifo = dir.path().join("log");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("a FIFO");
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let mut reader = options.open(&fifo).expect("the FIFO");
        let subscriber = tracing_subscriber::fmt().with_writer(log).finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("shim serving");
            tracing::warn!(volume = "/srv", "volume is writable in another pod");
        });
        let mut buffer = [0; 4096];
        let count = io::Read::read(&mut reader, &mut buffer).expect("lines");
        let text = String::from_utf8_lossy(&buffer[..count]);
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains(" ns/a: ") && text.contains("/srv"), "{text}");
    }
}
