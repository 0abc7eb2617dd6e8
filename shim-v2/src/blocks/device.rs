//! [`Device`]: a block device of the host, opened by its number.

use nix::libc::makedev;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

/// Directory in which the kernel lists block devices by number.
const NUMBERS: &str = "/sys/dev/block";
/// Directory of the device nodes.
const NODES: &str = "/dev";
/// Logical block sizes that a loop device supports; the first is the default.
const BLOCK_SIZES: [u32; 4] = [512, 1024, 2048, 4096];

/// A device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Number {
    pub major: u32,
    pub minor: u32,
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// An open device.
#[derive(Debug)]
pub struct Device {
    pub file: File,
    /// Size in bytes at the time of opening.
    pub size: u64,
    /// Logical block size in bytes.
    pub block_size: u32,
}

impl Device {
    /// Opens the device with this number. Blocks until the device responds.
    ///
    /// # Errors
    /// The device does not exist, its node belongs to another device, or the kernel refuses.
    pub fn open(number: Number, read_only: bool) -> io::Result<Self> {
        let sysfs = Path::new(NUMBERS).join(number.to_string());
        let path = node(&fs::read_to_string(sysfs.join("uevent"))?)
            .ok_or_else(|| io::Error::other("device has no name"))?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(&path)
            .map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("failed to open {}: {error}", path.display()),
                )
            })?;
        let metadata = file.metadata()?;
        let same = metadata.rdev() == makedev(number.major, number.minor);
        if !metadata.file_type().is_block_device() || !same {
            let path = path.display();
            return Err(io::Error::other(format!(
                "{path} belongs to another device"
            )));
        }
        let size = file.seek(SeekFrom::End(0))?;
        if size == 0 {
            return Err(io::Error::other(format!("{} is empty", path.display())));
        }
        Ok(Self {
            file,
            size,
            block_size: block_size(&sysfs),
        })
    }
}

/// Returns the node named by a device's `uevent`.
fn node(uevent: &str) -> Option<PathBuf> {
    let mut lines = uevent.lines();
    let name = lines.find_map(|line| line.strip_prefix("DEVNAME="))?;
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    let good = !name.is_empty() && Path::new(name).components().all(plain);
    good.then(|| Path::new(NODES).join(name))
}

/// Reads the logical block size of a disk or of a partition's disk.
fn block_size(sysfs: &Path) -> u32 {
    let read = |name: &str| fs::read_to_string(sysfs.join(name)).ok();
    let text = read("queue/logical_block_size").or_else(|| read("../queue/logical_block_size"));
    let size = text.and_then(|text| text.trim().parse().ok());
    size.filter(|size| BLOCK_SIZES.contains(size))
        .unwrap_or(BLOCK_SIZES[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_accepts_only_plain_names() {
        let text = "MAJOR=253\nMINOR=1\nDEVNAME=mapper/x\nDEVTYPE=disk\n";
        assert_eq!(node(text), Some(PathBuf::from("/dev/mapper/x")));
        for bad in ["", "DEVNAME=\n", "DEVNAME=../x\n", "DEVNAME=/etc/x\n"] {
            assert_eq!(node(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn open_unknown_number_fails() {
        let none = Number {
            major: 4000,
            minor: 7,
        };
        let error = Device::open(none, true).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
    }
}
