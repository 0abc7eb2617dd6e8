//! Tells OOM kills of a container's processes when they happen, not only when its init process ends.
//!
//! The kernel notifies pollers of `memory.events` with EPOLLPRI. What an OOM kill means for an exit is said by
//! [`super::create`] and [`super::exec`]; this only counts. One task per container, owned by the agent's tracker, ends
//! with the init process.

use super::Container;
use super::pod::Pod;
use crate::cgroup::stats;
use crate::descriptor::AsyncDescriptor;
use std::fs::File;
use std::io;
use std::sync::Arc;

/// Bytes of `memory.events` read at once; it is a handful of short lines.
const FILE_LIMIT: usize = 4 << 10;

/// Watches until the init process of `container` has ended. A kernel without the memory controller has nothing to watch.
pub async fn watch(container: Arc<Container>, pod: Arc<Pod>) {
    tokio::select! {
        result = follow(&container, &pod) => {
            if let Err(error) = result
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(container = container.id, %error, "memory.events is not watched");
            }
        }
        // What came last is told with the exit.
        _ = container.init.wait() => {}
    }
}

async fn follow(container: &Container, pod: &Pod) -> io::Result<()> {
    let file = File::open(container.cgroup.path().join("memory.events"))?;
    let events = AsyncDescriptor::notifying(file.into())?;
    loop {
        // Reading arms the notification, so it comes before the wait: no kill falls between the two.
        let mut bytes = [0; FILE_LIMIT];
        let count = rustix::io::pread(events.get(), &mut bytes, 0)?;
        let text = String::from_utf8_lossy(&bytes[..count]);
        container.tell_oom(pod, stats::oom_kills_in(&text));
        events.changed().await?;
    }
}
