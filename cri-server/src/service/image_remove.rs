//! RemoveImage. Succeeds if the image does not exist; an image in use is kept, and the error names its users.

use super::{Server, require};
use crate::convert::image;
use boxlite_proto::cri::v1::{RemoveImageRequest, RemoveImageResponse};
use tonic::Status;

/// Handles RemoveImage.
pub(crate) async fn remove(
    server: &Server,
    request: RemoveImageRequest,
) -> Result<RemoveImageResponse, Status> {
    let wanted = request.image.unwrap_or_default().image;
    require("image.image", &wanted)?;
    server
        .runtime
        .images()
        .remove(&wanted)
        .await
        .map_err(|error| image::status(&error))?;
    Ok(RemoveImageResponse {})
}
