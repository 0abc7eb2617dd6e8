//! The ImageService of both image stores.

use super::Router;
use super::image_stores::merge;
use crate::service::streams::{Stream, batches};
use boxlite_proto::cri::v1::image_service_server::ImageService;
use boxlite_proto::cri::v1::*;
use std::os::unix::fs::MetadataExt;
use tonic::{Request, Response, Status};

#[tonic::async_trait]
impl ImageService for Router {
    async fn list_images(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let images = self.images(request.into_inner()).await?;
        Ok(Response::new(ListImagesResponse { images }))
    }

    type StreamImagesStream = Stream<StreamImagesResponse>;

    async fn stream_images(
        &self,
        request: Request<StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let filter = request.into_inner().filter;
        let images = self.images(ListImagesRequest { filter }).await?;
        Ok(batches(images, |images| StreamImagesResponse { images }))
    }

    /// An image of either store is found, except one that the other store needs and could not get.
    async fn image_status(
        &self,
        request: Request<ImageStatusRequest>,
    ) -> Result<Response<ImageStatusResponse>, Status> {
        let request = request.into_inner();
        let ours = self.server.image_status(Request::new(request.clone()));
        let mut answer = ours.await?.into_inner();
        if let Some(host) = &self.host {
            let mut images = host.client.images();
            let theirs = host.client.merged(images.image_status(request)).await;
            if let Ok(theirs) = theirs
                && theirs.image.is_some()
            {
                let both = merge(
                    answer.image.into_iter().collect(),
                    theirs.image.into_iter().collect(),
                );
                answer.image = both.into_iter().next();
                if answer.info.is_empty() {
                    answer.info = theirs.info;
                }
            }
            let missing = host.missing_images.lock();
            if answer
                .image
                .as_ref()
                .is_some_and(|image| missing.contains(&image.id))
            {
                answer = ImageStatusResponse::default();
            }
        }
        Ok(Response::new(answer))
    }

    async fn pull_image(
        &self,
        request: Request<PullImageRequest>,
    ) -> Result<Response<PullImageResponse>, Status> {
        let Some(host) = &self.host else {
            return self.server.pull_image(request).await;
        };
        let answer = if self.is_pulled_by_host(request.get_ref()) {
            let answer = host.client.images().pull_image(request.into_inner()).await;
            host.client.checked(answer)?
        } else {
            self.server.pull_image(request).await?
        };
        host.missing_images
            .lock()
            .remove(&answer.get_ref().image_ref);
        Ok(answer)
    }

    /// Removes the image from both stores. While containerd is down, an image that was in this runtime's store is removed
    /// there; the next list shows the other copy again.
    async fn remove_image(
        &self,
        request: Request<RemoveImageRequest>,
    ) -> Result<Response<RemoveImageResponse>, Status> {
        let Some(host) = &self.host else {
            return self.server.remove_image(request).await;
        };
        let request = request.into_inner();
        let status = ImageStatusRequest {
            image: request.image.clone(),
            verbose: false,
        };
        let ours = self.server.image_status(Request::new(status)).await?;
        self.server
            .remove_image(Request::new(request.clone()))
            .await?;
        let ours = ours.into_inner().image;
        let named = request.image.clone().unwrap_or_default().image;
        let id = ours.as_ref().map_or(named, |image| image.id.clone());
        host.missing_images.lock().remove(&id);
        let theirs = host.client.images().remove_image(request).await;
        match host.client.checked(theirs) {
            Ok(answer) => Ok(answer),
            Err(error) if ours.is_some() => {
                tracing::warn!(%error, "failed to remove the host pods' copy of an image");
                Ok(Response::new(RemoveImageResponse {}))
            }
            Err(error) => Err(error),
        }
    }

    async fn image_fs_info(
        &self,
        request: Request<ImageFsInfoRequest>,
    ) -> Result<Response<ImageFsInfoResponse>, Status> {
        let mut answer = self.server.image_fs_info(request).await?;
        if let Some(host) = &self.host {
            let mut images = host.client.images();
            let theirs = images.image_fs_info(ImageFsInfoRequest {});
            if let Ok(theirs) = host.client.merged(theirs).await {
                let ours = answer.get_mut();
                add_usage(&mut ours.image_filesystems, theirs.image_filesystems);
                add_usage(
                    &mut ours.container_filesystems,
                    theirs.container_filesystems,
                );
            }
        }
        Ok(answer)
    }
}

impl Router {
    async fn images(&self, request: ListImagesRequest) -> Result<Vec<Image>, Status> {
        let ours = self.server.list_images(Request::new(request.clone()));
        let ours = ours.await?.into_inner().images;
        let Some(host) = &self.host else {
            return Ok(ours);
        };
        let mut images = host.client.images();
        let theirs = host.client.merged(images.list_images(request)).await;
        Ok(merge(ours, theirs.unwrap_or_default().images))
    }
}

/// Adds containerd's usage to this runtime's: on one file system as a sum, since the kubelet reads the first entry only, and
/// on another one as a further entry.
fn add_usage(ours: &mut Vec<FilesystemUsage>, theirs: Vec<FilesystemUsage>) {
    for usage in theirs {
        let device = device_of(&usage);
        match ours.iter_mut().find(|known| device_of(known) == device) {
            Some(known) if device.is_some() => {
                known.used_bytes = sum(known.used_bytes, usage.used_bytes);
                known.inodes_used = sum(known.inodes_used, usage.inodes_used);
            }
            _ => ours.push(usage),
        }
    }
}

fn sum(a: Option<UInt64Value>, b: Option<UInt64Value>) -> Option<UInt64Value> {
    let value = |v: Option<UInt64Value>| v.map_or(0, |v| v.value);
    let value = value(a).saturating_add(value(b));
    Some(UInt64Value { value })
}

/// Returns the device of a usage's directory.
fn device_of(usage: &FilesystemUsage) -> Option<u64> {
    let path = &usage.fs_id.as_ref()?.mountpoint;
    Some(std::fs::metadata(path).ok()?.dev())
}
