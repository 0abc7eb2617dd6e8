//! Tests of the share in a mount namespace of the test thread. They need root.

use super::*;
use nix::sched::{CloneFlags, unshare};
use nix::sys::statvfs::FsFlags;
use std::os::unix::fs::symlink;

/// Runs `test` on a thread with its own mount namespace, an empty host directory and a share.
pub(crate) fn with_share(test: impl FnOnce(&Path, &PodShare) + Send) {
    let host = tempfile::tempdir().expect("tempdir");
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).expect("unshare");
            mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE).expect("slave");
            let share =
                PodShare::create(&host.path().join("share"), HostNamespace::same()).expect("share");
            test(host.path(), &share);
            share.destroy().expect("destroy");
            assert!(!host.path().join("share").exists());
            assert!(!host.path().join("share.stage").exists());
        });
        thread.join().expect("test thread");
    });
}

const FULL: BindMode = BindMode {
    access: Access::Full,
    follow_host: false,
    map: None,
};

/// Reads a file. Tests read the thread's mount table, not the process's.
fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).expect("read")
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn bind_and_unbind_files_and_directories() {
    with_share(|host, share| {
        fs::create_dir(host.join("data")).expect("dir");
        fs::write(host.join("data/x"), "hello").expect("file");
        share
            .bind(&host.join("data"), "m/c1/0", FULL)
            .expect("directory");
        share
            .bind(&host.join("data/x"), "m/c1/1", FULL)
            .expect("file");
        assert_eq!(read(share.directory().join("m/c1/0/x")), "hello");
        assert_eq!(read(share.directory().join("m/c1/1")), "hello");
        fs::write(share.directory().join("m/c1/0/y"), "back").expect("writable");
        assert_eq!(read(host.join("data/y")), "back");

        share.unbind("m/c1/0").expect("unbind");
        assert!(share.directory().join("m/c1").exists());
        share.unbind("m/c1/1").expect("unbind");
        assert!(
            !share.directory().join("m/c1").exists(),
            "empty parents are removed"
        );
        assert!(
            share.directory().join("m").exists(),
            "top-level directories remain"
        );
        share.unbind("m/c1/1").expect("twice");
        assert_eq!(read(host.join("data/x")), "hello");
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn bind_missing_or_occupied_fails_and_leaves_nothing() {
    with_share(|host, share| {
        let error = share
            .bind(&host.join("nowhere"), "m/c1/0", FULL)
            .expect_err("missing");
        assert!(error.to_string().contains("nowhere"), "{error}");
        assert!(!share.directory().join("m/c1").exists());
        fs::write(host.join("f"), "").expect("file");
        share.bind(&host.join("f"), "m/c1/0", FULL).expect("first");
        let error = share
            .bind(&host.join("f"), "m/c1/0", FULL)
            .expect_err("second");
        assert!(matches!(error, ShareError::Occupied { .. }), "{error}");
        share.unbind("m/c1/0").expect("unbind");
    });
}

/// Mounts a tmpfs at `path`.
fn tmpfs(path: &Path) {
    fs::create_dir_all(path).expect("dir");
    mount(Some("none"), path, Some("tmpfs"), MsFlags::empty(), NONE).expect("tmpfs");
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn bind_read_only_covers_mount_or_tree() {
    with_share(|host, share| {
        tmpfs(&host.join("v/deep"));
        for (path, access, deep) in [
            ("m/one", Access::ReadOnly, true),
            ("m/all", Access::ReadOnlyTree, false),
        ] {
            let mode = BindMode::fixed(access);
            share.bind(&host.join("v"), path, mode).expect("bind");
            let at = share.directory().join(path);
            let top = fs::write(at.join("x"), "").expect_err("read-only");
            assert_eq!(top.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
            assert_eq!(fs::write(at.join("deep/x"), "").is_ok(), deep, "{path}");
            share.unbind(path).expect("unbind");
        }
        fs::write(host.join("v/x"), "").expect("source is still writable");
        nix::mount::umount(&host.join("v/deep")).expect("umount");
    });
}

/// The jail's file server must not be led to a device or a set-user-id program of a volume.
#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn bind_is_nosuid_and_nodev_including_submounts() {
    with_share(|host, share| {
        tmpfs(&host.join("v/deep"));
        share.bind(&host.join("v"), "m/v", FULL).expect("bind");
        for path in ["m/v", "m/v/deep"] {
            let at = share.directory().join(path);
            let flags = nix::sys::statvfs::statvfs(&at).expect("statvfs").flags();
            for flag in [FsFlags::ST_NOSUID, FsFlags::ST_NODEV] {
                assert!(flags.contains(flag), "{path}: {flags:?}");
            }
        }
        share.unbind("m/v").expect("unbind");
        nix::mount::umount(&host.join("v/deep")).expect("umount");
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn bind_follow_host_receives_later_mounts() {
    with_share(|host, share| {
        // Represents the host: a mount whose events propagate here.
        tmpfs(&host.join("outer"));
        let outer = host.join("outer");
        mount(NONE, &outer, NONE, MsFlags::MS_SHARED, NONE).expect("shared");
        let inner = host.join("inner");
        fs::create_dir_all(&inner).expect("dir");
        mount(Some(&outer), &inner, NONE, MsFlags::MS_BIND, NONE).expect("bind");
        mount(NONE, &inner, NONE, MsFlags::MS_SLAVE, NONE).expect("slave");
        fs::create_dir(outer.join("later")).expect("dir");
        let follow = BindMode {
            access: Access::Full,
            follow_host: true,
            map: None,
        };
        share.bind(&inner, "m/slave", follow).expect("bind");
        share.bind(&inner, "m/private", FULL).expect("bind");
        tmpfs(&outer.join("later"));
        fs::write(outer.join("later/x"), "").expect("file");
        assert!(share.directory().join("m/slave/later/x").exists());
        assert!(!share.directory().join("m/private/later/x").exists());
        umount2(&outer.join("later"), MntFlags::MNT_DETACH).expect("umount");
        assert!(!share.directory().join("m/slave/later/x").exists());

        // A private mount receives no events, so the bind is refused.
        tmpfs(&host.join("alone"));
        let alone = host.join("alone");
        mount(NONE, &alone, NONE, MsFlags::MS_PRIVATE, NONE).expect("private");
        let error = share.bind(&alone, "m/alone", follow).expect_err("refused");
        assert!(error.to_string().contains("alone"), "{error}");
        assert!(!share.directory().join("m/alone").exists());
        for path in ["m/slave", "m/private"] {
            share.unbind(path).expect("unbind");
        }
        for path in [&inner, &outer, &alone] {
            umount2(path, MntFlags::MNT_DETACH).expect("umount");
        }
    });
}

/// The VMM's namespace exists before the bind, so its view is checked.
#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn bind_flags_reach_the_vmm_namespace() {
    with_share(|host, share| {
        fs::create_dir_all(host.join("v/later")).expect("dir");
        let (ready, bound) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        std::thread::scope(|scope| {
            let jail = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNS).expect("unshare");
                mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE).expect("slave");
                ready.wait();
                bound.wait();
                let at = share.directory().join("m");
                let write = |name: &str| fs::write(at.join(name), "").map_err(|e| e.kind());
                let refused = Err(std::io::ErrorKind::ReadOnlyFilesystem);
                assert_eq!((write("ro/x"), write("rw/x")), (refused, Ok(())));
                assert_eq!(fs::read_dir(at.join("rw/later")).expect("dir").count(), 0);
            });
            ready.wait();
            let mode = BindMode::fixed(Access::ReadOnly);
            share.bind(&host.join("v"), "m/ro", mode).expect("bind");
            share.bind(&host.join("v"), "m/rw", FULL).expect("bind");
            tmpfs(&host.join("v/later"));
            fs::write(host.join("v/later/x"), "").expect("file");
            bound.wait();
            jail.join().expect("jail thread");
        });
        umount2(&host.join("v/later"), MntFlags::MNT_DETACH).expect("umount");
        assert_eq!(
            fs::read_dir(share.stage()).expect("stage").count(),
            0,
            "the staging directory is empty"
        );
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn bind_does_not_follow_links_in_the_share() {
    with_share(|host, share| {
        fs::create_dir(host.join("outside")).expect("dir");
        fs::write(host.join("f"), "").expect("file");
        // A link that a hostile guest could leave in a writable share.
        symlink(host.join("outside"), share.directory().join("m/evil")).expect("link");
        assert!(share.bind(&host.join("f"), "m/evil/0", FULL).is_err());
        assert!(!host.join("outside/0").exists());
        assert!(share.unbind("m/evil/0").is_err() || !host.join("outside/0").exists());
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn bind_outside_the_share_is_refused() {
    with_share(|host, share| {
        for path in ["", "/m/x", "m//x", "m/../../x", "m/.", "m/\0"] {
            let error = share.bind(host, path, FULL).expect_err(path);
            assert!(
                matches!(error, ShareError::InvalidPath { .. }),
                "{path:?}: {error}"
            );
        }
    });
}

#[test]
fn split_options_separates_flags_and_data() {
    let options: Vec<String> = ["ro", "lowerdir=/a:/b", "nodev", "rw"]
        .map(str::to_owned)
        .to_vec();
    let (flags, data) = split_options(&options);
    assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NODEV);
    assert_eq!(data, "lowerdir=/a:/b");
}

/// A node with private mounts, for example without systemd: mounts made after the pod's start do not propagate to the shim.
#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn bind_resolves_sources_in_the_host_namespace() {
    let host = tempfile::tempdir().expect("tempdir");
    let step = std::sync::Barrier::new(2);
    let at = |name: &str| host.path().join(name);
    std::thread::scope(|scope| {
        let node = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).expect("unshare");
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(NONE, "/", NONE, private, NONE).expect("private");
            let namespace = HostNamespace::current().expect("namespace");
            let shim = scope.spawn(|| bind_later_mounts(host.path(), namespace, &step));
            step.wait();
            for name in ["volume", "tree/below", "shared"] {
                tmpfs(&at(name));
                fs::write(at(name).join("x"), name).expect("file");
            }
            mount(NONE, &at("shared"), NONE, MsFlags::MS_SHARED, NONE).expect("shared");
            fs::create_dir(at("shared/later")).expect("dir");
            step.wait();
            step.wait();
            tmpfs(&at("shared/later"));
            fs::write(at("shared/later/x"), "later").expect("file");
            step.wait();
            shim.join().expect("shim thread");
        });
        node.join().expect("node thread");
    });
}

fn bind_later_mounts(host: &Path, namespace: HostNamespace, step: &std::sync::Barrier) {
    unshare(CloneFlags::CLONE_NEWNS).expect("unshare");
    let share = PodShare::create(&host.join("share"), namespace).expect("share");
    step.wait();
    step.wait();
    let at = share.directory();
    share.bind(&host.join("volume"), "m/v", FULL).expect("bind");
    share.bind(&host.join("tree"), "m/t", FULL).expect("bind");
    let follow = BindMode {
        follow_host: true,
        ..FULL
    };
    let shared = host.join("shared");
    share.bind(&shared, "m/s", follow).expect("bind");
    assert_eq!(read(at.join("m/v/x")), "volume");
    assert_eq!(read(at.join("m/t/below/x")), "tree/below");
    assert_eq!(read(at.join("m/s/x")), "shared");
    let error = share.bind(&host.join("volume"), "m/p", follow);
    assert!(
        matches!(error, Err(ShareError::Private { .. })),
        "{error:?}"
    );
    step.wait();
    step.wait();
    assert_eq!(read(at.join("m/s/later/x")), "later");
    share.destroy().expect("destroy");
}
