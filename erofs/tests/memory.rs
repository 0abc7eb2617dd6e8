//! Memory of a conversion. A separate process: the measured value is the peak of its resident set.

use boxlite_erofs::{Target, write_image};
use std::io::{self, Read};

const MEMORY_LIMIT_KIB: u64 = 64 << 10;
const ENTRIES: usize = 950_000;

/// A layer of empty files with long names, generated while it is read. Every fourth file is in the root directory, the others
/// are in directories of 1000 files.
struct Layer {
    index: usize,
    block: Vec<u8>,
    at: usize,
}

impl Layer {
    fn header(index: usize) -> Vec<u8> {
        let name = match index % 4 {
            0 => format!("a-long-common-prefix-of-many-names-{index:07}"),
            _ => format!("directory-{:04}/file-{index:07}", index / 1000),
        };
        let mut header = tar::Header::new_ustar();
        header.set_path(name).expect("a short name");
        header.set_mode(0o644);
        header.set_uid(index as u64);
        header.set_size(0);
        header.set_cksum();
        header.as_bytes().to_vec()
    }
}

impl Read for Layer {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.block.len() {
            if self.index == ENTRIES {
                return Ok(0);
            }
            self.block = Self::header(self.index);
            (self.index, self.at) = (self.index + 1, 0);
        }
        let length = buffer.len().min(self.block.len() - self.at);
        buffer[..length].copy_from_slice(&self.block[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}

/// A value of /proc/self/status in KiB.
fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = text.lines().find(|line| line.starts_with(key));
    let value = line.and_then(|line| line.split_whitespace().nth(1));
    value.and_then(|value| value.parse().ok()).expect(key)
}

#[test]
fn conversion_of_950000_entries_stays_below_64_mib() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let scratch = tempfile::tempdir().expect("a directory");
    let before = status("VmRSS:");
    let mut layer = Layer {
        index: 0,
        block: Vec::new(),
        at: 0,
    };
    let start = std::time::Instant::now();
    let target = Target {
        file: file.as_file(),
        path: file.path(),
        scratch: scratch.path(),
        cancelled: &|| false,
    };
    write_image(&mut layer, "layer", target).expect("converted");
    let used = status("VmHWM:") - before;
    println!(
        "{ENTRIES} entries: {} MiB in {:?}",
        used >> 10,
        start.elapsed()
    );
    assert!(used <= MEMORY_LIMIT_KIB, "{used} KiB");
}
