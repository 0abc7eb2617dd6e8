//! [`Boot`]: behavior of the agent until its pod is set up. The test appends it to the program's file, since the host passes
//! nothing to an agent before `Guest.Init`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

/// Marks the name of the mode at the end of the file.
const MARK: &str = "\nboxlite-boot:";
/// Maximum length of the mark and the name, in bytes.
const MAX_TRAILER_BYTES: i64 = 64;

/// Behavior of the agent until its pod is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Boot {
    /// Never reports readiness.
    Silent,
    /// Reports readiness and sends noise on each connection without end.
    Noise,
    /// Reports readiness and opens each HTTP/2 connection correctly, then sends pings without end.
    Pings,
    /// Serves the guest protocol.
    Serve,
}

impl Boot {
    /// Reads the mode from the end of this program's file; `Serve` by default.
    pub(crate) fn of_this_program() -> Self {
        match trailer().as_deref() {
            Some("silent") => Self::Silent,
            Some("noise") => Self::Noise,
            Some("pings") => Self::Pings,
            _ => Self::Serve,
        }
    }
}

/// Returns the name after [`MARK`]. The path is that of the first argument, since /proc is not mounted.
fn trailer() -> Option<String> {
    let mut file = File::open(std::env::args_os().next()?).ok()?;
    file.seek(SeekFrom::End(-MAX_TRAILER_BYTES)).ok()?;
    let mut end = Vec::new();
    file.read_to_end(&mut end).ok()?;
    let end = String::from_utf8_lossy(&end).into_owned();
    Some(end.rsplit_once(MARK)?.1.trim().to_owned())
}
