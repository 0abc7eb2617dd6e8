//! Conversion of the agent's errors to gRPC statuses: a code, the whole chain of causes as message, and the typed detail.

use crate::cgroup::error::CgroupError;
use crate::container::error::ContainerError;
use crate::execution::input::InputError;
use crate::network::NetworkError;
use crate::spawner::SpawnError;
use crate::spawner::wire::FailureKind;
use crate::status::from_error;
use crate::storage::StorageError;
use crate::system::SystemError;
use boxlite_proto::boxlite::v1::ErrorKind;
use boxlite_sys::storage_full::is_full;
use std::io;
use tonic::Status;

/// Returns `Resources` if a full disk or an exhausted quota caused the error, otherwise `kind`.
fn unless_full(kind: ErrorKind, source: &io::Error) -> ErrorKind {
    match is_full(source) {
        true => ErrorKind::Resources,
        false => kind,
    }
}

fn storage_kind(error: &StorageError) -> (ErrorKind, String) {
    match error {
        StorageError::Mount { target, source, .. } | StorageError::Unmount { target, source } => {
            (unless_full(ErrorKind::Mount, source), target.clone())
        }
        StorageError::Path { path, source, .. } => {
            (unless_full(ErrorKind::Rootfs, source), path.clone())
        }
        StorageError::Escape { path, .. } => (ErrorKind::InvalidArgument, path.clone()),
        StorageError::NotMapped { path } => (ErrorKind::InvalidArgument, path.clone()),
        StorageError::NoDisk { serial, .. } => (ErrorKind::NotFound, serial.clone()),
        StorageError::TooManyLayers { .. } => {
            (ErrorKind::InvalidArgument, "rootfs.layers".to_owned())
        }
    }
}

impl From<StorageError> for Status {
    fn from(error: StorageError) -> Self {
        let (kind, subject) = storage_kind(&error);
        from_error(kind, &subject, &error)
    }
}

/// Returns the kind of a cgroup's error. EINVAL and ERANGE of a write mean that the kernel rejects the value.
fn cgroup_kind(error: &CgroupError) -> ErrorKind {
    match error {
        CgroupError::Resource { .. } => ErrorKind::InvalidArgument,
        CgroupError::File { source, .. }
            if matches!(source.raw_os_error(), Some(libc::EINVAL | libc::ERANGE)) =>
        {
            ErrorKind::InvalidArgument
        }
        CgroupError::File { .. } | CgroupError::Directory { .. } => ErrorKind::Resources,
    }
}

/// Returns kind and subject of a container's error; an error shared with an earlier call keeps its own.
fn container_kind(error: &ContainerError) -> (ErrorKind, String) {
    match error {
        ContainerError::NotFound { id, .. } => (ErrorKind::NotFound, id.clone()),
        ContainerError::WrongState { id, .. } => (ErrorKind::WrongState, id.clone()),
        ContainerError::Invalid { field, .. } => (ErrorKind::InvalidArgument, (*field).to_owned()),
        ContainerError::Limit { what, .. } => (ErrorKind::Resources, (*what).to_owned()),
        ContainerError::Storage(error) => storage_kind(error),
        ContainerError::Cgroup(error) => (cgroup_kind(error), "cgroup".to_owned()),
        ContainerError::Spawn(SpawnError::Refused(failure)) => {
            let kind = match failure.kind {
                FailureKind::ExecutableNotFound => ErrorKind::ExecutableNotFound,
                FailureKind::UserNotFound => ErrorKind::UserNotFound,
                FailureKind::InvalidArgument => ErrorKind::InvalidArgument,
                FailureKind::Internal => ErrorKind::Internal,
            };
            (kind, "process".to_owned())
        }
        ContainerError::Spawn(_) => (ErrorKind::Internal, "spawner".to_owned()),
        ContainerError::User(_) => (ErrorKind::UserNotFound, "process.user".to_owned()),
        ContainerError::System(_) => (ErrorKind::InvalidArgument, "sysctl".to_owned()),
        ContainerError::Step { step, source } => {
            (unless_full(ErrorKind::Internal, source), (*step).to_owned())
        }
        ContainerError::OutOfMemory => (ErrorKind::Resources, "memory".to_owned()),
        ContainerError::NoPod => (ErrorKind::WrongState, "guest".to_owned()),
        ContainerError::Shared(inner) => container_kind(inner),
    }
}

impl From<ContainerError> for Status {
    fn from(error: ContainerError) -> Self {
        let (kind, subject) = container_kind(&error);
        from_error(kind, &subject, &error)
    }
}

impl From<InputError> for Status {
    fn from(error: InputError) -> Self {
        let kind = match &error {
            InputError::Gap { .. } => ErrorKind::InvalidArgument,
            InputError::TooManyWriters => ErrorKind::Resources,
            InputError::None => ErrorKind::WrongState,
            InputError::Write(_) => ErrorKind::Internal,
        };
        from_error(kind, "input", &error)
    }
}

impl From<NetworkError> for Status {
    fn from(error: NetworkError) -> Self {
        let kind = match &error {
            NetworkError::Invalid { .. } => ErrorKind::InvalidArgument,
            NetworkError::NoCard { .. } => ErrorKind::NotFound,
            NetworkError::Socket(_)
            | NetworkError::Dhcp(_)
            | NetworkError::ResolvConf(_)
            | NetworkError::Step { .. } => ErrorKind::Internal,
        };
        from_error(kind, "network", &error)
    }
}

impl From<SystemError> for Status {
    fn from(error: SystemError) -> Self {
        let (kind, subject) = match &error {
            SystemError::Sysctl { name, .. } => (ErrorKind::InvalidArgument, name.clone()),
            SystemError::Hostname { name, .. } => (ErrorKind::InvalidArgument, name.clone()),
            SystemError::Clock { .. } => (ErrorKind::Internal, "clock".to_owned()),
            SystemError::DropCaches(_) => (ErrorKind::Internal, "caches".to_owned()),
            SystemError::Entropy(_) => (ErrorKind::Internal, "entropy".to_owned()),
        };
        from_error(kind, &subject, &error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(errno: i32) -> [ErrorKind; 2] {
        let source = || io::Error::from_raw_os_error(errno);
        let mount = StorageError::Mount {
            fstype: "overlay".into(),
            origin: "overlay".into(),
            target: "/t".into(),
            source: source(),
        };
        let path = StorageError::path("create directory", "/p")(source());
        [mount, path].map(|error| container_kind(&error.into()).0)
    }

    #[test]
    fn full_disk_is_reported_as_resources() {
        assert_eq!(storage(libc::ENOSPC), [ErrorKind::Resources; 2]);
        assert_eq!(storage(libc::EDQUOT), [ErrorKind::Resources; 2]);
        assert_eq!(storage(libc::EIO), [ErrorKind::Mount, ErrorKind::Rootfs]);
        let step = |errno| ContainerError::step("s")(io::Error::from_raw_os_error(errno));
        let shared = ContainerError::Shared(step(libc::ENOSPC).into());
        assert_eq!(container_kind(&shared).0, ErrorKind::Resources);
        assert_eq!(container_kind(&step(libc::EIO)).0, ErrorKind::Internal);
    }

    #[test]
    fn rejected_cgroup_value_is_an_invalid_argument() {
        let file = |errno| CgroupError::File {
            path: "cpu.max".into(),
            value: "10 100000".into(),
            source: io::Error::from_raw_os_error(errno),
        };
        assert_eq!(cgroup_kind(&file(libc::EINVAL)), ErrorKind::InvalidArgument);
        assert_eq!(cgroup_kind(&file(libc::ENOSPC)), ErrorKind::Resources);
        let resource = CgroupError::Resource {
            field: "memory.swap".into(),
            reason: "requires memory.limit".into(),
        };
        assert_eq!(cgroup_kind(&resource), ErrorKind::InvalidArgument);
    }
}
