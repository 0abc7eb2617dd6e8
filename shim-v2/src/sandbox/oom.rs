//! Follows the guest's event stream for OOM kills and forwards them to the container's task, which publishes TaskOOM.
//!
//! Exits are awaited per process in [`crate::container::process`].

use crate::container::Containers;
use crate::pod::Guest;
use boxlite_portal::PortalError;
use boxlite_proto::boxlite::v1::container_event::Event;
use boxlite_sys::report::Report;
use std::sync::Arc;
use std::time::Duration;

/// Delay before a broken event stream is reopened.
const RECONNECT_DELAY: Duration = Duration::from_secs(1);

/// Follows the events until the VM ends. Runs in the shim's task tracker.
pub async fn follow(guest: Guest, containers: Arc<Containers>) {
    let mut from = 0;
    loop {
        let result = tokio::select! {
            result = until_broken(&guest, &containers, &mut from) => result,
            () = guest.ended.cancelled() => return,
        };
        if let Err(error) = result {
            tracing::debug!(error = %Report(&error), "guest event stream broke; reconnecting");
        }
        tokio::select! {
            () = tokio::time::sleep(RECONNECT_DELAY) => {}
            () = guest.ended.cancelled() => return,
        }
    }
}

async fn until_broken(
    guest: &Guest,
    containers: &Containers,
    from: &mut u64,
) -> Result<(), PortalError> {
    let mut events = guest.session.container().events(*from).await?;
    while let Some(event) = events
        .message()
        .await
        .map_err(|status| PortalError::from_status("Container.Events", status))?
    {
        *from = event.sequence.saturating_add(1);
        if let Some(Event::Oom(_)) = event.event
            && let Ok(container) = containers.get(&event.container_id)
        {
            container.init.oom().await;
        }
    }
    Ok(())
}
