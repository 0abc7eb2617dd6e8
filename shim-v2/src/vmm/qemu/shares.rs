//! Step 4: the pod's virtiofs share, served by virtiofsd over vhost-user.

use super::context::Context;
use crate::vmm::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::names::SHARE_TAG;
use boxlite_proto::vmm::InstanceSpec;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::lchown;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Socket of virtiofsd in the VM's working directory.
const SOCKET: &str = "fs";

pub(super) fn configure(context: &mut Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    context.share_socket = Some(listen(&spec.work_dir, SOCKET)?);
    if let Some(user) = spec.user {
        // QEMU connects to it.
        lchown(spec.work_dir.join(SOCKET), Some(user), Some(user))
            .step("change the owner of virtiofsd's socket")?;
    }
    context.option("-chardev", format!("socket,id=fs,path={SOCKET}"));
    context.option(
        "-device",
        format!("vhost-user-fs-device,chardev=fs,tag={SHARE_TAG},queue-size=1024"),
    );
    Ok(())
}

fn listen(directory: &Path, name: &str) -> BoxliteResult<UnixListener> {
    let step = "bind virtiofsd's socket";
    match std::fs::remove_file(directory.join(name)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).step(step),
        _ => {}
    }
    // A unix socket address holds 107 bytes and the path may be longer, so it is bound through a descriptor.
    let directory = File::open(directory).step(step)?;
    UnixListener::bind(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd())).step(step)
}

/// Returns virtiofsd's arguments, given the descriptor number of its inherited socket.
pub(super) fn virtiofsd_args(share: &Path, socket: i32) -> Vec<String> {
    let mut args = vec![
        format!("--fd={socket}"),
        format!("--shared-dir={}", share.display()),
    ];
    // It already runs in our jail with fewer capabilities than it would keep. No file handles: they need CAP_DAC_READ_SEARCH,
    // which opens every file of the host. No announced submounts: the guest's kernel (6.12) has a BUG when a submount ends
    // with its mount namespace while one of its files is being closed ("Busy inodes after unmount of virtiofs").
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
    // 0: keep the inherited limit, which the vmm child has raised.
    args.push("--rlimit-nofile=0".to_owned());
    args
}
