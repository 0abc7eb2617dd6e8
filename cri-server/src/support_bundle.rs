//! `boxlite-cri support-bundle`: one archive with the files of a bug report.
//!
//! Collects versions, the effective configuration, the reports of `check` and `status`, the metrics, the daemon's journal, the
//! logs of shims and guest consoles, and facts about the machine. Leaves out OCI specs, records and container logs, which hold
//! environment variables and output of workloads. A part that cannot be collected is named in `errors.txt`, and the rest is
//! written. Changes nothing but the archive.
//!
//! A VMM may write below its `vm/` directory, so files there are opened without following links and read with a limit.

#[cfg(test)]
mod tests;

use crate::config::Config;
use crate::output::{VERSION, print};
use crate::{check, status};
use boxlite_runtime::filesystem_layout::FilesystemLayout;
use flate2::Compression;
use flate2::write::GzEncoder;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Part of a log that is collected: its end, in bytes.
const LOG_BYTES: u64 = 256 << 10;
/// Size limit of a program's output, of the metrics and of a file of the machine, in bytes.
const PART_BYTES: u64 = 4 << 20;
/// Pods whose logs are collected, the latest first.
const MAX_PODS: usize = 200;
/// Timeout of a program and of the metrics.
const PART_TIMEOUT: Duration = Duration::from_secs(20);
/// Lines of the daemon's journal.
const JOURNAL_LINES: &str = "5000";
/// Unit whose journal is collected (docs/boxlite-cri.service).
const UNIT: &str = "boxlite-cri.service";
/// Files that describe the machine.
const MACHINE_FILES: [&str; 7] = [
    "/etc/os-release",
    "/proc/version",
    "/proc/cmdline",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/self/mountinfo",
    "/proc/self/cgroup",
];

/// Contents of the archive: path and bytes, and the errors of the other parts.
#[derive(Debug, Default)]
struct Parts {
    files: Vec<(String, Vec<u8>)>,
    errors: Vec<String>,
}

impl Parts {
    fn add(&mut self, path: impl Into<String>, content: io::Result<Vec<u8>>) {
        let path = path.into();
        match content {
            Ok(bytes) => self.files.push((path, bytes)),
            Err(error) => self.errors.push(format!("{path}: {error}")),
        }
    }
}

/// Writes the bundle to `file`, by default `boxlite-support-<seconds since 1970>.tar.gz` in the working directory, and prints
/// its path. Exits with 1 if the archive cannot be written.
pub(crate) async fn support_bundle(config: Config, file: Option<PathBuf>) -> ExitCode {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let name = format!("boxlite-support-{seconds}");
    let file = file.unwrap_or_else(|| PathBuf::from(format!("{name}.tar.gz")));
    let parts = collect(config).await;
    if let Err(error) = write(&file, &name, seconds, &parts) {
        eprintln!("boxlite-cri: failed to write {}: {error}", file.display());
        return ExitCode::FAILURE;
    }
    let text = format!(
        "{}: {} files, {} parts not collected (see errors.txt in it)\n\
         It has no container logs, environment variables or registry credentials. Read it before you send it.\n",
        file.display(),
        parts.files.len(),
        parts.errors.len(),
    );
    print(&text, ExitCode::SUCCESS)
}

async fn collect(config: Config) -> Parts {
    let mut parts = Parts::default();
    parts.add("version.txt", Ok(format!("{VERSION}\n").into_bytes()));
    parts.add("config.toml", Ok(config.to_toml().into_bytes()));
    parts.add(
        "check.json",
        Ok(check::report_json(&config).await.into_bytes()),
    );
    let status = status::report_json(&config.listen).await;
    parts.add(
        "status.json",
        status.map(String::into_bytes).map_err(io::Error::other),
    );
    match config.metrics.listen {
        Some(address) => parts.add("metrics.txt", limited(metrics(address)).await),
        None => parts
            .errors
            .push("metrics.txt: metrics.listen is off".into()),
    }
    let journal = [
        "--no-pager",
        "--output",
        "short-iso",
        "--lines",
        JOURNAL_LINES,
        "--unit",
        UNIT,
    ];
    parts.add(
        "journal.txt",
        limited(program("journalctl", &journal)).await,
    );
    let disks = [config.root.as_os_str(), config.state.as_os_str()];
    let disks: Vec<_> = disks.iter().filter_map(|path| path.to_str()).collect();
    parts.add("disks.txt", limited(program("df", &disks)).await);
    for path in MACHINE_FILES {
        let name = path.trim_start_matches('/').replace('/', "-");
        parts.add(format!("machine/{name}"), start_of(Path::new(path)));
    }
    match FilesystemLayout::new(&config.root, &config.state) {
        Ok(layout) => pods(&layout, &mut parts),
        Err(error) => parts
            .errors
            .push(format!("pods: {}", boxlite_runtime::report(&error))),
    }
    parts
}

/// Adds the logs of the latest pods.
fn pods(layout: &FilesystemLayout, parts: &mut Parts) {
    let entries = match std::fs::read_dir(layout.boxes()) {
        Ok(entries) => entries,
        Err(error) => return parts.errors.push(format!("pods: {error}")),
    };
    let mut pods: Vec<(SystemTime, String)> = entries
        .flatten()
        .filter_map(|entry| {
            let changed = entry.metadata().and_then(|data| data.modified());
            Some((
                changed.unwrap_or(UNIX_EPOCH),
                entry.file_name().into_string().ok()?,
            ))
        })
        .collect();
    pods.sort_by(|one, other| other.cmp(one));
    if pods.len() > MAX_PODS {
        let left_out = pods.len() - MAX_PODS;
        parts
            .errors
            .push(format!("pods: {left_out} left out, the oldest"));
        pods.truncate(MAX_PODS);
    }
    for (_, id) in &pods {
        for path in [
            layout.shim_log(id),
            layout.old_shim_log(id),
            layout.console(id),
        ] {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            match end_of(&path) {
                // Logs that do not exist yet or any more.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                content => parts.add(format!("pods/{id}/{name}"), content),
            }
        }
    }
}

/// Reads the end of a log that a hostile process may have replaced.
fn end_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = OpenOptions::new()
        .read(true)
        // A FIFO would block without O_NONBLOCK.
        .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    file.seek(SeekFrom::Start(metadata.size().saturating_sub(LOG_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn start_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(PART_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

async fn limited(work: impl Future<Output = io::Result<Vec<u8>>>) -> io::Result<Vec<u8>> {
    match tokio::time::timeout(PART_TIMEOUT, work).await {
        Ok(result) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Returns the output of a program, which is killed if the future is dropped.
async fn program(name: &str, arguments: &[&str]) -> io::Result<Vec<u8>> {
    let mut child = tokio::process::Command::new(name)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let mut output = Vec::new();
    if let Some(pipe) = child.stdout.take() {
        pipe.take(PART_BYTES).read_to_end(&mut output).await?;
    }
    match child.wait().await? {
        status if status.success() => Ok(output),
        status => Err(io::Error::other(format!("{name}: {status}"))),
    }
}

/// Returns the daemon's metrics page with its HTTP header.
async fn metrics(address: SocketAddr) -> io::Result<Vec<u8>> {
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .await?;
    let mut page = Vec::new();
    stream.take(PART_BYTES).read_to_end(&mut page).await?;
    Ok(page)
}

/// Writes the archive, readable by its owner only. An existing file is not overwritten.
fn write(path: &Path, top: &str, seconds: u64, parts: &Parts) -> io::Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let mut archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
    let mut append = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(seconds);
        archive.append_data(&mut header, format!("{top}/{name}"), bytes)
    };
    for (name, bytes) in &parts.files {
        append(name, bytes)?;
    }
    let errors: String = parts
        .errors
        .iter()
        .map(|line| format!("{line}\n"))
        .collect();
    append("errors.txt", errors.as_bytes())?;
    archive.into_inner()?.finish()?.flush()
}
