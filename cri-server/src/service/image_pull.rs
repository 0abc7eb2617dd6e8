//! PullImage. A client that goes away cancels its own pull; what was downloaded is used by the next, and others who pull the same layers
//! go on.

use super::{Server, require};
use crate::convert::image;
use boxlite_proto::cri::v1::{PullImageRequest, PullImageResponse};
use boxlite_runtime::images::PullProgress;
use std::time::Duration;
use tokio::sync::watch;
use tonic::Status;

/// How often a pull says in the log how far it is.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// The call. Answers the image's id.
pub async fn pull(server: &Server, request: PullImageRequest) -> Result<PullImageResponse, Status> {
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
        "pulled"
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
        "pulling"
    );
}
