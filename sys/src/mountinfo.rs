//! Mount tables as `/proc/<pid>/mountinfo` has them: [`mounts`] reads the lines. Which mounts matter is the reader's affair.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One mount: `36 35 98:0 /root /point options [optional fields …] - type source options`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount<'a> {
    /// Numbers of the mount and of the one that it is on.
    pub id: u64,
    pub parent: u64,
    /// `major:minor` of the file system.
    pub device: &'a str,
    /// What of the file system is mounted, as written.
    pub root: &'a str,
    /// Where.
    pub point: PathBuf,
    /// Of the mount, with commas.
    pub options: &'a str,
    /// `shared:N`, `master:N` …
    pub propagation: Vec<&'a str>,
    /// Type of the file system.
    pub kind: &'a str,
    /// As written.
    pub source: &'a str,
    /// Of the file system, with commas.
    pub super_options: &'a str,
}

impl<'a> Mount<'a> {
    /// One line; None where it is none.
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

    /// Whether its events go to others.
    pub fn is_shared(&self) -> bool {
        self.propagation.iter().any(|p| p.starts_with("shared:"))
    }

    /// Whether it gets the events of another one.
    pub fn is_slave(&self) -> bool {
        self.propagation.iter().any(|p| p.starts_with("master:"))
    }

    /// Whether the mount or its file system is read-only.
    pub fn is_read_only(&self) -> bool {
        let all = [self.options, self.super_options];
        all.iter().flat_map(|o| o.split(',')).any(|o| o == "ro")
    }
}

/// The mounts of a table, in its order: later ones cover earlier ones at the same place.
pub fn mounts(table: &str) -> impl DoubleEndedIterator<Item = Mount<'_>> {
    table.lines().filter_map(Mount::parse)
}

/// A path as written: space, tab, newline and backslash are octal there.
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
    fn a_line_is_read() {
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
    fn what_is_none_is_left_out() {
        let table = "1 0 0:1 / / rw - tmpfs tmpfs rw\nnonsense\n\n2 1 0:2 / /ro ro - proc proc\n\
            x 1 0:2 / /x rw - proc proc rw\n3 1 0:2 / /half";
        let points: Vec<_> = mounts(table).map(|mount| mount.point).collect();
        assert_eq!(points, [PathBuf::from("/"), PathBuf::from("/ro")]);
        let last = mounts(table).next_back().expect("one");
        assert!(last.is_read_only() && !last.is_shared());
        // A backslash that begins no number is one.
        assert_eq!(unescape(r"/a\x40\9\"), PathBuf::from(r"/a\x40\9\"));
    }
}
