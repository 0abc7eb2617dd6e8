//! [`Detail`]: a minimal subscriber that forwards libcontainer's error logs to the agent while a container is
//! created.
//!
//! libcontainer's processes pass only the outermost message on ("failed to prepare rootfs"); the rejected mount and
//! its errno appear only in the log. The subscriber is installed in the *create* helper and inherited by its clones
//! up to the exec.

use super::wire::{self, Message};
use std::fmt::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Maximum length of a detail, in bytes.
const MAX_DETAIL_BYTES: usize = 1024;

/// Sends every error event to the agent.
pub(crate) struct Detail {
    reply: OwnedFd,
}

impl Detail {
    /// Makes this process, and those cloned from it, report on `reply`.
    pub(crate) fn install(reply: OwnedFd) {
        // The helper has no subscriber; if it had one, only details would be lost.
        let _ = tracing::subscriber::set_global_default(Self { reply });
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
        let _ = wire::send(self.reply.as_fd(), &Message::Detail(text.0), None);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
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
