//! Implements the ImageService trait by delegating each call to its file.

use super::streams::{Stream, batches};
use super::{Server, image_fs, image_list, image_pull, image_remove, image_status};
use boxlite_proto::cri::v1::image_service_server::ImageService;
use boxlite_proto::cri::v1::*;
use tonic::{Request, Response, Status};

#[tonic::async_trait]
impl ImageService for Server {
    async fn list_images(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let images = image_list::list(self, request.into_inner().filter);
        Ok(Response::new(ListImagesResponse { images }))
    }

    type StreamImagesStream = Stream<StreamImagesResponse>;

    async fn stream_images(
        &self,
        request: Request<StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let images = image_list::list(self, request.into_inner().filter);
        Ok(batches(images, |images| StreamImagesResponse { images }))
    }

    async fn image_status(
        &self,
        request: Request<ImageStatusRequest>,
    ) -> Result<Response<ImageStatusResponse>, Status> {
        image_status::status(self, request.into_inner()).map(Response::new)
    }

    async fn pull_image(
        &self,
        request: Request<PullImageRequest>,
    ) -> Result<Response<PullImageResponse>, Status> {
        image_pull::pull(self, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn remove_image(
        &self,
        request: Request<RemoveImageRequest>,
    ) -> Result<Response<RemoveImageResponse>, Status> {
        image_remove::remove(self, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn image_fs_info(
        &self,
        _: Request<ImageFsInfoRequest>,
    ) -> Result<Response<ImageFsInfoResponse>, Status> {
        image_fs::info(self).await.map(Response::new)
    }
}
