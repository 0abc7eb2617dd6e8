//! This program inside a guest: [`mounts`] puts it there. Its commands `events`, `splice`, `map-read`, `map-write`,
//! `try-lock` and `get-from` exist because Debian's busybox has no such applets. The first three run until they are killed.

use crate::failure::Result;
use crate::image::busybox::libraries;
use crate::mapped_file::MappedFile;
use k8s_cri::v1::Mount;
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::net::{AddressFamily, SocketType};
use std::fs::File;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

/// Interval between looks at a file.
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

/// Prints the first byte of a mapped file, and again whenever it has changed. Accesses the file only by its mapping.
pub(crate) fn map_read(file: &Path) -> Result {
    let (mapped, mut last) = (MappedFile::<1>::open(file)?, None);
    loop {
        let byte = mapped.read(0);
        if last.replace(byte) != Some(byte) {
            println!("maps {}", char::from(byte));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Writes `s` into a mapped file and calls msync, then `u` and removes the mapping. Each step waits for the file `<file>.<step>`.
pub(crate) fn map_write(file: &Path) -> Result {
    let wait = |step: &str| {
        println!("next: {step}");
        while !file.with_added_extension(step).exists() {
            std::thread::sleep(POLL_INTERVAL);
        }
    };
    let mut mapped = MappedFile::<1>::open(file)?;
    mapped.write(0, b's');
    wait("sync");
    mapped.sync()?;
    // Written later: the kernel may write a page back before its owner asks for it.
    wait("unmap");
    mapped.write(0, b'u');
    drop(mapped);
    println!("unmapped");
    Ok(())
}

/// Fails if another process holds an flock of the file.
pub(crate) fn try_lock(file: &Path) -> Result {
    Ok(File::open(file)?.try_lock().map_err(std::io::Error::from)?)
}

/// Connects from `source` with any port, and prints the peer's address, the socket's own and the response to a GET request.
pub(crate) fn get_from(source: IpAddr, target: SocketAddr) -> Result {
    let family = if source.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let socket = rustix::net::socket(family, SocketType::STREAM, None)?;
    rustix::net::bind(&socket, &SocketAddr::new(source, 0))?;
    rustix::net::connect(&socket, &target)?;
    let mut stream = TcpStream::from(socket);
    println!("{} {}", stream.peer_addr()?, stream.local_addr()?);
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    println!("{response}");
    Ok(())
}
