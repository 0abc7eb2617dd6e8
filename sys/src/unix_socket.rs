//! Unix sockets at paths of any length: [`connect`] and [`bind`].
//!
//! A `sockaddr_un` holds 107 bytes of path and bundle paths can be longer, so long paths are accessed through
//! `/proc/self/fd/<dir>/<name>`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tokio::net::{UnixListener, UnixStream};

/// Maximum path length of a `sockaddr_un` without its final NUL, in bytes (unix(7)).
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// A path that fits a `sockaddr_un`, with the directory that must remain open while it is used.
struct ShortPath {
    path: PathBuf,
    _directory: Option<File>,
}

fn shorten(path: &Path) -> io::Result<ShortPath> {
    if path.as_os_str().len() <= MAX_SOCKET_PATH_BYTES {
        return Ok(ShortPath {
            path: path.to_owned(),
            _directory: None,
        });
    }
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} names no socket", path.display()),
        ));
    };
    let directory = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(directory)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    Ok(ShortPath {
        path: short,
        _directory: Some(directory),
    })
}

/// Connects to the unix socket at `path`, which must not be a link. Some sockets are in directories that the VMM may write:
/// a compromised VMM could put a link to another socket of the host there, and a root process would connect to it. So the
/// file is opened without following links and checked, and the connection goes through its descriptor. Dropping the future
/// leaves nothing behind.
///
/// # Errors
/// Those of open(2) and connect(2); InvalidInput if the file is not a socket.
pub async fn connect(path: &Path) -> io::Result<UnixStream> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)?;
    if !file.metadata()?.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} is not a socket", path.display()),
        ));
    }
    UnixStream::connect(format!("/proc/self/fd/{}", file.as_raw_fd())).await
}

/// Listens on the unix socket at `path`, in the place of a dead one. The caller made sure that the directory is private
/// and that no other process serves there.
///
/// # Errors
/// Those of unlink(2), bind(2) and listen(2).
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let short = shorten(path)?;
    UnixListener::bind(&short.path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn long_paths_connect() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("d".repeat(120));
        std::fs::create_dir(&directory).unwrap();
        let path = directory.join("socket");
        let listener = bind(&path).unwrap();
        let mut client = connect(&path).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        client.write_all(b"x").await.unwrap();
        assert_eq!(server.read_u8().await.unwrap(), b'x');
        // A dead socket file is replaced.
        drop(listener);
        bind(&path).unwrap();
    }

    /// A compromised VMM may put anything into its working directory, but the host connects to sockets of the VMM only.
    #[tokio::test]
    async fn connect_refuses_links_and_other_files() {
        let root = tempfile::tempdir().unwrap();
        let (other, link) = (root.path().join("other"), root.path().join("link"));
        let _listener = bind(&other).unwrap();
        std::os::unix::fs::symlink(&other, &link).unwrap();
        let file = root.path().join("file");
        std::fs::write(&file, "").unwrap();
        for path in [&link, &file, &root.path().to_owned()] {
            let error = connect(path).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
        }
        let missing = connect(&root.path().join("missing")).await.unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        connect(&other).await.unwrap();
    }
}
