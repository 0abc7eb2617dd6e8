//! [`Package`]: the Debian package, an `ar` archive of `debian-binary`, `control.tar.gz` and `data.tar.gz` (deb(5)).
//!
//! Every file below `/etc` is a conffile, so that dpkg keeps an operator's changes at an upgrade.

use crate::archive;
use crate::error::{DistError, Result};
use crate::tree::{self, Entry, Kind};
use std::fs;
use std::path::Path;

/// Maintainer scripts by name, as dpkg calls them.
const SCRIPTS: [&str; 3] = ["postinst", "postrm", "prerm"];

/// Input of a package.
pub(crate) struct Package<'a> {
    pub root: &'a Path,
    pub debian: &'a Path,
    pub version: &'a str,
    pub epoch: u64,
}

impl Package<'_> {
    /// Returns the package's bytes.
    pub(crate) fn build(&self) -> Result<Vec<u8>> {
        let entries = tree::read(self.root)?;
        let control = self.control(&entries)?;
        let data = archive::gzip(&entries, ".", self.epoch)?;
        let mut deb = b"!<arch>\n".to_vec();
        for (name, content) in [
            ("debian-binary", b"2.0\n".as_slice()),
            ("control.tar.gz", &control),
            ("data.tar.gz", &data),
        ] {
            member(&mut deb, name, content, self.epoch);
        }
        Ok(deb)
    }

    fn control(&self, entries: &[Entry]) -> Result<Vec<u8>> {
        let template = String::from_utf8_lossy(&self.read("control")?).into_owned();
        let control = template
            .replace("@VERSION@", self.version)
            .replace("@SIZE@", &installed_kib(entries)?.to_string());
        let conffiles = conffiles(entries);
        let scripts = SCRIPTS
            .iter()
            .map(|name| Ok((*name, self.read(name)?)))
            .collect::<Result<Vec<_>>>()?;
        let mut files = vec![
            ("conffiles", conffiles.as_bytes(), 0o644),
            ("control", control.as_bytes(), 0o644),
        ];
        files.extend(scripts.iter().map(|(name, text)| (*name, &text[..], 0o755)));
        archive::gzip_of_files(&files, self.epoch)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.debian.join(name);
        fs::read(&path).map_err(|source| DistError::Read { path, source })
    }
}

/// Files below `/etc`, one absolute path per line.
fn conffiles(entries: &[Entry]) -> String {
    let files = entries
        .iter()
        .filter(|e| e.path.starts_with("etc/") && matches!(e.kind, Kind::File { .. }));
    files.map(|e| format!("/{}\n", e.path)).collect()
}

/// Estimate of the occupied space as in deb-substvars(5): each file in whole KiB, 1 KiB for everything else.
fn installed_kib(entries: &[Entry]) -> Result<u64> {
    let mut kib = 0;
    for entry in entries {
        kib += match &entry.kind {
            Kind::File { source, .. } => {
                let metadata = fs::metadata(source).map_err(|error| DistError::Read {
                    path: source.clone(),
                    source: error,
                })?;
                metadata.len().div_ceil(1024)
            }
            Kind::Directory | Kind::Link { .. } => 1,
        };
    }
    Ok(kib)
}

/// Appends a member of an `ar` archive; members begin at even offsets.
fn member(deb: &mut Vec<u8>, name: &str, content: &[u8], epoch: u64) {
    let size = content.len();
    let header = format!(
        "{name:<16}{epoch:<12}{:<6}{:<6}{:<8}{size:<10}`\n",
        0, 0, "100644"
    );
    deb.extend_from_slice(header.as_bytes());
    deb.extend_from_slice(content);
    if size % 2 == 1 {
        deb.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// Returns the members of an `ar` archive.
    fn members(deb: &[u8]) -> Vec<(String, Vec<u8>)> {
        assert_eq!(&deb[..8], b"!<arch>\n");
        let (mut at, mut found) = (8, Vec::new());
        while at < deb.len() {
            let header = std::str::from_utf8(&deb[at..at + 60]).expect("ASCII");
            let size: usize = header[48..58].trim().parse().expect("a size");
            let content = deb[at + 60..at + 60 + size].to_vec();
            found.push((header[..16].trim().to_owned(), content));
            at += 60 + size + size % 2;
        }
        found
    }

    fn files(archive: &[u8]) -> Vec<(String, String)> {
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(archive));
        let mut files = Vec::new();
        for entry in archive.entries().expect("entries") {
            let mut entry = entry.expect("an entry");
            let name = entry.path().expect("a path").display().to_string();
            let mut text = String::new();
            entry.read_to_string(&mut text).expect("text");
            files.push((name, text));
        }
        files
    }

    #[test]
    fn build_lists_conffiles_and_fills_in_the_control_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let (root, debian) = (dir.path().join("root"), dir.path().join("debian"));
        fs::create_dir_all(root.join("etc/boxlite")).expect("a directory");
        fs::create_dir_all(root.join("usr/bin")).expect("a directory");
        fs::create_dir_all(&debian).expect("a directory");
        fs::write(root.join("etc/boxlite/config.toml"), "a = 1\n").expect("a file");
        fs::write(root.join("usr/bin/program"), vec![0; 2000]).expect("a file");
        fs::write(
            debian.join("control"),
            "Version: @VERSION@\nInstalled-Size: @SIZE@\n",
        )
        .expect("a file");
        for name in SCRIPTS {
            fs::write(debian.join(name), "#!/bin/sh\n").expect("a file");
        }
        let package = Package {
            root: &root,
            debian: &debian,
            version: "1.2",
            epoch: 7,
        };
        let members = members(&package.build().expect("a package"));
        let names: Vec<_> = members.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["debian-binary", "control.tar.gz", "data.tar.gz"]);
        let control = files(&members[1].1);
        let text = |name: &str| {
            let file = control.iter().find(|(n, _)| n == name);
            file.map(|(_, text)| text.clone()).expect(name)
        };
        assert_eq!(text("conffiles"), "/etc/boxlite/config.toml\n");
        // Four directories and a file of 1 KiB, and one of 2 KiB.
        assert_eq!(text("control"), "Version: 1.2\nInstalled-Size: 7\n");
        assert_eq!(text("postinst"), "#!/bin/sh\n");
    }
}
