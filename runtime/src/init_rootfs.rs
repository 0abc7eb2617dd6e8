//! [`InitRootfs`]: the files that a VM boots from (agent and guest kernel), checked before a box is started.
//!
//! Creates nothing: the shim derives the root image from these files in `Installation::cache`. The check turns a missing
//! file into an error that names it, instead of a VM that does not become ready.

use crate::error::{Result, RuntimeError};
use boxlite_proto::vmm::{Installation, VmmKind};
use std::io;
use std::path::Path;

/// The files of the installation.
#[derive(Debug, Clone)]
pub struct InitRootfs {
    installation: Installation,
}

impl InitRootfs {
    /// Wraps an installation without checking it.
    pub fn new(installation: Installation) -> Self {
        Self { installation }
    }

    /// Returns the installation.
    pub fn installation(&self) -> &Installation {
        &self.installation
    }

    /// Checks all files that a VM of `kind` needs. Called before each start, because packages may be replaced while the
    /// daemon is running.
    ///
    /// # Errors
    /// `Missing` with the first file that is missing, empty, or not executable although it must be.
    pub fn check(&self, kind: &VmmKind) -> Result<()> {
        let files = &self.installation;
        check_file("guest agent", &files.guest, true)?;
        check_file("guest kernel libkrunfw", &files.libkrunfw, false)?;
        if *kind == VmmKind::Qemu {
            check_file("QEMU", &files.qemu, true)?;
            check_file("virtiofsd", &files.virtiofsd, true)?;
            check_file("vhost-device-vsock", &files.vhost_device_vsock, true)?;
        }
        Ok(())
    }
}

/// Checks that `path` is a non-empty file, and executable if `program` is set.
pub(crate) fn check_file(what: &'static str, path: &Path, program: bool) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let missing = |source| RuntimeError::Missing {
        subject: what,
        path: path.to_owned(),
        source,
    };
    let metadata = std::fs::metadata(path).map_err(missing)?;
    let flaw = if !metadata.is_file() {
        Some("it is not a file")
    } else if metadata.len() == 0 {
        Some("it is empty")
    } else if program && metadata.permissions().mode() & 0o111 == 0 {
        Some("it is not executable")
    } else {
        None
    };
    match flaw {
        Some(flaw) => Err(missing(io::Error::new(io::ErrorKind::InvalidData, flaw))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn check_names_missing_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, mode| {
            let path = directory.path().join(name);
            std::fs::write(&path, "x").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let installation = Installation {
            guest: file("guest", 0o644),
            libkrunfw: file("fw", 0o644),
            qemu: directory.path().join("qemu"),
            virtiofsd: file("virtiofsd", 0o755),
            vhost_device_vsock: file("vsock", 0o755),
            passt: directory.path().join("passt"),
            cache: directory.path().join("cache"),
        };
        let error = InitRootfs::new(installation.clone())
            .check(&VmmKind::Krun)
            .unwrap_err();
        assert!(error.to_string().contains("guest agent"), "{error}");
        file("guest", 0o755);
        InitRootfs::new(installation.clone())
            .check(&VmmKind::Krun)
            .unwrap();
        let error = InitRootfs::new(installation)
            .check(&VmmKind::Qemu)
            .unwrap_err();
        assert!(error.to_string().contains("QEMU"), "{error}");
    }
}
