//! What agent, spawner and helpers say to each other: JSON over SEQPACKET sockets, descriptors beside it.
//!
//! Both ends are the same binary, so there is no versioning. A process in a container never holds such a socket after
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

/// The one byte of messages that carry only descriptors.
pub const REQUEST_MARK: u8 = 1;
/// Descriptors of one message: request, reply, three of stdio, one pidfd.
pub const DESCRIPTOR_LIMIT: usize = 6;
/// Largest reply, in bytes.
const REPLY_LIMIT: usize = 16 << 10;
/// Longest message of a failure, so that a reply always fits.
const FAILURE_LIMIT: usize = 4 << 10;

/// A request, in the memfd that goes with it.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Make a container's init process. Descriptors: stdin, stdout, stderr (none for a terminal).
    Create(Box<CreateRequest>),
    /// Run a process in a container. Descriptors: the init process's pidfd, then stdin, stdout, stderr (none for a
    /// terminal).
    Exec(Box<ExecRequest>),
    /// Hold a new PID namespace, and a user namespace where a mapping is given. No descriptors.
    Pause(Option<IdMap>),
}

/// See [`Request::Create`].
#[derive(Debug, Serialize, Deserialize)]
pub struct CreateRequest {
    /// Container id.
    pub id: String,
    /// Directory with `config.json`.
    pub bundle: PathBuf,
    /// Directory in which libcontainer keeps its state.
    pub state: PathBuf,
    /// Whether the process gets a terminal.
    pub terminal: bool,
    /// What the program may do; libcontainer is not told.
    pub confinement: Confinement,
}

/// See [`Request::Exec`].
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecRequest {
    /// `cgroup.procs` of the cgroup the process starts in.
    pub cgroup_procs: PathBuf,
    /// Whether the container has a user namespace of its own.
    pub user_namespace: bool,
    /// The process.
    pub process: ProcessPlan,
}

/// A process as it is to be, all defaults filled in.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProcessPlan {
    pub terminal: bool,
    /// Rows and columns of the terminal; 0: the kernel's default.
    pub console_size: (u16, u16),
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: PathBuf,
    pub user: UserPlan,
    pub confinement: Confinement,
    pub rlimits: Vec<PosixRlimit>,
    pub oom_score_adj: i32,
}

/// How users and groups of a user namespace are numbered outside: from 0 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// What 0 is outside.
    pub first: u32,
    /// How many there are.
    pub length: u32,
}

impl IdMap {
    /// The number outside; `None` where it has none.
    pub fn outside(self, id: u32) -> Option<u32> {
        (id < self.length).then(|| self.first + id)
    }
}

/// What a program may do beyond what its user may.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    pub capabilities: Option<LinuxCapabilities>,
    pub no_new_privileges: bool,
    /// Put in force right before the program.
    pub seccomp: Option<Filter>,
}

/// Whom a process runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserPlan {
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
    pub umask: Option<u32>,
    /// `user[:group]` to be looked up in the container's /etc/passwd and /etc/group; wins over the numbers.
    pub name: Option<String>,
    /// Whether the groups that /etc/group gives the user are added.
    pub merge_groups: bool,
}

/// What a helper, or the process before its exec, answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Message {
    /// The process exists, stopped before its exec.
    Created { pid: i32 },
    /// The terminal's master; the descriptor goes with it.
    Console,
    /// What libcontainer logged as an error; a failure may follow.
    Detail(String),
    /// It will not run.
    Failed(Failure),
}

/// Why a process will not run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

/// Kinds of failure that the host tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    ExecutableNotFound,
    UserNotFound,
    InvalidArgument,
    Internal,
}

impl Failure {
    /// A failure with a message cut to what a reply carries.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > FAILURE_LIMIT {
            let end = (0..=FAILURE_LIMIT)
                .rev()
                .find(|end| message.is_char_boundary(*end))
                .unwrap_or(0);
            message.truncate(end);
        }
        Self { kind, message }
    }

    /// A step that a system call refused.
    pub fn step(step: &str, error: impl std::fmt::Display) -> Self {
        Self::new(FailureKind::Internal, format!("{step}: {error}"))
    }
}

/// Writes a request into a new memfd.
pub fn to_memfd(request: &Request) -> io::Result<OwnedFd> {
    let descriptor = rustix::fs::memfd_create("request", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(descriptor);
    file.write_all(&serde_json::to_vec(request)?)?;
    file.rewind()?;
    Ok(file.into())
}

/// Reads the request that [`to_memfd`] wrote.
pub fn from_memfd(descriptor: OwnedFd) -> io::Result<Request> {
    let mut text = Vec::new();
    std::fs::File::from(descriptor).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Sends bytes with descriptors beside them.
pub fn send_with(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTOR_LIMIT))];
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

/// Receives bytes with descriptors beside them; 0 bytes is the other end closed.
pub fn receive_with(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTOR_LIMIT))];
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

/// Sends an answer.
pub fn send(
    socket: BorrowedFd<'_>,
    message: &Message,
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let descriptors: Vec<_> = descriptor.into_iter().collect();
    send_with(socket, &text, &descriptors, SendFlags::NOSIGNAL)
}

/// Receives an answer; `None` once all other ends are closed.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
    let mut buffer = vec![0; REPLY_LIMIT];
    let (length, mut descriptors) = match receive_with(socket, &mut buffer) {
        // An end that was closed with data unread.
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
