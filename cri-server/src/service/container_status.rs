//! ContainerStatus: from memory, never from a VM.

use super::{Server, present, refused};
use crate::convert::status;
use boxlite_proto::cri::v1::{ContainerStatusRequest, ContainerStatusResponse};
use serde_json::json;
use std::collections::HashMap;
use tonic::Status;

/// The call.
pub fn status(
    server: &Server,
    request: &ContainerStatusRequest,
) -> Result<ContainerStatusResponse, Status> {
    present("container_id", &request.container_id)?;
    let (_, container) = server
        .runtime
        .find_container(&request.container_id)
        .map_err(refused)?;
    let mut info = HashMap::new();
    if request.verbose {
        let details = json!({
            "sandboxID": container.box_id,
            "imageID": container.image_id,
            "tty": container.tty,
            "stdin": container.stdin,
        });
        info.insert("info".to_owned(), details.to_string());
    }
    Ok(ContainerStatusResponse {
        status: Some(status::container_status(
            &container,
            server.updates.get(&container.id),
        )),
        info,
    })
}
