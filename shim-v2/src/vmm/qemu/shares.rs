//! Step 4: the pod's one virtiofs share, served by virtiofsd over vhost-user.

use super::context::Context;
use crate::vmm::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::names::SHARE_TAG;
use boxlite_proto::vmm::InstanceSpec;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// In the VM's working directory: where QEMU finds virtiofsd.
const SOCKET: &str = "fs";

pub(super) fn configure(context: &mut Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    context.share_socket = Some(listen(&spec.work_dir, SOCKET)?);
    context.option("-chardev", format!("socket,id=fs,path={SOCKET}"));
    context.option(
        "-device",
        format!("vhost-user-fs-device,chardev=fs,tag={SHARE_TAG},queue-size=1024"),
    );
    Ok(())
}

fn listen(directory: &Path, name: &str) -> BoxliteResult<UnixListener> {
    let step = "binding virtiofsd's socket";
    match std::fs::remove_file(directory.join(name)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).step(step),
        _ => {}
    }
    // Through the descriptor: a unix address holds 107 bytes, a path may be longer.
    let directory = File::open(directory).step(step)?;
    UnixListener::bind(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd())).step(step)
}

/// Arguments of virtiofsd, given the number under which it inherits the socket.
pub(super) fn virtiofsd_args(share: &Path, socket: i32) -> Vec<String> {
    let mut args = vec![
        format!("--fd={socket}"),
        format!("--shared-dir={}", share.display()),
    ];
    // It is in our jail already, with fewer capabilities than it would keep. No file handles: CAP_DAC_READ_SEARCH, which
    // they take, opens every file of the host. No announced submounts: the guest's kernel (6.12) has a BUG when one ends
    // with its mount namespace while a file of it is being closed ("Busy inodes after unmount of virtiofs").
    args.extend(
        [
            "--sandbox=none",
            "--cache=auto",
            "--inode-file-handles=never",
            "--no-announce-submounts",
            "--modcaps=-mknod",
            "--xattr",
            "--log-level=warn",
        ]
        .map(str::to_owned),
    );
    // 0: as inherited, which the vmm child has raised.
    args.push("--rlimit-nofile=0".to_owned());
    args
}
