//! CreateContainer: resolves the image, builds the spec, applies plugin adjustments, and creates the container. A
//! retry joins the call in progress.

use super::error::{ServiceError, create_status};
use super::{Server, new_id, nri_hooks, require};
use crate::convert::{ConvertError, container};
use boxlite_proto::cri::v1::{ContainerConfig, CreateContainerRequest, CreateContainerResponse};
use boxlite_proto::nri::v1alpha1::Event;
use boxlite_runtime::{BoxState, LiteBox};
use boxlite_telemetry::span::set_current;
use std::path::Path;
use tonic::Status;

/// Handles CreateContainer.
pub(crate) async fn create(
    server: &Server,
    request: CreateContainerRequest,
) -> Result<CreateContainerResponse, Status> {
    require("pod_sandbox_id", &request.pod_sandbox_id)?;
    let config = request.config.ok_or(ConvertError::Missing("config"))?;
    container::validate(&config)?;
    let pod = server.pod(&request.pod_sandbox_id)?;
    if let Some(metadata) = &config.metadata {
        set_current("k8s.container.name", &metadata.name);
    }
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
        let id = pod.id().to_owned();
        return Err(ServiceError::PodNotReady { id, state }.into());
    }
    let key = container::key(&config);
    if let Some(present) = pod
        .containers()
        .into_iter()
        .find(|container| container.name == key)
    {
        let id = present.id;
        return Err(ServiceError::ContainerExists { name: key, id }.into());
    }
    let reference = config.image.clone().unwrap_or_default().image;
    let images = server.runtime.images();
    let image = images
        .status(&reference)
        .ok_or(ServiceError::ImageNotFound { reference })?;
    name_image_volumes(server, &mut config)?;
    let id = new_id();
    let files = server.layout.pod(pod.id());
    let record = server.pod_metadata(pod);
    let options = container::options(&id, pod.id(), &record, config.clone(), &image, &files)?;
    if let Some(directory) = options.log_path.as_deref().and_then(Path::parent) {
        // As containerd does; the log path may have directories that do not exist yet.
        std::fs::create_dir_all(directory).map_err(|source| ServiceError::LogDirectory {
            name: key,
            path: directory.to_owned(),
            source,
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
        let volumes = &server.metrics.shared_volumes;
        volumes.add(&pod, &config, |id| server.pod(id).is_ok());
    });
}

/// Replaces the reference of each image mount with the image's ID, so that the mounted image is the one that was
/// resolved, and the status reports it.
fn name_image_volumes(server: &Server, config: &mut ContainerConfig) -> Result<(), ServiceError> {
    for mount in &mut config.mounts {
        let Some(reference) = container::image_volume(mount) else {
            continue;
        };
        let image = server.runtime.images().status(&reference).ok_or_else(|| {
            ServiceError::ImageVolumeNotFound {
                reference,
                container_path: mount.container_path.clone(),
            }
        })?;
        if let Some(spec) = &mut mount.image {
            spec.image_ref = image.id;
        }
    }
    Ok(())
}
