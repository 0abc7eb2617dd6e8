//! ListImages and StreamImages.

use super::Server;
use crate::convert::image;
use boxlite_proto::cri::v1::{Image, ImageFilter};

/// Returns all images, or the one that the filter names.
pub(crate) fn list(server: &Server, filter: Option<ImageFilter>) -> Vec<Image> {
    let wanted = filter
        .and_then(|filter| filter.image)
        .unwrap_or_default()
        .image;
    let records = if wanted.is_empty() {
        server.runtime.images().list()
    } else {
        server
            .runtime
            .images()
            .status(&wanted)
            .into_iter()
            .collect()
    };
    records.iter().map(image::image).collect()
}
