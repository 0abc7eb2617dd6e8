//! Reports OOM kills of a container's processes when they happen, before its init process ends.
//!
//! The kernel notifies pollers of `memory.events` with EPOLLPRI. This module only counts; [`super::create`] and
//! [`super::exec`] decide whether an exit was caused by an OOM kill. One task per container, owned by the agent's
//! task tracker, runs until the init process ends.

use super::Container;
use super::context::PodContext;
use crate::cgroup::stats;
use crate::descriptor::AsyncDescriptor;
use std::fs::File;
use std::io;
use std::sync::Arc;

/// Size of the buffer for `memory.events`, which has a handful of short lines.
const BUFFER_BYTES: usize = 4 << 10;

/// Watches until the init process of `container` ends. Without the memory controller there is nothing to watch.
pub(crate) async fn watch(container: Arc<Container>, context: Arc<PodContext>) {
    tokio::select! {
        result = follow(&container, &context) => {
            if let Err(error) = result
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(container = container.id, %error, "failed to watch memory.events");
            }
        }
        // The last kills are reported with the exit.
        _ = container.init.wait() => {}
    }
}

async fn follow(container: &Container, context: &PodContext) -> io::Result<()> {
    let file = File::open(container.cgroup.path().join("memory.events"))?;
    let events = AsyncDescriptor::notifying(file.into())?;
    loop {
        // Reading arms the notification; done before the wait, so that no kill is missed in between.
        let mut bytes = [0; BUFFER_BYTES];
        let count = rustix::io::pread(events.get(), &mut bytes, 0)?;
        let text = String::from_utf8_lossy(&bytes[..count]);
        container.emit_oom(context, stats::oom_kills_in(&text));
        events.changed().await?;
    }
}
