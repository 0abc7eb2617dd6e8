//! Landlock rules, a wall behind the mount namespace: they apply to a thread and everything it starts.
//!
//! [`scope`] is for every process of the jail, [`restrict`] for those that serve no files. A file server is not restricted to
//! the share: it reaches nothing else in the jail anyway, and Landlock refuses files of a volume that was unmounted from the
//! share while the guest uses it, which the guest may go on using. A kernel without Landlock, or with an older version, runs the
//! VM with the rules it knows.

use super::{HostFiles, JailError};
use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope, path_beneath_rules,
};
use std::path::Path;

/// Version of Landlock whose file accesses are ruled.
const FILES_ABI: ABI = ABI::V5;
/// Version of Landlock that has scopes.
const SCOPE_ABI: ABI = ABI::V6;

/// Forbids signals to processes outside the jail and connections to abstract unix sockets of the network namespace, which
/// for a pod in the host's network is the host's.
///
/// # Errors
/// The kernel refused.
pub(super) fn scope() -> Result<(), JailError> {
    let apply = || -> Result<(), RulesetError> {
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .scope(Scope::from_all(SCOPE_ABI))?
            .create()?
            .restrict_self()?;
        Ok(())
    };
    apply().map_err(JailError::Landlock)
}

/// Leaves this process and its future children the listed files except the share: read-only ones for reading and executing,
/// writable ones also for writing, and new files in the working directory only.
///
/// # Errors
/// The kernel refused.
pub fn restrict(files: &HostFiles) -> Result<(), JailError> {
    let apply = || -> Result<(), RulesetError> {
        let read = AccessFs::from_read(FILES_ABI);
        let write: BitFlags<AccessFs> =
            AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
        let create = write | AccessFs::ReadDir | AccessFs::MakeSock | AccessFs::RemoveFile;
        let readable = files.read_only.iter().chain(&files.optional);
        let writable = files.read_write.iter();
        let devices = super::root::DEVICES.iter().map(Path::new);
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(FILES_ABI))?
            .create()?
            .add_rules(path_beneath_rules(readable, read))?
            .add_rules(path_beneath_rules(
                ["/proc"],
                AccessFs::ReadFile | AccessFs::ReadDir,
            ))?
            .add_rules(path_beneath_rules(writable, write))?
            .add_rules(path_beneath_rules(devices, write))?
            .add_rules(path_beneath_rules([&files.work_dir], create))?
            .restrict_self()?;
        Ok(())
    };
    apply().map_err(JailError::Landlock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::ErrorKind;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    /// Returns whether the kernel enforces a ruleset, by its effect on a thread of this process.
    fn enforces(handle: fn(Ruleset) -> Result<Ruleset, RulesetError>) -> bool {
        let probe = std::thread::spawn(move || {
            let ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
            let status = handle(ruleset)
                .and_then(Ruleset::create)
                .and_then(|ruleset| ruleset.restrict_self());
            status.expect("applied").ruleset == landlock::RulesetStatus::FullyEnforced
        });
        probe.join().expect("the probe")
    }

    /// On a kernel without Landlock the calls must succeed and restrict nothing.
    #[test]
    fn rules_leave_listed_files_and_own_sockets() {
        let files_ruled = enforces(|ruleset| ruleset.handle_access(AccessFs::from_all(ABI::V1)));
        let sockets_ruled = enforces(|ruleset| ruleset.scope(Scope::from_all(SCOPE_ABI)));
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        for name in ["share", "work", "lib"] {
            fs::create_dir(path(name)).expect("created");
            fs::write(path(name).join("file"), "x").expect("written");
        }
        fs::write(path("disk"), "x").expect("written");
        let files = HostFiles {
            read_only: vec![path("lib")],
            read_write: vec![path("disk")],
            share: path("share"),
            work_dir: path("work"),
            ..HostFiles::default()
        };
        let name = format!("boxlite-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).expect("a name");
        let _listener = UnixListener::bind_addr(&address).expect("bound");
        let confined = std::thread::spawn(move || {
            scope().expect("scoped");
            restrict(&files).expect("restricted");
            let in_work = |name: &str| files.work_dir.join(name);
            fs::read(files.read_only[0].join("file")).expect("a listed file");
            fs::write(&files.read_write[0], "y").expect("a writable file");
            let _socket = UnixListener::bind(in_work("socket")).expect("bound in the directory");
            UnixStream::connect(in_work("socket")).expect("connected to it");
            fs::remove_file(in_work("socket")).expect("removed");
            let refused = [
                fs::read(files.share.join("file")).map(drop),
                fs::write(files.read_only[0].join("file"), "y"),
                fs::write(in_work("new"), "y"),
                fs::create_dir(in_work("directory")),
                fs::read("/etc/passwd").map(drop),
            ];
            let kind = |error: std::io::Error| error.kind();
            let connected = UnixStream::connect_addr(&address).map(drop);
            (
                refused.map(|result| result.map_err(kind)),
                connected.map_err(kind),
            )
        });
        let expected = |ruled| match ruled {
            true => Err(ErrorKind::PermissionDenied),
            false => Ok(()),
        };
        let (accesses, connected) = confined.join().expect("confined");
        for (at, result) in accesses.into_iter().enumerate() {
            assert_eq!(result, expected(files_ruled), "access {at}");
        }
        assert_eq!(connected, expected(sockets_ruled));
    }
}
