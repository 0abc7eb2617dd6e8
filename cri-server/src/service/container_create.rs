//! CreateContainer: resolves the image, builds the spec, applies plugin adjustments, and creates the container. A
//! retry joins the call in progress.

use super::{Server, new_id, nri_hooks, require, status_of};
use crate::convert::container;
use boxlite_proto::cri::v1::{ContainerConfig, CreateContainerRequest, CreateContainerResponse};
use boxlite_proto::names;
use boxlite_proto::nri::v1alpha1::Event;
use boxlite_runtime::{BoxState, LiteBox, RuntimeError};
use std::path::Path;
use tonic::Status;

/// Prefix of errors of image volumes, by which the kubelet counts them (`ErrImageVolumeMountFailed` of the CRI).
const IMAGE_VOLUME_FAILED: &str = "ImageVolumeMountFailed";

/// Handles CreateContainer.
pub(crate) async fn create(
    server: &Server,
    request: CreateContainerRequest,
) -> Result<CreateContainerResponse, Status> {
    require("pod_sandbox_id", &request.pod_sandbox_id)?;
    let config = request
        .config
        .ok_or_else(|| Status::invalid_argument("config is missing"))?;
    container::validate(&config)?;
    let pod = server.pod(&request.pod_sandbox_id)?;
    let key = format!("{}/{}", pod.id(), container::key(&config));
    let work = || {
        let server = server.clone();
        let config = config.clone();
        async move { make(&server, &pod, config).await }
    };
    let container_id = server
        .creates
        .join(&server.tasks, key, config.clone(), work)
        .await?;
    Ok(CreateContainerResponse { container_id })
}

async fn make(
    server: &Server,
    pod: &LiteBox,
    mut config: ContainerConfig,
) -> Result<String, Status> {
    let state = pod.snapshot().state;
    if state != BoxState::Ready {
        return Err(Status::failed_precondition(format!(
            "pod sandbox {} is not ready ({state:?})",
            pod.id()
        )));
    }
    let key = container::key(&config);
    if let Some(present) = pod
        .containers()
        .into_iter()
        .find(|container| container.name == key)
    {
        return Err(Status::already_exists(format!(
            "container {key:?} already exists with id {}",
            present.id
        )));
    }
    let reference = config.image.clone().unwrap_or_default().image;
    let images = server.runtime.images();
    let image = images
        .status(&reference)
        .ok_or_else(|| Status::not_found(format!("image {reference:?} not found")))?;
    name_image_volumes(server, &mut config)?;
    let id = new_id();
    let files = server.layout.pod(pod.id());
    let record = server.pod_metadata(pod);
    let options = container::options(&id, pod.id(), &record, config.clone(), &image, &files)?;
    if let Some(directory) = options.log_path.as_deref().and_then(Path::parent) {
        // As containerd does; the log path may have directories that do not exist yet.
        std::fs::create_dir_all(directory).map_err(|error| {
            Status::internal(format!(
                "failed to create log directory {}: {error}",
                directory.display()
            ))
        })?;
    }
    let session = server.session().await;
    let options = nri_hooks::create(server, &session, pod, &config, options).await?;
    if let Err(error) = pod.create_container(options).await {
        nri_hooks::undo_create(server, &session, pod, &id, &config).await;
        return Err(create_status(error));
    }
    nri_hooks::notify_container(server, &session, Event::PostCreateContainer, pod, &id).await;
    note_shared_volumes(server, pod.id(), config);
    Ok(id)
}

/// Warns of directories that other pods mount with write access, too. Detached: a host path may not answer, and nothing
/// waits for the warning.
fn note_shared_volumes(server: &Server, pod: &str, config: ContainerConfig) {
    let (server, pod) = (server.clone(), pod.to_owned());
    tokio::task::spawn_blocking(move || {
        let volumes = &server.shared_volumes;
        volumes.add(&pod, &config, |id| server.pod(id).is_ok());
    });
}

/// Replaces the reference of each image mount with the image's ID, so that the mounted image is the one that was
/// resolved, and the status reports it.
fn name_image_volumes(server: &Server, config: &mut ContainerConfig) -> Result<(), Status> {
    for mount in &mut config.mounts {
        let Some(reference) = container::image_volume(mount) else {
            continue;
        };
        let image = server.runtime.images().status(&reference).ok_or_else(|| {
            Status::not_found(format!(
                "{IMAGE_VOLUME_FAILED}: image {reference:?} of the mount at {:?} not found",
                mount.container_path
            ))
        })?;
        if let Some(spec) = &mut mount.image {
            spec.image_ref = image.id;
        }
    }
    Ok(())
}

/// Returns the status of a failed creation, with the CRI's prefix if an image volume could not be mounted.
fn create_status(error: RuntimeError) -> Status {
    let status = status_of(error);
    if status.message().contains(names::IMAGE_SUB_PATH_STEP) {
        let message = format!("{IMAGE_VOLUME_FAILED}: {}", status.message());
        return Status::new(status.code(), message);
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_image_sub_path_gets_the_prefix_of_the_cri() {
        let error = |reason: &str| RuntimeError::BoxGone {
            id: "p".into(),
            reason: reason.into(),
        };
        let missing = format!(
            "{} x/y: No such file or directory",
            names::IMAGE_SUB_PATH_STEP
        );
        let status = create_status(error(&missing));
        assert!(status.message().starts_with("ImageVolumeMountFailed: "));
        assert!(status.message().contains("x/y"));
        assert!(
            !create_status(error("other"))
                .message()
                .contains("ImageVolume")
        );
    }
}
