//! Protocol between agent, spawner and helpers: JSON over SEQPACKET sockets, with descriptors attached.
//!
//! Both ends are the same binary, so there is no versioning. A process in a container does not hold such a socket after
//! its exec.

use crate::seccomp::Filter;
use oci_spec::runtime::{LinuxCapabilities, PosixRlimit};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

/// The only byte of messages that carry just descriptors.
pub(crate) const REQUEST_MARK: u8 = 1;
/// Maximum number of descriptors of one message: request, reply, three of stdio, one pidfd.
pub(crate) const MAX_DESCRIPTORS: usize = 6;
/// Maximum size of a reply, in bytes.
const MAX_REPLY_BYTES: usize = 16 << 10;
/// Maximum length of a failure's message in bytes, so that a reply always fits.
const MAX_FAILURE_BYTES: usize = 4 << 10;

/// A request, sent as a memfd.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Creates a container's init process. Descriptors: stdin, stdout, stderr (none for a terminal).
    Create(Box<CreateRequest>),
    /// Runs a process in a container. Descriptors: the init process's pidfd, then stdin, stdout, stderr (none for a
    /// terminal).
    Exec(Box<ExecRequest>),
    /// Holds a new PID namespace, and a user namespace if a mapping is given. No descriptors.
    Pause(Option<IdMap>),
}

/// Content of [`Request::Create`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CreateRequest {
    /// Container id.
    pub id: String,
    /// Directory with `config.json`.
    pub bundle: PathBuf,
    /// Directory in which libcontainer keeps its state.
    pub state: PathBuf,
    /// True if the process gets a terminal.
    pub terminal: bool,
    /// Working directory, for the error of its chdir.
    pub working_dir: PathBuf,
    /// Privileges of the program; unknown to libcontainer.
    pub confinement: Confinement,
}

/// Content of [`Request::Exec`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExecRequest {
    /// `cgroup.procs` of the cgroup the process starts in.
    pub cgroup_procs: PathBuf,
    /// True if the container is in a user namespace.
    pub user_namespace: bool,
    /// The process.
    pub process: ProcessPlan,
}

/// A process with all defaults filled in.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ProcessPlan {
    pub terminal: bool,
    /// Rows and columns of the terminal; 0 for the kernel's default.
    pub console_size: (u16, u16),
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: PathBuf,
    pub user: UserPlan,
    pub confinement: Confinement,
    pub rlimits: Vec<PosixRlimit>,
    pub oom_score_adj: i32,
}

/// Mapping of the users and groups of a user namespace, starting at 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IdMap {
    /// ID outside the namespace that 0 maps to.
    pub first: u32,
    /// Number of mapped IDs.
    pub length: u32,
}

impl IdMap {
    /// Returns the ID outside the namespace, or `None` if it is not mapped.
    pub(crate) fn outside(self, id: u32) -> Option<u32> {
        (id < self.length).then(|| self.first + id)
    }
}

/// Privileges of a program beyond those of its user.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Confinement {
    pub capabilities: Option<LinuxCapabilities>,
    pub no_new_privileges: bool,
    /// Installed right before the program is executed.
    pub seccomp: Option<Filter>,
}

/// User a process runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UserPlan {
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
    pub umask: Option<u32>,
    /// `user[:group]` to be resolved in the container's /etc/passwd and /etc/group; takes precedence over the IDs.
    pub name: Option<String>,
    /// True if the user's groups in /etc/group are added.
    pub merge_groups: bool,
}

/// A message of a helper, or of the process before its exec.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Message {
    /// The process exists and is stopped before its exec.
    Created { pid: i32 },
    /// The terminal's master, attached as a descriptor.
    Console,
    /// An error logged by libcontainer; a failure may follow.
    Detail(String),
    /// The process cannot be run.
    Failed(Failure),
}

/// Reason a process cannot be run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

/// Kinds of failure distinguished by the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    ExecutableNotFound,
    UserNotFound,
    InvalidArgument,
    Internal,
}

impl Failure {
    /// Creates a failure, with the message truncated to fit a reply.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > MAX_FAILURE_BYTES {
            let end = (0..=MAX_FAILURE_BYTES)
                .rev()
                .find(|end| message.is_char_boundary(*end))
                .unwrap_or(0);
            message.truncate(end);
        }
        Self { kind, message }
    }

    /// Creates a failure of a system call; `step` is a verb phrase.
    pub fn step(step: &str, error: impl std::fmt::Display) -> Self {
        Self::new(FailureKind::Internal, format!("failed to {step}: {error}"))
    }
}

/// Writes a request into a new memfd.
pub(crate) fn to_memfd(request: &Request) -> io::Result<OwnedFd> {
    let descriptor = rustix::fs::memfd_create("request", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(descriptor);
    file.write_all(&serde_json::to_vec(request)?)?;
    file.rewind()?;
    Ok(file.into())
}

/// Reads the request that [`to_memfd`] wrote.
pub(crate) fn from_memfd(descriptor: OwnedFd) -> io::Result<Request> {
    let mut text = Vec::new();
    std::fs::File::from(descriptor).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Sends bytes with descriptors attached.
pub(crate) fn send_with(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.map(|_| ()).map_err(io::Error::from),
        }
    }
}

/// Receives bytes and attached descriptors; 0 bytes if the other end is closed.
pub(crate) fn receive_with(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let flags = RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    Ok((received.bytes, descriptors))
}

/// Sends a message.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    message: &Message,
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let descriptors: Vec<_> = descriptor.into_iter().collect();
    send_with(socket, &text, &descriptors, SendFlags::NOSIGNAL)
}

/// Receives a message; `None` once all other ends are closed.
pub(crate) fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
    let mut buffer = vec![0; MAX_REPLY_BYTES];
    let (length, mut descriptors) = match receive_with(socket, &mut buffer) {
        // The other end was closed with unread data.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
        other => other?,
    };
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((
        serde_json::from_slice(&buffer[..length])?,
        descriptors.pop(),
    )))
}
