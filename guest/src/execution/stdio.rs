//! Creates a process's standard streams: pipes, or the ends of a terminal.

use super::input::Input;
use crate::descriptor::AsyncDescriptor;
use boxlite_proto::boxlite::v1::OutputStream;
use nix::fcntl::OFlag;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// The agent's ends.
#[derive(Debug)]
pub(crate) struct AgentEnds {
    pub input: Input,
    pub sources: Vec<(OutputStream, AsyncDescriptor)>,
    pub terminal: Option<Arc<AsyncDescriptor>>,
}

/// Pipes of a process that does not exist yet.
#[derive(Debug)]
pub(crate) struct Pipes {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
    sink: Option<OwnedFd>,
    out: OwnedFd,
    err: OwnedFd,
}

impl Pipes {
    /// Creates pipes for output, and for input if `stdin` is set; else input is /dev/null.
    pub(crate) fn new(stdin: bool) -> io::Result<Self> {
        let pipe = || nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from);
        let (out, stdout) = pipe()?;
        let (err, stderr) = pipe()?;
        let (stdin, sink) = if stdin {
            let (reader, writer) = pipe()?;
            (reader, Some(writer))
        } else {
            (std::fs::File::open("/dev/null")?.into(), None)
        };
        Ok(Self {
            stdin,
            stdout,
            stderr,
            sink,
            out,
            err,
        })
    }

    /// Returns the process's ends in the order 0, 1, 2.
    pub(crate) fn process_ends(&self) -> [BorrowedFd<'_>; 3] {
        [self.stdin.as_fd(), self.stdout.as_fd(), self.stderr.as_fd()]
    }

    /// Makes the user the owner, so that it can reopen /dev/stdout.
    pub(crate) fn give_to(&self, uid: u32) {
        for end in [&self.stdin, &self.stdout, &self.stderr] {
            // /dev/null is skipped; it is open to all users.
            let is_pipe = rustix::fs::fstat(end).is_ok_and(|stat| {
                rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Fifo
            });
            if is_pipe {
                let _ = nix::unistd::fchown(end, Some(nix::unistd::Uid::from_raw(uid)), None);
            }
        }
    }

    /// Closes the process's ends and returns the agent's. `closes`: an EOF closes the input.
    pub(crate) fn into_agent_ends(self, closes: bool) -> io::Result<AgentEnds> {
        let sink = self
            .sink
            .map(AsyncDescriptor::new)
            .transpose()?
            .map(Arc::new);
        Ok(AgentEnds {
            input: Input::new(sink, false, closes),
            sources: vec![
                (OutputStream::Stdout, AsyncDescriptor::new(self.out)?),
                (OutputStream::Stderr, AsyncDescriptor::new(self.err)?),
            ],
            terminal: None,
        })
    }
}

/// Returns the agent's ends of a terminal, from its master.
pub(crate) fn terminal_ends(master: OwnedFd, stdin: bool, closes: bool) -> io::Result<AgentEnds> {
    let reader = AsyncDescriptor::new(master.try_clone()?)?;
    let terminal = Arc::new(AsyncDescriptor::new(master)?);
    Ok(AgentEnds {
        input: Input::new(stdin.then(|| Arc::clone(&terminal)), true, closes),
        sources: vec![(OutputStream::Stdout, reader)],
        terminal: Some(terminal),
    })
}
