//! [`WorkDirWatch`]: bounds the VM's working directory, in which a VMM may create files on the host.
//!
//! It has sockets and two bounded logs. The directory is below /run, whose space all pods share: a VMM that a guest has taken over
//! could fill it. One that has written more than [`MAX_BYTES`] or [`MAX_FILES`] is killed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Interval between checks.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum size of all files; the two logs have at most 1 MiB each.
const MAX_BYTES: u64 = 16 << 20;
/// Maximum number of files; there are about ten.
const MAX_FILES: usize = 1000;

/// Watches the working directory of one VM.
pub struct WorkDirWatch {
    directory: PathBuf,
    kill: Arc<dyn Fn() + Send + Sync>,
}

impl WorkDirWatch {
    /// Creates the watch of `directory`; `kill` ends the VM.
    pub fn new(directory: PathBuf, kill: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self { directory, kill }
    }

    /// Runs until `ended`, on the shim's task tracker.
    pub async fn run(self, ended: CancellationToken) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(CHECK_INTERVAL) => {}
                () = ended.cancelled() => return,
            }
            // Some ten files in memory: as quick as a message to another thread.
            let Some((bytes, files)) = excess(&self.directory) else {
                continue;
            };
            tracing::error!(
                bytes,
                files,
                "the VMM fills its working directory; killing it"
            );
            (self.kill)();
            return;
        }
    }
}

/// Returns size and number of the files if one is above its limit. Does not follow links.
fn excess(directory: &Path) -> Option<(u64, usize)> {
    let (mut bytes, mut files) = (0, 0);
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            files += 1;
            bytes += std::os::unix::fs::MetadataExt::blocks(&meta) * 512;
            if bytes > MAX_BYTES || files > MAX_FILES {
                return Some((bytes, files));
            }
            if meta.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn vm_that_fills_its_directory_is_killed() {
        type Fill = fn(&Path);
        let cases: [(&str, usize, Fill); 4] = [
            ("the two logs", 0, |dir| {
                for name in ["console.log", "vmm.log"] {
                    std::fs::write(dir.join(name), vec![1; 1 << 20]).expect("written");
                }
            }),
            ("one file", 1, |dir| {
                std::fs::write(dir.join("x"), vec![1; 17 << 20]).expect("written");
            }),
            ("below a directory", 1, |dir| {
                std::fs::create_dir(dir.join("d")).expect("created");
                for n in 0..17 {
                    let file = dir.join(format!("d/{n}"));
                    std::fs::write(file, vec![1; 1 << 20]).expect("written");
                }
            }),
            ("empty files", 1, |dir| {
                for n in 0..=MAX_FILES {
                    std::fs::write(dir.join(format!("{n}")), "").expect("written");
                }
            }),
        ];
        // At the same time, since the clock is real.
        futures::future::join_all(cases.map(|(name, expected, fill)| async move {
            let dir = tempfile::tempdir().expect("a directory");
            std::os::unix::fs::symlink("/", dir.path().join("link")).expect("linked");
            fill(dir.path());
            let kills = Arc::new(AtomicUsize::new(0));
            let counted = kills.clone();
            let kill = Arc::new(move || {
                counted.fetch_add(1, Ordering::SeqCst);
            });
            let ended = CancellationToken::new();
            let watch = WorkDirWatch::new(dir.path().to_owned(), kill);
            let end = async {
                tokio::time::sleep(3 * CHECK_INTERVAL).await;
                ended.cancel();
            };
            tokio::join!(watch.run(ended.clone()), end);
            assert_eq!(kills.load(Ordering::SeqCst), expected, "{name}");
        }))
        .await;
    }
}
