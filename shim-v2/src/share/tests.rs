//! In a mount namespace of the test's own thread. Needs root, as the shim does.

use super::*;
use nix::sched::{CloneFlags, unshare};
use std::os::unix::fs::symlink;

/// Runs `test` on a thread with its own mount namespace, with an empty directory of the host and a share.
fn with_share(test: impl FnOnce(&Path, &PodShare) + Send) {
    let host = tempfile::tempdir().expect("tempdir");
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).expect("unshare");
            mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE).expect("slave");
            let share = PodShare::create(&host.path().join("share")).expect("share");
            test(host.path(), &share);
            share.destroy().expect("destroy");
            assert!(!host.path().join("share").exists());
        });
        thread.join().expect("test thread");
    });
}

/// mountinfo of the calling thread (`self` is the process).
fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).expect("read")
}

#[test]
fn files_and_directories_appear_and_go() {
    with_share(|host, share| {
        fs::create_dir(host.join("data")).expect("dir");
        fs::write(host.join("data/x"), "hello").expect("file");
        share
            .bind(&host.join("data"), "m/c1/0", false)
            .expect("directory");
        share
            .bind(&host.join("data/x"), "m/c1/1", false)
            .expect("file");
        assert_eq!(read(share.directory().join("m/c1/0/x")), "hello");
        assert_eq!(read(share.directory().join("m/c1/1")), "hello");
        fs::write(share.directory().join("m/c1/0/y"), "back").expect("writable");
        assert_eq!(read(host.join("data/y")), "back");

        share.unbind("m/c1/0").expect("unbind");
        assert!(share.directory().join("m/c1").exists());
        share.unbind("m/c1/1").expect("unbind");
        assert!(!share.directory().join("m/c1").exists(), "empty parents go");
        assert!(
            share.directory().join("m").exists(),
            "the share's own directories stay"
        );
        share.unbind("m/c1/1").expect("twice");
        assert_eq!(read(host.join("data/x")), "hello");
    });
}

#[test]
fn what_is_not_there_is_named_and_leaves_nothing() {
    with_share(|host, share| {
        let error = share
            .bind(&host.join("nowhere"), "m/c1/0", false)
            .expect_err("missing");
        assert!(error.to_string().contains("nowhere"), "{error}");
        assert!(!share.directory().join("m/c1").exists());
        fs::write(host.join("f"), "").expect("file");
        share.bind(&host.join("f"), "m/c1/0", false).expect("first");
        let error = share
            .bind(&host.join("f"), "m/c1/0", false)
            .expect_err("second");
        assert!(matches!(error, ShareError::Occupied { .. }), "{error}");
        share.unbind("m/c1/0").expect("unbind");
    });
}

#[test]
fn a_link_in_the_share_leads_nowhere() {
    with_share(|host, share| {
        fs::create_dir(host.join("outside")).expect("dir");
        fs::write(host.join("f"), "").expect("file");
        // What a hostile guest could leave behind in a writable share.
        symlink(host.join("outside"), share.directory().join("m/evil")).expect("link");
        assert!(share.bind(&host.join("f"), "m/evil/0", false).is_err());
        assert!(!host.join("outside/0").exists());
        assert!(share.unbind("m/evil/0").is_err() || !host.join("outside/0").exists());
    });
}

#[test]
fn paths_that_leave_the_share_are_refused() {
    with_share(|host, share| {
        for path in ["", "/m/x", "m//x", "m/../../x", "m/.", "m/\0"] {
            let error = share.bind(host, path, false).expect_err(path);
            assert!(
                matches!(error, ShareError::Place { .. }),
                "{path:?}: {error}"
            );
        }
    });
}

#[test]
fn options_are_split() {
    let options: Vec<String> = ["ro", "lowerdir=/a:/b", "nodev", "rw"]
        .map(str::to_owned)
        .to_vec();
    let (flags, data) = split_options(&options);
    assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NODEV);
    assert_eq!(data, "lowerdir=/a:/b");
    assert_eq!(unescape(r"/a\040b\134"), PathBuf::from(r"/a b\"));
}
