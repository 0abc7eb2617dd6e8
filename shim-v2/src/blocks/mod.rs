//! [`Blocks`]: block devices of the host used by this pod's containers, each served to the VM as a regular file in its share.
//!
//! A VM's devices are fixed at boot, before its containers are known, so block devices go through the share like everything
//! else. virtiofs cannot carry a device node but carries a file: a FUSE file system whose root is one file, mounted at
//! `b/<number>` of the share. The guest attaches a loop device to it. [`request`] extracts the devices from a spec, [`device`]
//! opens them, [`server`] answers FUSE requests.
//!
//! ```text
//! container ─► loop device ─► virtiofs ─► the VM's file server ─► FUSE ─► server ─► the device of the host
//! ```
//! The mount exists only in the mount namespaces of the shim and the jail, so it ends with them.

pub mod device;
pub mod request;
mod server;

use crate::error::{Result, ShimError};
use crate::fuse::{Root, file_system};
use crate::pod::Share;
use crate::pod::undo::Undo;
use boxlite_proto::boxlite::v1::BlockDevice;
use device::{Device, Number};
use request::DeviceRequest;
use server::Server;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// Maximum number of devices per pod, in line with Kubernetes' volume limits per node. Each costs a thread with 2 MiB of
/// buffers.
const MAX_DEVICES: usize = 64;
/// Timeout for opening a device, which may be on a network.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Source of the mounts in mount tables.
const SOURCE: &str = "boxlite-block";

/// A device with its server and number of users.
struct Served {
    server: Server,
    block_size: u32,
    users: usize,
}

/// Devices by path below the share. The lock is async because it is held while a device opens, so that a second user waits.
#[derive(Clone, Default)]
pub struct Blocks(Arc<Mutex<HashMap<String, Served>>>);

impl Blocks {
    /// Serves the requested device to one more container; `undo` releases it. Returns the description for the guest.
    ///
    /// # Errors
    /// Invalid with the device, or the share's error; nothing remains then. A dropped future leaves at most a thread that opens
    /// and closes the device.
    pub async fn serve(
        &self,
        share: &Arc<dyn Share>,
        request: &DeviceRequest,
        undo: &mut Undo,
    ) -> Result<BlockDevice> {
        let file = share_path(request.number, request.read_only());
        let mut all = self.0.lock().await;
        if !all.contains_key(&file) {
            if all.len() >= MAX_DEVICES {
                return Err(request.refuse(format!(
                    "too many devices in the pod (maximum {MAX_DEVICES})"
                )));
            }
            let (server, mount, block_size) = open_and_serve(request).await?;
            share.attach(mount, &file).await?;
            let served = Served {
                server,
                block_size,
                users: 0,
            };
            all.insert(file.clone(), served);
        }
        let Some(served) = all.get_mut(&file) else {
            return Err(ShimError::Ending);
        };
        served.users += 1;
        let block_size = served.block_size;
        drop(all);
        let (blocks, share, key) = (self.clone(), share.clone(), file.clone());
        undo.push("block device", move || async move {
            blocks.release(&share, &key).await
        });
        Ok(BlockDevice {
            file,
            path: request.path.display().to_string(),
            access: request.access.clone(),
            block_size,
            mode: request.mode,
            uid: request.uid,
            gid: request.gid,
        })
    }

    async fn release(&self, share: &Arc<dyn Share>, file: &str) -> Result<()> {
        let mut all = self.0.lock().await;
        match all.get_mut(file) {
            Some(served) if served.users > 1 => {
                served.users -= 1;
                Ok(())
            }
            Some(_) => {
                // Unmount first: remaining users get errors from then on instead of blocking.
                let unbound = share.unbind(file).await;
                if let Some(served) = all.remove(file) {
                    drop(served.server);
                }
                unbound
            }
            None => Ok(()),
        }
    }
}

/// Returns the path of a device in the share. Read-only and writable access are separate.
fn share_path(number: Number, read_only: bool) -> String {
    let Number { major, minor } = number;
    let access = if read_only { "ro" } else { "rw" };
    format!("b/{major}-{minor}-{access}")
}

/// Opens the device and starts its server, on a thread that may block on the device.
async fn open_and_serve(request: &DeviceRequest) -> Result<(Server, OwnedFd, u32)> {
    let (number, read_only) = (request.number, request.read_only());
    let opening = tokio::task::spawn_blocking(move || -> std::io::Result<_> {
        let device = Device::open(number, read_only)?;
        let block_size = device.block_size;
        let made = file_system(SOURCE, Root::File, read_only)?;
        let (server, mount) = Server::start(made, device, read_only)?;
        Ok((server, mount, block_size))
    });
    match tokio::time::timeout(OPEN_TIMEOUT, opening).await {
        Ok(Ok(Ok(served))) => Ok(served),
        Ok(Ok(Err(error))) => Err(request.refuse(error.to_string())),
        Ok(Err(_)) => Err(ShimError::Ending),
        Err(_) => Err(request.refuse(format!("failed to open within {OPEN_TIMEOUT:?}"))),
    }
}

#[cfg(test)]
mod tests;
