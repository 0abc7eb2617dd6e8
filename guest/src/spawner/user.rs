//! Resolves the user of a process in the container's own /etc/passwd and /etc/group.
//!
//! Those files are untrusted: they are opened below the root filesystem without following symlinks out of it, read up
//! to a limit, and lines that do not parse are skipped. As in other runtimes, a name needs an entry and a number does
//! not.

use super::wire::UserPlan;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;

/// Maximum number of bytes read of either file.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// Maximum number of supplementary groups (the kernel's NGROUPS_MAX is 65536).
const MAX_GROUPS: usize = 1024;

/// A user or group not found in the container.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// User not found; the text is that of other runtimes.
    #[error("unable to find user {0}: no matching entries in passwd file")]
    NoUser(String),
    /// Group not found; the text is that of other runtimes.
    #[error("unable to find group {0}: no matching entries in group file")]
    NoGroup(String),
}

/// A [`UserPlan`] with names resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ResolvedUser {
    pub uid: u32,
    pub gid: u32,
    /// Sorted and without duplicates.
    pub additional_gids: Vec<u32>,
    /// Home directory; `/` if passwd has no entry.
    pub home: String,
}

/// Resolves `plan` in the root filesystem at `root`.
pub(crate) fn resolve(root: &Path, plan: &UserPlan) -> Result<ResolvedUser, UserError> {
    let passwd = read_bounded(root, "etc/passwd");
    let groups = if plan.name.is_some() || plan.merge_groups {
        read_bounded(root, "etc/group")
    } else {
        String::new()
    };
    resolve_in(&passwd, &groups, plan)
}

/// Reads a file below `root`; empty if it is missing, which is common.
fn read_bounded(root: &Path, path: &str) -> String {
    let read = || -> std::io::Result<String> {
        let root = File::open(root)?;
        // Non-blocking: it may be a FIFO.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let file = File::from(openat2(root.as_fd(), path, flags, Mode::empty(), resolve)?);
        if !file.metadata()?.is_file() {
            return Ok(String::new());
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_default()
}

/// One line of passwd.
struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn passwd_entries(text: &str) -> impl Iterator<Item = PasswdEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _, uid, gid) = (
            fields.next()?,
            fields.next()?,
            fields.next()?,
            fields.next()?,
        );
        let home = fields.nth(1).unwrap_or("/");
        Some(PasswdEntry {
            name,
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            home,
        })
    })
}

/// Returns name, ID and members of each group.
fn group_entries(text: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _, gid) = (fields.next()?, fields.next()?, fields.next()?);
        Some((name, gid.parse().ok()?, fields.next().unwrap_or("")))
    })
}

fn resolve_in(passwd: &str, groups: &str, plan: &UserPlan) -> Result<ResolvedUser, UserError> {
    let named = plan.name.as_deref().filter(|name| !name.is_empty());
    let (user, group) = match named {
        Some(text) => match text.split_once(':') {
            Some((user, group)) => (Some(user), Some(group).filter(|group| !group.is_empty())),
            None => (Some(text), None),
        },
        None => (None, None),
    };
    let number = user.map_or(Some(plan.uid), |user| user.parse().ok());
    let entry = match user.filter(|user| !user.is_empty()) {
        // A name takes precedence over an ID of the same spelling.
        Some(user) => passwd_entries(passwd)
            .find(|entry| entry.name == user)
            .or_else(|| passwd_entries(passwd).find(|entry| Some(entry.uid) == number)),
        None => passwd_entries(passwd).find(|entry| Some(entry.uid) == number.or(Some(plan.uid))),
    };
    let uid = match (&entry, number, user) {
        (Some(entry), _, _) => entry.uid,
        (None, Some(number), _) => number,
        (None, None, Some("")) => plan.uid,
        (None, None, user) => return Err(UserError::NoUser(user.unwrap_or_default().to_owned())),
    };
    let gid = match (group, user) {
        (Some(group), _) => find_group(groups, group)?,
        (None, Some(_)) => entry.as_ref().map_or(0, |entry| entry.gid),
        (None, None) => plan.gid,
    };
    let mut additional_gids = plan.additional_gids.clone();
    if plan.merge_groups
        && let Some(entry) = &entry
    {
        let member = |members: &str| members.split(',').any(|name| name == entry.name);
        additional_gids.extend(
            group_entries(groups)
                .filter(|(_, _, members)| member(members))
                .map(|(_, gid, _)| gid),
        );
    }
    // The primary group too, as in other runtimes: a process that changes its primary group keeps this one.
    additional_gids.push(gid);
    additional_gids.sort_unstable();
    additional_gids.dedup();
    additional_gids.truncate(MAX_GROUPS);
    let home = entry
        .map(|entry| entry.home)
        .filter(|home| !home.is_empty())
        .unwrap_or("/")
        .to_owned();
    Ok(ResolvedUser {
        uid,
        gid,
        additional_gids,
        home,
    })
}

fn find_group(groups: &str, wanted: &str) -> Result<u32, UserError> {
    if let Some((_, gid, _)) = group_entries(groups).find(|(name, _, _)| *name == wanted) {
        return Ok(gid);
    }
    wanted
        .parse()
        .map_err(|_| UserError::NoGroup(wanted.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken line\nweb:x:33:34:Web:/srv:/bin/false\n77:x:5:6::/n:/x\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nlogs:x:50:web,root\nmedia:x:51:web\nbad:x:abc:web\n";

    fn by_name(name: &str) -> Result<ResolvedUser, UserError> {
        resolve_in(
            PASSWD,
            GROUP,
            &UserPlan {
                name: Some(name.into()),
                ..UserPlan::default()
            },
        )
    }

    #[test]
    fn resolve_finds_names_ids_and_groups() {
        let web = by_name("web").unwrap();
        assert_eq!((web.uid, web.gid, web.home.as_str()), (33, 34, "/srv"));
        assert_eq!(web.additional_gids, [34]);
        let numeric = by_name("33").unwrap();
        assert_eq!((numeric.uid, numeric.gid), (33, 34));
        let unknown = by_name("4000").unwrap();
        assert_eq!(
            (unknown.uid, unknown.gid, unknown.home.as_str()),
            (4000, 0, "/")
        );
        let explicit = by_name("web:logs").unwrap();
        assert_eq!((explicit.uid, explicit.gid), (33, 50));
        assert_eq!(by_name("web:77").unwrap().gid, 77);
        assert_eq!(by_name(":media").unwrap().gid, 51);
    }

    #[test]
    fn resolve_numeric_name_prefers_the_entry() {
        let odd = by_name("77").unwrap();
        assert_eq!((odd.uid, odd.gid), (5, 6));
    }

    #[test]
    fn resolve_unknown_name_returns_error() {
        assert_eq!(by_name("nobody"), Err(UserError::NoUser("nobody".into())));
        assert_eq!(
            by_name("web:nobody"),
            Err(UserError::NoGroup("nobody".into()))
        );
        assert!(
            by_name("nobody")
                .unwrap_err()
                .to_string()
                .contains("no matching entries in passwd file")
        );
    }

    #[test]
    fn resolve_merges_groups_if_requested() {
        let plan = UserPlan {
            uid: 33,
            gid: 100,
            additional_gids: vec![50, 7],
            merge_groups: true,
            ..UserPlan::default()
        };
        let resolved = resolve_in(PASSWD, GROUP, &plan).unwrap();
        assert_eq!((resolved.uid, resolved.gid), (33, 100));
        assert_eq!(resolved.additional_gids, [7, 50, 51, 100]);
    }

    #[test]
    fn resolve_does_not_follow_links_out_of_the_root() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("passwd"), "evil:x:1:1::/:\n").unwrap();
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("etc")).unwrap();
        assert_eq!(read_bounded(root.path(), "etc/passwd"), "");
        let inside = tempfile::tempdir().unwrap();
        std::fs::create_dir(inside.path().join("real")).unwrap();
        std::fs::write(inside.path().join("real/passwd"), PASSWD).unwrap();
        std::os::unix::fs::symlink("/real", inside.path().join("etc")).unwrap();
        assert_eq!(read_bounded(inside.path(), "etc/passwd"), PASSWD);
    }

    #[test]
    fn resolve_ignores_fifos_and_directories() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        nix::unistd::mkfifo(
            &root.path().join("etc/passwd"),
            nix::sys::stat::Mode::S_IRWXU,
        )
        .unwrap();
        std::fs::create_dir(root.path().join("etc/group")).unwrap();
        assert_eq!(read_bounded(root.path(), "etc/passwd"), "");
        assert_eq!(read_bounded(root.path(), "etc/group"), "");
    }
}
