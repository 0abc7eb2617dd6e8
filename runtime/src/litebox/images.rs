//! Images of a container: its root image and its image volumes. They are held while the container exists, and their layer
//! files are put into its spec.
//!
//! Mounts nothing: the shim puts the files into the share, and the guest stacks them.

use super::BoxEnv;
use crate::error::{ErrorKind, Result, RuntimeError};
use crate::images::{ImageError, ImageErrorKind};
use crate::types::ContainerSnapshot;
use boxlite_proto::names::{IMAGE_MOUNT, LAYER_OPTION};
use oci_spec::runtime::Spec;

impl BoxEnv {
    /// Holds each of `images` for `holder`; on an error the new holds are released.
    ///
    /// # Errors
    /// `Image` for the first image that is not found locally.
    pub(super) fn hold_images(&self, images: &[String], holder: &str) -> Result<Vec<String>> {
        let mut held = Vec::with_capacity(images.len());
        for image in images {
            match self.images.hold(image, holder) {
                Ok(record) => held.push(record.id),
                Err(source) => {
                    self.release(&held, holder);
                    return Err(image_error(image, "use", source));
                }
            }
        }
        Ok(held)
    }

    /// Releases `images`.
    pub(super) fn release(&self, images: &[String], holder: &str) {
        for image in images {
            self.images.release(image, holder);
        }
    }

    /// Releases all images of a container.
    pub(crate) fn release_images(&self, container: &ContainerSnapshot) {
        for image in container.images() {
            self.images.release(image, &container.id);
        }
    }

    /// Adds the layer files of image volumes to the options of their mounts.
    ///
    /// # Errors
    /// `Image` if a layer is missing, which cannot happen while the image is held.
    pub(super) fn name_layers(&self, spec: &mut Spec) -> Result<()> {
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for mount in &mut mounts {
            let Some(image) = image_of(mount) else {
                continue;
            };
            let layers = self
                .images
                .overlay_layers(&image)
                .map_err(|source| image_error(&image, "find the layers of", source))?;
            let mut options = mount.options().clone().unwrap_or_default();
            let layer = |path: std::path::PathBuf| format!("{LAYER_OPTION}{}", path.display());
            options.extend(layers.into_iter().map(|file| layer(file.path)));
            mount.set_options(Some(options));
        }
        spec.set_mounts(Some(mounts));
        Ok(())
    }
}

/// Returns the image id of an image volume.
fn image_of(mount: &oci_spec::runtime::Mount) -> Option<String> {
    let source = mount.source().as_ref()?;
    (mount.typ().as_deref() == Some(IMAGE_MOUNT)).then(|| source.display().to_string())
}

/// Returns the ids of the image volumes of a spec.
pub(super) fn volumes(spec: &Spec) -> Vec<String> {
    let mut images: Vec<String> = spec
        .mounts()
        .iter()
        .flatten()
        .filter_map(image_of)
        .collect();
    images.sort();
    images.dedup();
    images
}

/// Returns the error of an operation on an image.
pub(super) fn image_error(image: &str, what: &'static str, source: ImageError) -> RuntimeError {
    let kind = match source.kind() {
        ImageErrorKind::NotFound => ErrorKind::NotFound,
        ImageErrorKind::InvalidReference => ErrorKind::InvalidArgument,
        ImageErrorKind::NoSpace | ImageErrorKind::TooLarge => ErrorKind::ResourceExhausted,
        ImageErrorKind::Unavailable => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    RuntimeError::Image {
        image: image.to_owned(),
        operation: what,
        kind,
        source: Box::new(source),
    }
}
