//! Binds the CRI socket with private permissions, unless another process serves it.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use tokio::net::UnixListener;

/// Errors of binding the socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// Another process serves there.
    #[error("failed to bind {}: the socket has a live server", .0.display())]
    InUse(PathBuf),
    /// The path is a file of another type.
    #[error("failed to bind {}: the file is not a socket", .0.display())]
    NoSocket(PathBuf),
    /// The directory is accessible to other users.
    #[error("failed to bind {}: its directory is world-writable", .0.display())]
    OpenDirectory(PathBuf),
    /// A system call failed.
    #[error("failed to bind {}: {step}", path.display())]
    Io {
        path: PathBuf,
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Binds `path` with mode 0600. Creates a missing directory with 0700 and replaces a stale socket.
pub(crate) fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let fail = |step| {
        move |source| SocketError::Io {
            path: path.to_owned(),
            step,
            source,
        }
    };
    let directory = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(fail("failed to create its directory"))?;
    let mode = fs::metadata(directory)
        .map_err(fail("failed to stat its directory"))?
        .permissions()
        .mode();
    if mode & 0o002 != 0 {
        return Err(SocketError::OpenDirectory(path.to_owned()));
    }
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail("failed to stat it")(error)),
        Ok(old) if !old.file_type().is_socket() => {
            return Err(SocketError::NoSocket(path.to_owned()));
        }
        Ok(_) => match StdUnixStream::connect(path) {
            Ok(_) => return Err(SocketError::InUse(path.to_owned())),
            Err(_) => fs::remove_file(path).map_err(fail("failed to remove the stale socket"))?,
        },
    }
    let listener = UnixListener::bind(path).map_err(fail("failed to create the socket"))?;
    // Until here the socket has the mode of the umask. Connecting requires write permission, which the umask (022) removes,
    // and the directory is not writable by others.
    fs::set_permissions(path, Permissions::from_mode(0o600))
        .map_err(fail("failed to set its mode"))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stale_is_replaced_live_is_not_and_files_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/cri.sock");
        let first = bind(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(matches!(bind(&path), Err(SocketError::InUse(_))));
        drop(first);
        drop(bind(&path).unwrap());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        assert!(matches!(bind(&path), Err(SocketError::NoSocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }

    #[tokio::test]
    async fn world_writable_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(
            bind(&dir.path().join("cri.sock")),
            Err(SocketError::OpenDirectory(_))
        ));
    }
}
