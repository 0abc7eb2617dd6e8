//! [`Blocks`]: block devices of the host that containers of this pod have, each served to the VM as a regular file of its share.
//!
//! A VM's devices are fixed when it boots, and which ones its containers want is known only then: so the way in is the share,
//! as for everything else. virtiofs cannot carry a device, but a file: a FUSE file system that is one file, mounted at
//! `b/<number>` of the share and nowhere else. The guest makes a loop device of it. [`wish`] reads what is wanted out of a
//! spec, [`device`] opens, [`server`] answers.
//!
//! ```text
//! container ─► loop device ─► virtiofs ─► the VM's file server ─► FUSE ─► server ─► the device of the host
//! ```
//! The mount is in the shim's own mount namespace and the jail's, so it goes with them, however they end.

pub mod device;
mod server;
pub mod wish;

use crate::error::{Result, ShimError};
use crate::fuse::{Root, file_system};
use crate::pod::Share;
use crate::pod::undo::Undo;
use boxlite_proto::boxlite::v1::BlockDevice;
use device::{Device, Number};
use server::Server;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use wish::Wish;

/// Devices of one pod; each costs a thread with 2 MiB of buffers. Kubernetes' own limits of volumes on a node are of this
/// size.
const LIMIT: usize = 64;
/// How long opening a device may take: one on a network answers or not.
const OPEN_LIMIT: Duration = Duration::from_secs(10);
/// Source of the mounts, for people.
const SOURCE: &str = "boxlite-block";

/// A device that is served.
struct Served {
    server: Server,
    block_size: u32,
    users: usize,
}

/// By path below the share. An async lock: it is held while a device is being opened, so that a second user waits for it.
#[derive(Clone, Default)]
pub struct Blocks(Arc<Mutex<HashMap<String, Served>>>);

impl Blocks {
    /// Serves what `wish` names, for one more container; `undo` gives it back. Answers what the guest is told.
    ///
    /// # Errors
    /// Invalid naming the device, or the share's; nothing is left behind then. A dropped future leaves at most a thread
    /// that opens the device and closes it.
    pub async fn serve(
        &self,
        share: &Arc<dyn Share>,
        wish: &Wish,
        undo: &mut Undo,
    ) -> Result<BlockDevice> {
        let file = place(wish.number, wish.read_only());
        let mut all = self.0.lock().await;
        if !all.contains_key(&file) {
            if all.len() >= LIMIT {
                return Err(wish.refuse(format!("the pod has {LIMIT} already")));
            }
            let (server, mount, block_size) = begin(wish).await?;
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
            blocks.give_back(&share, &key).await
        });
        Ok(BlockDevice {
            file,
            path: wish.path.display().to_string(),
            access: wish.access.clone(),
            block_size,
            mode: wish.mode,
            uid: wish.uid,
            gid: wish.gid,
        })
    }

    async fn give_back(&self, share: &Arc<dyn Share>, file: &str) -> Result<()> {
        let mut all = self.0.lock().await;
        match all.get_mut(file) {
            Some(served) if served.users > 1 => {
                served.users -= 1;
                Ok(())
            }
            Some(_) => {
                // First the mount: what still uses it gets errors from then on, and never waits.
                let gone = share.unbind(file).await;
                if let Some(served) = all.remove(file) {
                    drop(served.server);
                }
                gone
            }
            None => Ok(()),
        }
    }
}

/// Where a device is in the share. One that is read-only is another one.
fn place(number: Number, read_only: bool) -> String {
    let Number { major, minor } = number;
    let access = if read_only { "ro" } else { "rw" };
    format!("b/{major}-{minor}-{access}")
}

/// Opens the device and starts its server, on a thread that may wait for the disk.
async fn begin(wish: &Wish) -> Result<(Server, OwnedFd, u32)> {
    let (number, read_only) = (wish.number, wish.read_only());
    let opening = tokio::task::spawn_blocking(move || -> std::io::Result<_> {
        let device = Device::open(number, read_only)?;
        let block_size = device.block_size;
        let made = file_system(SOURCE, Root::File, read_only)?;
        let (server, mount) = Server::begin(made, device, read_only)?;
        Ok((server, mount, block_size))
    });
    match tokio::time::timeout(OPEN_LIMIT, opening).await {
        Ok(Ok(Ok(served))) => Ok(served),
        Ok(Ok(Err(error))) => Err(wish.refuse(error.to_string())),
        Ok(Err(_)) => Err(ShimError::Ending),
        Err(_) => Err(wish.refuse(format!("not opened within {OPEN_LIMIT:?}"))),
    }
}

#[cfg(test)]
mod tests;
