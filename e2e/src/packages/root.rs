//! [`DebianRoot`]: an overlay of a bootstrapped Debian with /proc, in which commands run by chroot.
//!
//! Changes are in memory and disappear with the overlay.

use crate::failure::{During, Result};
use crate::{ensure, namespaces};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Files that dpkg and the dynamic linker change at every installation.
const VOLATILE: [&str; 4] = [
    "proc/",
    "var/lib/dpkg/",
    "var/log/dpkg.log",
    "var/cache/debconf/",
];

/// Overlay of a Debian root directory.
pub(crate) struct DebianRoot {
    dir: PathBuf,
}

impl DebianRoot {
    /// Mounts an overlay of the root directory of this version.
    pub(crate) fn mount(version: u32) -> Result<Self> {
        let lower = crate::install::cache().join(format!("debian-{version}"));
        ensure!(
            lower.is_dir(),
            "{} not found: run e2e/scripts/debian-roots {version}",
            lower.display()
        );
        let base = namespaces::scratch().join("debian");
        for name in ["upper", "work", "root"] {
            fs::create_dir_all(base.join(name))?;
        }
        let dir = base.join("root");
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            base.join("upper").display(),
            base.join("work").display()
        );
        let path = |path: &Path| path.display().to_string();
        namespaces::run(
            "mount",
            &["-t", "overlay", "overlay", "-o", &options, &path(&dir)],
        )?;
        let proc = dir.join("proc");
        namespaces::run("mount", &["-t", "proc", "proc", &path(&proc)])?;
        Ok(Self { dir })
    }

    /// Unmounts the overlay and removes the changes.
    pub(crate) fn unmount(self) -> Result {
        let dir = self.dir.display().to_string();
        namespaces::run("umount", &["--recursive", &dir])?;
        Ok(fs::remove_dir_all(self.dir.with_file_name(""))?)
    }

    /// Returns the path of a file of the system.
    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file.trim_start_matches('/'))
    }

    /// Copies a file of the machine to a path of the system.
    pub(crate) fn copy(&self, from: &Path, to: &str) -> Result {
        fs::copy(from, self.path(to)).during(from.display())?;
        Ok(())
    }

    /// Prepares a command of the system.
    pub(crate) fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("chroot");
        command
            .arg(&self.dir)
            .arg(program)
            .args(args)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// Runs a command to completion. Returns whether it succeeded, and both of its outputs.
    pub(crate) fn outcome(&self, program: &str, args: &[&str]) -> Result<(bool, String)> {
        let output: Output = self.command(program, args).output().during(program)?;
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        Ok((output.status.success(), text))
    }

    /// Runs a command that must succeed. Returns both of its outputs.
    pub(crate) fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let (succeeded, text) = self.outcome(program, args)?;
        ensure!(succeeded, "{program} {}: {}", args.join(" "), text.trim());
        Ok(text)
    }

    /// Returns a description of every file, by path, except those that dpkg changes for itself.
    pub(crate) fn files(&self) -> Result<BTreeMap<String, String>> {
        let mut files = BTreeMap::new();
        visit(&self.dir, "", &mut files)?;
        files.retain(|path, _| !VOLATILE.iter().any(|prefix| path.starts_with(prefix)));
        Ok(files)
    }
}

/// Describes the files below a directory of the root. Regular files below /etc by their content, others by size.
fn visit(root: &Path, prefix: &str, files: &mut BTreeMap<String, String>) -> Result {
    for entry in fs::read_dir(root.join(prefix)).during(prefix)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = match prefix {
            "" => name,
            _ => format!("{prefix}/{name}"),
        };
        let metadata = entry.metadata()?;
        let (kind, mode) = (metadata.file_type(), metadata.mode() & 0o7777);
        let text = if kind.is_symlink() {
            format!("link to {}", fs::read_link(entry.path())?.display())
        } else if kind.is_dir() {
            if path != "proc" {
                visit(root, &path, files)?;
            }
            format!("directory {mode:o}")
        } else if kind.is_char_device() {
            format!("device {mode:o}")
        } else if path.starts_with("etc/") {
            format!("file {mode:o} {:?}", fs::read(entry.path())?)
        } else {
            format!("file {mode:o} {} bytes", metadata.len())
        };
        files.insert(path, text);
    }
    Ok(())
}
