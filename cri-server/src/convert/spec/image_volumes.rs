//! `VOLUME` paths of an image's configuration, as mounts of a container.
//!
//! As containerd's CRI plugin does for every container, each path becomes a writable directory with the image's content,
//! private to the container and removed with it. The guest binds it from the container's writable layer. The paths are
//! untrusted; the guest resolves links in them within the container's root.

use super::ConvertError;
use boxlite_proto::names::IMAGE_VOLUME_MOUNT;
use serde_json::{Value, json};
use std::path::{Component, Path, PathBuf};

/// Maximum number of paths. Images have a handful; the guest accepts 512 mounts of a container.
const MAX_VOLUMES: usize = 128;
/// Maximum length of a path, in bytes (`PATH_MAX` of Linux without the final NUL).
const MAX_PATH_BYTES: usize = 4095;

/// Returns the normalized paths, sorted, each once: absolute, without `..`, without the root, which is not a volume.
///
/// # Errors
/// If there are too many, or one is too long or contains a NUL.
pub(crate) fn paths(volumes: Option<&[String]>) -> Result<Vec<PathBuf>, ConvertError> {
    let volumes = volumes.unwrap_or_default();
    if volumes.len() > MAX_VOLUMES {
        return Err(ConvertError::invalid(
            "image.config.Volumes",
            volumes.len().to_string(),
            format!("more than {MAX_VOLUMES} paths"),
        ));
    }
    let mut paths = Vec::with_capacity(volumes.len());
    for volume in volumes {
        if volume.len() > MAX_PATH_BYTES || volume.contains('\0') {
            return Err(ConvertError::invalid(
                "image.config.Volumes",
                volume.chars().take(100).collect::<String>(),
                format!("contains a NUL or is longer than {MAX_PATH_BYTES} bytes"),
            ));
        }
        let path = normalize(volume);
        if path != Path::new("/") {
            paths.push(path);
        }
    }
    paths.sort();
    paths.dedup();
    Ok(paths)
}

/// Returns `path` as an absolute path of the container. Relative paths start at the root, `..` does not leave it.
fn normalize(path: &str) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// Returns the mount for a normalized path.
pub(crate) fn mount(path: &Path) -> Value {
    json!({
        "destination": path,
        "type": IMAGE_VOLUME_MOUNT,
        "source": path,
        "options": ["rw"],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(volumes: &[&str]) -> Result<Vec<String>, ConvertError> {
        let volumes: Vec<String> = volumes.iter().map(|path| (*path).to_owned()).collect();
        let paths = paths(Some(&volumes))?;
        Ok(paths.iter().map(|p| p.display().to_string()).collect())
    }

    #[test]
    fn paths_are_absolute_and_unique_without_the_root() {
        let odd = [
            "/data",
            "data/",
            "/data/./",
            "/",
            "",
            "..",
            "/a/../../b",
            "/x/../data",
            "/c/d",
        ];
        let expected = ["/b", "/c/d", "/data"].map(str::to_owned).to_vec();
        assert_eq!(parse(&odd), Ok(expected));
        assert_eq!(paths(None), Ok(Vec::new()));
    }

    #[test]
    fn paths_of_a_hostile_image_are_bounded() {
        let many: Vec<String> = (0..=MAX_VOLUMES).map(|n| format!("/v{n}")).collect();
        let error = paths(Some(&many)).expect_err("too many").to_string();
        assert!(
            error.contains("image.config.Volumes") && error.contains("128"),
            "{error}"
        );
        assert!(paths(Some(&many[1..])).is_ok());
        let long = format!("/{}", "a/".repeat(MAX_PATH_BYTES));
        let error = parse(&[&long]).expect_err("too long").to_string();
        assert!(error.len() < 500 && error.contains("4095"), "{error}");
        assert!(parse(&["/a\0b"]).is_err());
    }
}
