//! ImageStatus. For an image that is not found locally, the response has no image; it is not an error.

use super::{Server, require};
use crate::convert::image;
use boxlite_proto::cri::v1::{ImageStatusRequest, ImageStatusResponse};
use serde_json::json;
use std::collections::HashMap;
use tonic::Status;

/// Handles ImageStatus.
pub(crate) fn status(
    server: &Server,
    request: ImageStatusRequest,
) -> Result<ImageStatusResponse, Status> {
    let wanted = request.image.unwrap_or_default().image;
    require("image.image", &wanted)?;
    let Some(record) = server.runtime.images().status(&wanted) else {
        return Ok(ImageStatusResponse::default());
    };
    let mut info = HashMap::new();
    if request.verbose {
        let details = json!({"layers": record.layers, "imageSpec": record.config.as_ref()});
        info.insert("info".to_owned(), details.to_string());
    }
    Ok(ImageStatusResponse {
        image: Some(image::image(&record)),
        info,
    })
}
