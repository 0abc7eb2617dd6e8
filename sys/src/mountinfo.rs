//! Mount tables in the format of `/proc/<pid>/mountinfo`, parsed by [`mounts`].

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One mount: `36 35 98:0 /root /point options [optional fields …] - type source options`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount<'a> {
    /// Ids of the mount and of its parent.
    pub id: u64,
    pub parent: u64,
    /// `major:minor` of the file system.
    pub device: &'a str,
    /// Root of the mount within the file system, as written.
    pub root: &'a str,
    /// Mount point.
    pub point: PathBuf,
    /// Options of the mount, separated by commas.
    pub options: &'a str,
    /// `shared:N`, `master:N` …
    pub propagation: Vec<&'a str>,
    /// Type of the file system.
    pub kind: &'a str,
    /// Source, as written.
    pub source: &'a str,
    /// Options of the file system, separated by commas.
    pub super_options: &'a str,
}

impl<'a> Mount<'a> {
    /// Parses a line. Returns `None` if it is invalid.
    pub fn parse(line: &'a str) -> Option<Self> {
        let (mount, system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ');
        let mut system = system.split(' ');
        Some(Self {
            id: fields.next()?.parse().ok()?,
            parent: fields.next()?.parse().ok()?,
            device: fields.next()?,
            root: fields.next()?,
            point: unescape(fields.next()?),
            options: fields.next()?,
            propagation: fields.collect(),
            kind: system.next()?,
            source: system.next()?,
            super_options: system.next().unwrap_or_default(),
        })
    }

    /// Returns true if the mount propagates events to others.
    pub fn is_shared(&self) -> bool {
        self.propagation.iter().any(|p| p.starts_with("shared:"))
    }

    /// Returns true if the mount receives events of another one.
    pub fn is_slave(&self) -> bool {
        self.propagation.iter().any(|p| p.starts_with("master:"))
    }

    /// Returns true if the mount or its file system is read-only.
    pub fn is_read_only(&self) -> bool {
        let all = [self.options, self.super_options];
        all.iter().flat_map(|o| o.split(',')).any(|o| o == "ro")
    }
}

/// Returns the mounts of a table in order: later ones cover earlier ones at the same mount point.
pub fn mounts(table: &str) -> impl DoubleEndedIterator<Item = Mount<'_>> {
    table.lines().filter_map(Mount::parse)
}

/// Decodes a path, in which space, tab, newline and backslash are octal.
pub fn unescape(field: &str) -> PathBuf {
    let (mut bytes, raw) = (Vec::new(), field.as_bytes());
    let mut at = 0;
    while at < raw.len() {
        let octal = raw.get(at + 1..at + 4).filter(|_| raw[at] == b'\\');
        let code = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(code.unwrap_or(raw[at]));
        at += if code.is_some() { 4 } else { 1 };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_fields_are_parsed() {
        let line =
            r"36 35 98:0 /sub /a\040b\134\011c rw,noatime shared:7 master:1 - ext3 /dev/root rw,x";
        let mount = Mount::parse(line).expect("a mount");
        assert_eq!(mount.point, PathBuf::from("/a b\\\tc"));
        assert_eq!((mount.id, mount.parent, mount.device), (36, 35, "98:0"));
        assert_eq!(mount.root, "/sub");
        assert_eq!(mount.propagation, ["shared:7", "master:1"]);
        assert!(mount.is_shared() && mount.is_slave() && !mount.is_read_only());
        assert_eq!((mount.kind, mount.source), ("ext3", "/dev/root"));
        assert_eq!(mount.super_options, "rw,x");
    }

    #[test]
    fn malformed_lines_are_omitted() {
        let table = "1 0 0:1 / / rw - tmpfs tmpfs rw\nnonsense\n\n2 1 0:2 / /ro ro - proc proc\n\
            x 1 0:2 / /x rw - proc proc rw\n3 1 0:2 / /half";
        let points: Vec<_> = mounts(table).map(|mount| mount.point).collect();
        assert_eq!(points, [PathBuf::from("/"), PathBuf::from("/ro")]);
        let last = mounts(table).next_back().expect("one");
        assert!(last.is_read_only() && !last.is_shared());
        // A backslash without a number is literal.
        assert_eq!(unescape(r"/a\x40\9\"), PathBuf::from(r"/a\x40\9\"));
    }
}
