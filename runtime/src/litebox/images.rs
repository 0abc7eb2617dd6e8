//! The images of a container: its root's and those it mounts as volumes. Held while it exists, and put into its spec as
//! layer files.
//!
//! Nothing is mounted here: the shim puts the files into the share, the guest stacks them. Called by `containers` and, for
//! the release, by whoever forgets a container.

use super::BoxEnv;
use super::containers::image_error;
use crate::error::Result;
use crate::types::ContainerSnapshot;
use boxlite_proto::names::{IMAGE_MOUNT, LAYER_OPTION};
use oci_spec::runtime::Spec;

impl BoxEnv {
    /// Takes a hold on each of `images` for `holder`; on an error none is left that was not there before.
    ///
    /// # Errors
    /// `Image` with the first that is not here.
    pub(super) fn hold_images(&self, images: &[String], holder: &str) -> Result<Vec<String>> {
        let mut held = Vec::with_capacity(images.len());
        for image in images {
            match self.images.hold(image, holder) {
                Ok(record) => held.push(record.id),
                Err(source) => {
                    self.release(&held, holder);
                    return Err(image_error(image, "cannot be used", source));
                }
            }
        }
        Ok(held)
    }

    /// Lets go of `images`.
    pub(super) fn release(&self, images: &[String], holder: &str) {
        for image in images {
            self.images.release(image, holder);
        }
    }

    /// Lets go of everything the container needed.
    pub(crate) fn release_images(&self, container: &ContainerSnapshot) {
        for image in container.images() {
            self.images.release(image, &container.id);
        }
    }

    /// Puts the layer files of image volumes into the options of their mounts.
    ///
    /// # Errors
    /// `Image` where one is not here; cannot happen to who holds it.
    pub(super) fn name_layers(&self, spec: &mut Spec) -> Result<()> {
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for mount in &mut mounts {
            let Some(image) = image_of(mount) else {
                continue;
            };
            let layers = self
                .images
                .layers(&image)
                .map_err(|source| image_error(&image, "has no layers", source))?;
            let mut options = mount.options().clone().unwrap_or_default();
            let layer = |path: std::path::PathBuf| format!("{LAYER_OPTION}{}", path.display());
            options.extend(layers.into_iter().map(|file| layer(file.path)));
            mount.set_options(Some(options));
        }
        spec.set_mounts(Some(mounts));
        Ok(())
    }
}

/// The image that a mount shows, if it shows one.
fn image_of(mount: &oci_spec::runtime::Mount) -> Option<String> {
    let source = mount.source().as_ref()?;
    (mount.typ().as_deref() == Some(IMAGE_MOUNT)).then(|| source.display().to_string())
}

/// IDs of the images that a spec mounts as volumes.
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
