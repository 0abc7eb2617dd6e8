//! The two image stores as one: containerd's and this runtime's.
//!
//! An image is pulled on the side of the pod that needs it. If a pod of the other side uses it later, CreateContainer pulls it
//! there by digest, without credentials, which no call brings. If the registry refuses that, the image is reported as missing
//! until the kubelet has pulled it again, with credentials (docs/decisions/0031-host-pods.md).

use super::Router;
use super::error::HostPodsError;
use super::lookup::Side;
use crate::service::sandbox_list;
use boxlite_proto::cri::v1::image_service_server::ImageService;
use boxlite_proto::cri::v1::{
    CreateContainerRequest, Image, ImageSpec, ImageStatusRequest, ImageStatusResponse,
    PodSandboxConfig, PullImageRequest,
};
use std::collections::BTreeMap;
use tonic::{Request, Status};

impl Router {
    /// Pulls the images of a container that only the other side has, and replaces their references by ids.
    pub(super) async fn provide_images(
        &self,
        side: &Side,
        request: &mut CreateContainerRequest,
    ) -> Result<(), Status> {
        let pod = request.sandbox_config.clone();
        let Some(config) = &mut request.config else {
            return Ok(());
        };
        let volumes = config
            .mounts
            .iter_mut()
            .filter_map(|mount| mount.image.as_mut());
        for image in config.image.iter_mut().chain(volumes) {
            self.provide(side, image, pod.as_ref()).await?;
        }
        Ok(())
    }

    async fn provide(
        &self,
        side: &Side,
        image: &mut ImageSpec,
        pod: Option<&PodSandboxConfig>,
    ) -> Result<(), Status> {
        if image.image.is_empty() || self.image_of(side, image).await?.is_some() {
            return Ok(());
        }
        let other = match side {
            Side::Vm => self
                .host_image(image)
                .await
                .ok()
                .and_then(|answer| answer.image),
            Side::Host(..) => self.image_of(&Side::Vm, image).await?,
        };
        // In neither store: the creation's own error says so.
        let Some(other) = other else { return Ok(()) };
        let missing = |reason: String| {
            if let Some(host) = &self.host {
                host.missing_images.lock().insert(other.id.clone());
            }
            let reference = image.image.clone();
            Status::from(HostPodsError::Image { reference, reason })
        };
        let Some(digest) = other.repo_digests.first().or(other.repo_tags.first()) else {
            return Err(missing("it has no name in a registry".into()));
        };
        tracing::info!(
            image = digest,
            id = other.id,
            "pulling the image for the other image store"
        );
        let pull = PullImageRequest {
            image: Some(ImageSpec {
                image: digest.clone(),
                ..image.clone()
            }),
            auth: None,
            sandbox_config: pod.cloned(),
        };
        let pulled = match side {
            Side::Vm => self.server.pull_image(Request::new(pull)).await,
            Side::Host(host, _) => {
                let mut images = host.client.images();
                let pulled = images.pull_image(pull);
                host.client.within(host.limits.pull, pulled).await
            }
        };
        match pulled {
            Ok(_) => {
                image.image = other.id;
                Ok(())
            }
            Err(status) => Err(missing(status.message().to_owned())),
        }
    }

    async fn image_of(&self, side: &Side, image: &ImageSpec) -> Result<Option<Image>, Status> {
        let answer = match side {
            Side::Vm => {
                let request = ImageStatusRequest {
                    image: Some(image.clone()),
                    verbose: false,
                };
                let answer = self.server.image_status(Request::new(request)).await?;
                answer.into_inner()
            }
            Side::Host(..) => self.host_image(image).await?,
        };
        Ok(answer.image)
    }

    async fn host_image(&self, image: &ImageSpec) -> Result<ImageStatusResponse, Status> {
        let Some(host) = &self.host else {
            return Ok(ImageStatusResponse::default());
        };
        let request = ImageStatusRequest {
            image: Some(image.clone()),
            verbose: false,
        };
        let mut images = host.client.images();
        host.client.merged(images.image_status(request)).await
    }

    /// Returns whether the image of a pull belongs into containerd's store: the pod runs there, or will.
    pub(super) fn is_pulled_by_host(&self, request: &PullImageRequest) -> bool {
        let Some(host) = &self.host else { return false };
        let Some(config) = &request.sandbox_config else {
            return false;
        };
        let Some(metadata) = &config.metadata else {
            return false;
        };
        let image = request.image.clone().unwrap_or_default();
        let vms = sandbox_list::list(&self.server, None);
        if vms
            .iter()
            .any(|pod| pod.metadata.as_ref() == Some(metadata))
        {
            return false;
        }
        host.table.has_pod(metadata) || host.rules.select(config, &image.runtime_handler).is_some()
    }
}

/// Merges the lists of both stores: an image in both has one entry, with its names and its size in both.
pub(super) fn merge(ours: Vec<Image>, theirs: Vec<Image>) -> Vec<Image> {
    let mut images: BTreeMap<String, Image> = BTreeMap::new();
    for image in ours.into_iter().chain(theirs) {
        match images.get_mut(&image.id) {
            None => drop(images.insert(image.id.clone(), image)),
            Some(known) => {
                known.repo_tags = union(&known.repo_tags, image.repo_tags);
                known.repo_digests = union(&known.repo_digests, image.repo_digests);
                known.size = known.size.saturating_add(image.size);
                known.pinned |= image.pinned;
            }
        }
    }
    images.into_values().collect()
}

fn union(known: &[String], more: Vec<String>) -> Vec<String> {
    let new = more.into_iter().filter(|name| !known.contains(name));
    known.iter().cloned().chain(new).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merge_joins_names_and_sizes_of_one_id() {
        let image = |id: &str, tags: &[&str], size, pinned| Image {
            id: id.into(),
            repo_tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
            repo_digests: vec![format!("r@{id}")],
            size,
            pinned,
            ..Default::default()
        };
        let merged = merge(
            vec![
                image("a", &["x:1"], 5, false),
                image("b", &["y:1"], 1, false),
            ],
            vec![
                image("a", &["x:1", "x:2"], 7, true),
                image("c", &[], 2, true),
            ],
        );
        let expected = [
            image("a", &["x:1", "x:2"], 12, true),
            image("b", &["y:1"], 1, false),
            image("c", &[], 2, true),
        ];
        assert_eq!(merged, expected);
    }
}
