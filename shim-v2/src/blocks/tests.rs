//! Tests of a device in a share through the host's FUSE, in a mount namespace of the test thread. They need root.

use super::*;
use crate::share::tests::with_share;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

const DISK_BYTES: u64 = 1 << 20;

/// Returns a file in place of a disk.
fn device() -> (Device, File) {
    let disk = tempfile::tempfile().expect("a file");
    disk.set_len(DISK_BYTES).expect("a size");
    let device = Device {
        file: disk.try_clone().expect("a clone"),
        size: DISK_BYTES,
        block_size: 512,
    };
    (device, disk)
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn attached_device_is_a_file_until_unbound() {
    with_share(|_, share| {
        let (device, disk) = device();
        let made = file_system(SOURCE, Root::File, false).expect("made");
        let (server, mount) = Server::start(made, device, false).expect("served");
        let name = share_path(Number { major: 7, minor: 1 }, false);
        share.attach(&mount, &name).expect("attached");
        drop(mount);
        let path = share.directory().join(&name);
        assert_eq!(path.metadata().expect("a file").len(), DISK_BYTES);
        let file = File::options().read(true).write(true).open(&path);
        let file = file.expect("opened");
        // Larger than one message.
        let bytes: Vec<u8> = (0..700_000_u32).map(|n| (n / 5) as u8).collect();
        file.write_all_at(&bytes, 4097).expect("written");
        file.sync_all().expect("flushed");
        let mut back = vec![0; bytes.len()];
        disk.read_exact_at(&mut back, 4097).expect("read");
        assert!(back == bytes, "writes reach the disk");
        disk.write_all_at(b"others", 0).expect("written");
        let mut seen = [0; 6];
        file.read_exact_at(&mut seen, 0).expect("read");
        assert_eq!(&seen, b"others", "the file system does not cache");
        assert!(file.write_all_at(b"x", DISK_BYTES).is_err());
        assert!(file.set_len(DISK_BYTES * 2).is_err());

        share.unbind(&name).expect("gone");
        assert!(!path.exists());
        drop(server);
        let began = Instant::now();
        while file.read_at(&mut seen, 0).is_ok() {
            assert!(began.elapsed() < OPEN_TIMEOUT, "the device is still served");
            std::thread::sleep(Duration::from_millis(10));
        }
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn attached_read_only_device_has_a_read_only_mount() {
    with_share(|_, share| {
        let (device, _disk) = device();
        let made = file_system(SOURCE, Root::File, true).expect("made");
        let (_server, mount) = Server::start(made, device, true).expect("served");
        let name = share_path(Number { major: 7, minor: 1 }, true);
        share.attach(&mount, &name).expect("attached");
        let path = share.directory().join(&name);
        assert!(File::open(&path).is_ok());
        let error = File::options()
            .write(true)
            .open(&path)
            .expect_err("refused");
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        let again = share.attach(&mount, &name).expect_err("occupied");
        assert!(again.to_string().contains(&name), "{again}");
        drop(mount);
        share.unbind(&name).expect("gone");
    });
}
