//! [`list`]: SHA-256 sums of files, in the format of sha256sum.

use crate::error::{DistError, Result};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

/// Returns one line per file, sorted by name. Names have no directory, so that `sha256sum -c` runs beside the files.
pub(crate) fn list(files: &[PathBuf]) -> Result<String> {
    let mut lines = Vec::new();
    for path in files {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        lines.push((
            name.clone().into_owned(),
            format!("{}  {name}\n", of_file(path)?),
        ));
    }
    lines.sort();
    Ok(lines.into_iter().map(|(_, line)| line).collect())
}

/// Returns the SHA-256 of a file in hexadecimal digits.
pub(crate) fn of_file(path: &Path) -> Result<String> {
    let content = fs::read(path).map_err(|source| DistError::Read {
        path: path.to_owned(),
        source,
    })?;
    Ok(hex::encode(Sha256::digest(content)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_has_the_format_of_sha256sum() {
        let dir = tempfile::tempdir().expect("a directory");
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&a, "").expect("a file");
        fs::write(&b, "abc").expect("a file");
        assert_eq!(
            list(&[b, a]).expect("a list"),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  a\n\
             ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  b\n"
        );
    }
}
