//! PullImage. A disconnecting client cancels its pull; the next pull reuses the downloaded data, and other pulls of
//! the same layers continue.

use super::{Server, require};
use crate::convert::image;
use boxlite_proto::cri::v1::{PullImageRequest, PullImageResponse};
use boxlite_runtime::images::PullProgress;
use std::time::Duration;
use tokio::sync::watch;
use tonic::Status;

/// Interval of the progress log.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// Handles PullImage. Returns the image's id.
pub(crate) async fn pull(
    server: &Server,
    request: PullImageRequest,
) -> Result<PullImageResponse, Status> {
    let reference = request.image.unwrap_or_default().image;
    require("image.image", &reference)?;
    let (sender, receiver) = watch::channel(PullProgress::default());
    let images = server.runtime.images();
    let pulled = images.pull(&reference, image::auth(request.auth), Some(sender));
    tokio::pin!(pulled);
    let mut tick = tokio::time::interval_at(
        tokio::time::Instant::now() + REPORT_INTERVAL,
        REPORT_INTERVAL,
    );
    let record = loop {
        tokio::select! {
            done = &mut pulled => break done.map_err(|error| image::status(&error))?,
            _ = tick.tick() => report(&reference, &receiver.borrow()),
        }
    };
    tracing::info!(
        reference,
        id = record.id,
        bytes = record.size_bytes,
        layers = record.layers.len(),
        "image pulled"
    );
    Ok(PullImageResponse {
        image_ref: record.id,
    })
}

fn report(reference: &str, progress: &PullProgress) {
    let received: u64 = progress
        .layers
        .iter()
        .map(|layer| layer.received_bytes)
        .sum();
    let total: u64 = progress.layers.iter().map(|layer| layer.total_bytes).sum();
    tracing::info!(
        reference,
        received,
        total,
        layers = progress.layers.len(),
        "pulling image"
    );
}
