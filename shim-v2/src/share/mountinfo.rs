//! The calling thread's mount table: which mounts are at or below a path, and whose events they get. Reads, changes nothing.

use super::{ShareError, failed};
use std::fs;
use std::path::{Path, PathBuf};

const TABLE: &str = "/proc/thread-self/mountinfo";

/// One mount.
struct Mount {
    point: PathBuf,
    /// `shared:N`, `master:N` …
    propagation: Vec<String>,
}

/// Mount points at or below `path`, upper ones first.
///
/// # Errors
/// The table cannot be read.
pub fn points(path: &Path) -> Result<Vec<PathBuf>, ShareError> {
    let mut points: Vec<PathBuf> = read()?
        .into_iter()
        .map(|mount| mount.point)
        .filter(|point| point.starts_with(path))
        .collect();
    points.sort();
    points.dedup();
    Ok(points)
}

/// Whether something is mounted below the directory `path`, itself excluded.
///
/// # Errors
/// The table cannot be read.
pub fn has_mounts_below(path: &Path) -> Result<bool, ShareError> {
    Ok(points(path)?.iter().any(|point| point != path))
}

/// Whether the mount at exactly this mount point is a slave: it gets the events of another one.
///
/// # Errors
/// The table cannot be read.
pub(super) fn is_slave(point: &Path) -> Result<bool, ShareError> {
    // The last one covers those before it.
    let last = read()?.into_iter().rfind(|mount| mount.point == point);
    Ok(last.is_some_and(|mount| mount.propagation.iter().any(|p| p.starts_with("master:"))))
}

fn read() -> Result<Vec<Mount>, ShareError> {
    let table = fs::read_to_string(TABLE).map_err(failed("reading", TABLE))?;
    Ok(table.lines().filter_map(parse).collect())
}

/// `36 35 98:0 /root /point options [optional fields …] - type source options`
fn parse(line: &str) -> Option<Mount> {
    let mut fields = line.split(' ').skip(4);
    let point = unescape(fields.next()?);
    let propagation = fields
        .skip(1)
        .take_while(|field| *field != "-")
        .map(str::to_owned)
        .collect();
    Some(Mount { point, propagation })
}

/// A path of mountinfo: space, tab, newline and backslash are octal there.
pub(crate) fn unescape(field: &str) -> PathBuf {
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
    PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read() {
        let line = r"36 35 98:0 / /a\040b\134 rw,noatime shared:7 master:1 - ext3 /dev/root rw";
        let mount = parse(line).expect("a mount");
        assert_eq!(mount.point, PathBuf::from(r"/a b\"));
        assert_eq!(mount.propagation, ["shared:7", "master:1"]);
        let mount = parse("1 0 0:1 / / rw - tmpfs tmpfs rw").expect("a mount");
        assert!(mount.propagation.is_empty());
        assert!(parse("nonsense").is_none());
    }
}
