//! ImageFsInfo: usage of the image store, and of the scratch disks that hold the writable layers.

use super::Server;
use crate::convert::{image, time};
use boxlite_proto::cri::v1::{
    FilesystemIdentifier, FilesystemUsage, ImageFsInfoResponse, UInt64Value,
};
use std::os::unix::fs::MetadataExt;
use tonic::Status;

/// Unit of `st_blocks` (stat(2)).
const BLOCK_BYTES: u64 = 512;

/// Handles ImageFsInfo.
pub(crate) async fn info(server: &Server) -> Result<ImageFsInfoResponse, Status> {
    let info = server
        .runtime
        .images()
        .fs_info()
        .await
        .map_err(|error| image::status(&error))?;
    Ok(ImageFsInfoResponse {
        image_filesystems: vec![image::usage(&info)],
        container_filesystems: vec![scratch_disks(server)],
    })
}

/// Returns the allocated size of the pods' sparse disks on the host.
fn scratch_disks(server: &Server) -> FilesystemUsage {
    let layout = server.runtime.layout();
    let sizes: Vec<u64> = server
        .runtime
        .boxes()
        .iter()
        .filter_map(|pod| std::fs::metadata(layout.scratch(&pod.id)).ok())
        .map(|disk| disk.blocks().saturating_mul(BLOCK_BYTES))
        .collect();
    FilesystemUsage {
        timestamp: time::now_ns(),
        fs_id: Some(FilesystemIdentifier {
            mountpoint: layout.scratch_dir().to_string_lossy().into_owned(),
        }),
        used_bytes: Some(UInt64Value {
            value: sizes
                .iter()
                .fold(0, |sum: u64, size| sum.saturating_add(*size)),
        }),
        inodes_used: Some(UInt64Value {
            value: sizes.len() as u64,
        }),
    }
}
