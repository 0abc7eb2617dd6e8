//! overlayfs mounts with more lower directories than fit one page of mount options: paths relative to their common parent.
//!
//! containerd does the same. [`super::PodShare`] makes the mount call, on a thread with its own working directory.

use nix::sched::{CloneFlags, unshare};
use std::io;
use std::path::{Path, PathBuf};

/// Maximum length of mount options in bytes: a page without the final NUL.
const MAX_OPTIONS_BYTES: usize = 4095;

/// Returns the common parent of the lower directories and options relative to it. None if the options are short enough or
/// cannot be shortened.
pub(super) fn shorten(kind: &str, data: &str) -> Option<(PathBuf, String)> {
    if kind != "overlay" || data.len() <= MAX_OPTIONS_BYTES {
        return None;
    }
    let lower = data.split(',').find_map(|o| o.strip_prefix("lowerdir="))?;
    let first = Path::new(lower.split(':').next()?);
    let mut common = first.parent()?;
    while !lower.split(':').all(|dir| {
        Path::new(dir)
            .strip_prefix(common)
            .is_ok_and(|rest| !rest.as_os_str().is_empty())
    }) {
        common = common.parent()?;
    }
    let relative: Vec<&str> = lower
        .split(':')
        .filter_map(|dir| Path::new(dir).strip_prefix(common).ok()?.to_str())
        .collect();
    let short = data.replace(lower, &relative.join(":"));
    (common != Path::new("/")).then(|| (common.to_owned(), short))
}

/// Runs `work` on a thread with `directory` as its working directory.
pub(super) fn inside<T: Send>(
    directory: &Path,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(directory)?;
            work()
        });
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("mounting thread panicked")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shorten_makes_many_layers_fit_a_page() {
        let root = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";
        let dirs: Vec<_> = (0..120).map(|n| format!("{root}/{n}/fs")).collect();
        let data = format!(
            "index=off,workdir={root}/200/work,lowerdir={}",
            dirs.join(":")
        );
        let (common, short) = shorten("overlay", &data).expect("options exceed a page");
        assert_eq!(common, Path::new(root));
        assert!(short.len() <= MAX_OPTIONS_BYTES, "{}", short.len());
        assert!(
            short.contains(&format!("workdir={root}/200/work"))
                && short.contains("lowerdir=0/fs:1/fs:")
        );
        assert!(shorten("overlay", "lowerdir=/a:/b").is_none());
    }

    #[test]
    fn inside_keeps_the_process_working_directory() {
        let before = std::env::current_dir().expect("working directory");
        let seen = inside(Path::new("/usr"), std::env::current_dir).expect("entered");
        assert_eq!(seen, Path::new("/usr"));
        assert_eq!(std::env::current_dir().expect("working directory"), before);
    }
}
