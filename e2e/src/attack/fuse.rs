//! [`Session`]: FUSE requests to the file server of the share, with names and numbers that the guest's kernel would not
//! send. Messages as in the kernel's include/uapi/linux/fuse.h, version 7.31. Runs inside a guest.

use super::device::{ANSWER_BYTES, Device};
use crate::ensure;
use crate::failure::Result;

/// Operations.
pub(super) mod operation {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const IOCTL: u32 = 39;
    pub(crate) const SETUPMAPPING: u32 = 48;
    /// One more than the largest.
    pub(crate) const END: u32 = 53;
}

/// Node of the share's root.
pub(super) const ROOT: u64 = 1;

/// Bytes of the header of a request, and of an answer.
const REQUEST_HEADER: usize = 40;
const ANSWER_HEADER: usize = 16;
/// Offset of the mode in the answer to LOOKUP.
const ENTRY_MODE: usize = 40 + 60;

/// Error of a device that does not answer; larger than every errno.
pub(super) const SILENT: i32 = 100_000;

/// A device whose file server has been initialized.
pub(super) struct Session {
    pub device: Device,
    unique: u64,
}

/// A server's answer, or its errno.
pub(super) type Answer<T> = std::result::Result<T, i32>;

/// A node and its mode.
#[derive(Clone, Copy)]
pub(super) struct Found {
    pub node: u64,
    pub mode: u32,
}

impl Session {
    /// Takes the device and initializes its file server.
    pub(super) fn open(device: Device) -> Result<Self> {
        let mut session = Self { device, unique: 0 };
        session.restart()?;
        Ok(session)
    }

    /// Resets the device and initializes its file server again.
    pub(super) fn restart(&mut self) -> Result {
        self.device.start()?;
        let body = words(&[7, 31, 1 << 16, 0]);
        let answer = self.call(operation::INIT, 0, &body);
        ensure!(answer.is_ok(), "FUSE_INIT: errno {:?}", answer.err());
        Ok(())
    }

    /// Sends a request, and returns the answer after its header.
    ///
    /// # Errors
    /// The server's errno, or [`SILENT`].
    pub(super) fn call(&mut self, operation: u32, node: u64, body: &[u8]) -> Answer<Vec<u8>> {
        let bytes = (REQUEST_HEADER + body.len()) as u32;
        self.call_with(bytes, operation, node, body)
    }

    /// As [`Session::call`], with any length in the header.
    pub(super) fn call_with(
        &mut self,
        bytes: u32,
        operation: u32,
        node: u64,
        body: &[u8],
    ) -> Answer<Vec<u8>> {
        self.unique += 2;
        let mut request = words(&[bytes, operation]);
        request.extend(self.unique.to_le_bytes());
        request.extend(node.to_le_bytes());
        // User, group, process and the length of extensions: all 0.
        request.resize(REQUEST_HEADER, 0);
        request.extend(body);
        self.device.fill(&request);
        let chain = self.device.chain(request.len());
        let written = self.device.submit(&chain, 0).ok_or(SILENT)?;
        let answer = self
            .device
            .answer(written.clamp(ANSWER_HEADER, ANSWER_BYTES));
        let error = i32::from_le_bytes([answer[4], answer[5], answer[6], answer[7]]);
        match error {
            0 => Ok(answer[ANSWER_HEADER..].to_vec()),
            error => Err(-error),
        }
    }

    /// Looks up a name, which may have any bytes.
    pub(super) fn lookup(&mut self, parent: u64, name: &[u8]) -> Answer<Found> {
        let answer = self.call(operation::LOOKUP, parent, &text(name))?;
        Ok(Found {
            node: number(&answer, 0),
            mode: number(&answer, ENTRY_MODE) as u32,
        })
    }

    /// Creates a file.
    pub(super) fn create(&mut self, parent: u64, name: &str) -> Answer<Vec<u8>> {
        // Flags, mode, umask, padding.
        let mut body = words(&[(libc::O_RDWR | libc::O_CREAT) as u32, 0o666, 0, 0]);
        body.extend(text(name.as_bytes()));
        self.call(operation::CREATE, parent, &body)
    }

    /// Returns the target of a link.
    pub(super) fn readlink(&mut self, node: u64) -> Answer<Vec<u8>> {
        self.call(operation::READLINK, node, &[])
    }

    /// Opens a file or directory with open(2)'s flags and returns the handle.
    pub(super) fn open_node(&mut self, operation: u32, node: u64, flags: u32) -> Answer<u64> {
        let answer = self.call(operation, node, &words(&[flags, 0]))?;
        Ok(number(&answer, 0))
    }

    /// Reads up to this number of bytes from the start of a file, or entries of a directory.
    pub(super) fn read(
        &mut self,
        operation: u32,
        node: u64,
        handle: u64,
        bytes: u32,
    ) -> Answer<Vec<u8>> {
        let mut body = handle.to_le_bytes().to_vec();
        // Offset, size, flags, lock owner, flags, padding.
        body.extend(words(&[0, 0, bytes, 0, 0, 0, 0, 0]));
        self.call(operation, node, &body)
    }
}

/// Returns 32-bit numbers as bytes.
pub(super) fn words(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// Returns a name with the byte that ends it.
pub(super) fn text(name: &[u8]) -> Vec<u8> {
    [name, b"\0"].concat()
}

/// Returns the 64-bit number at an offset, 0 beyond the end.
fn number(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    let rest = bytes.get(at..).unwrap_or_default();
    let count = rest.len().min(8);
    value[..count].copy_from_slice(&rest[..count]);
    u64::from_le_bytes(value)
}
