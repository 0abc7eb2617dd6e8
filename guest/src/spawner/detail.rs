//! [`Detail`]: a minimal subscriber that forwards libcontainer's error logs to the agent while a container is
//! created.
//!
//! libcontainer's processes pass only the outermost message on ("failed to prepare rootfs"); the rejected mount and
//! its errno appear only in the log. The subscriber is installed in the *create* helper and inherited by its clones
//! up to the exec. An invalid working directory, which only its chdir shows, is reported as a typed failure.

use super::executable::errno_text;
use super::wire::{self, Failure, FailureKind, Message};
use nix::errno::Errno;
use std::fmt::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Maximum length of a detail, in bytes.
const MAX_DETAIL_BYTES: usize = 1024;

/// Beginning of libcontainer's messages about the working directory.
const CHDIR_FAILED: &str = "failed to chdir";

/// Sends every error event to the agent.
pub(crate) struct Detail {
    reply: OwnedFd,
    working_dir: PathBuf,
}

impl Detail {
    /// Makes this process, and those cloned from it, report on `reply`.
    pub(crate) fn install(reply: OwnedFd, working_dir: PathBuf) {
        // The helper has no subscriber; if it had one, only details would be lost.
        let _ = tracing::subscriber::set_global_default(Self { reply, working_dir });
    }
}

impl Subscriber for Detail {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        let end = (0..=MAX_DETAIL_BYTES.min(text.0.len()))
            .rev()
            .find(|end| text.0.is_char_boundary(*end))
            .unwrap_or(0);
        text.0.truncate(end);
        let message = match chdir_failure(&text.0, &self.working_dir) {
            Some(failure) => Message::Failed(failure),
            None => Message::Detail(text.0),
        };
        let _ = wire::send(self.reply.as_fd(), &message, None);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Returns the failure that the text of an event describes, if it is that of the chdir to the working directory.
fn chdir_failure(text: &str, working_dir: &Path) -> Option<Failure> {
    let fields = text.strip_prefix(CHDIR_FAILED)?;
    let name = fields
        .split_whitespace()
        .find_map(|field| field.strip_prefix("err=").or(field.strip_prefix("e=")))
        .unwrap_or_default();
    let known = [Errno::ENOTDIR, Errno::ENOENT, Errno::EACCES, Errno::ELOOP];
    let errno = known.into_iter().find(|errno| format!("{errno:?}") == name);
    let reason = errno.map_or_else(|| name.to_owned(), errno_text);
    Some(Failure::new(
        FailureKind::InvalidArgument,
        format!("invalid working_dir: {}: {reason}", working_dir.display()),
    ))
}

/// The message of an event, followed by its fields.
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let separator = if self.0.is_empty() { "" } else { " " };
        let _ = if field.name() == "message" {
            write!(self.0, "{separator}{value:?}")
        } else {
            write!(self.0, "{separator}{}={value:?}", field.name())
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_chdir_is_an_invalid_working_dir() {
        let failure = |text| chdir_failure(text, Path::new("/w")).map(|failure| failure.message);
        for (text, reason) in [
            ("failed to chdir e=ENOTDIR", "not a directory"),
            (
                "failed to chdir to cwd err=EACCES cwd=\"/w\"",
                "permission denied",
            ),
            ("failed to chdir e=EIO", "EIO"),
        ] {
            let expected = format!("invalid working_dir: /w: {reason}");
            assert_eq!(failure(text), Some(expected), "{text}");
        }
        assert_eq!(failure("failed to mount"), None);
    }
}
