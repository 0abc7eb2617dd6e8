//! [`InitRootfs`]: what a VM boots from — the agent binary and the guest kernel — checked before a box is started.
//!
//! It makes nothing: the shim derives the root image, the kernel's wrapper and the ext4 template from these, in
//! `Installation::cache`. A file that is missing is named here in words, instead of as a VM that never says "ready".

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
    /// Over this installation; looks at nothing yet.
    pub fn new(installation: Installation) -> Self {
        Self { installation }
    }

    /// The installation.
    pub fn installation(&self) -> &Installation {
        &self.installation
    }

    /// Whether everything a VM of `kind` needs is there: a few stats, asked before each start, since packages are
    /// replaced under a running daemon.
    ///
    /// # Errors
    /// `Missing` with the first file that is not there, is empty, or cannot be executed where it must be.
    pub fn check(&self, kind: &VmmKind) -> Result<()> {
        let files = &self.installation;
        check_file("the guest agent", &files.guest, true)?;
        check_file("the guest kernel libkrunfw", &files.libkrunfw, false)?;
        if *kind == VmmKind::Qemu {
            check_file("QEMU", &files.qemu, true)?;
            check_file("virtiofsd", &files.virtiofsd, true)?;
            check_file("vhost-device-vsock", &files.vhost_device_vsock, true)?;
        }
        Ok(())
    }
}

/// Whether `path` is a file with content, and may be executed if `program`.
pub(crate) fn check_file(what: &'static str, path: &Path, program: bool) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let missing = |source| RuntimeError::Missing {
        what,
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
    fn each_missing_file_is_named() {
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
