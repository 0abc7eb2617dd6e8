//! This program inside a guest: [`mounts`] puts it there. `boxlite-e2e events <directory>` and `boxlite-e2e splice <file>`
//! exist because busybox has neither inotify nor sendfile; both run until they are killed.

use crate::failure::Result;
use crate::image::busybox::libraries;
use k8s_cri::v1::Mount;
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use std::fs::File;
use std::io::Write;
use std::mem::MaybeUninit;
use std::path::Path;
use std::time::Duration;

/// Interval between looks at the end of a file.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Returns read-only mounts of this program at `target` and of its libraries, for a container of any image.
pub(crate) fn mounts(target: &str) -> Result<Vec<Mount>> {
    let program = std::env::current_exe()?;
    let program = program.to_str().unwrap_or_default();
    let mut files = vec![(program.to_owned(), target.to_owned())];
    files.extend(libraries(program)?.into_iter().map(|l| (l.clone(), l)));
    let mount = |(host_path, container_path)| Mount {
        host_path,
        container_path,
        readonly: true,
        ..Default::default()
    };
    Ok(files.into_iter().map(mount).collect())
}

/// Prints `watching`, then a line per creation, removal or renaming in `directory`.
pub(crate) fn events(directory: &Path) -> Result {
    let watcher = inotify::init(CreateFlags::CLOEXEC)?;
    let flags = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE;
    inotify::add_watch(&watcher, directory, flags)?;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(watcher, &mut buffer);
    println!("watching");
    loop {
        let event = reader.next()?;
        let name = event.file_name().map(|name| name.to_string_lossy());
        println!("{:?} {}", event.events(), name.unwrap_or_default());
        std::io::stdout().flush()?;
    }
}

/// Copies `file`, and bytes that are appended to it later, to the standard output by sendfile. Asks for the file's size
/// before each call, which docs/coherence.md requires in a pod.
pub(crate) fn splice(file: &Path) -> Result {
    let (file, out) = (File::open(file)?, std::io::stdout());
    loop {
        file.metadata()?;
        while rustix::fs::sendfile(&out, &file, None, 1 << 16)? > 0 {}
        std::thread::sleep(POLL_INTERVAL);
    }
}
