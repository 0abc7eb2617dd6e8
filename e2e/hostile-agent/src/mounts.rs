//! The `Mounts` service: mounts that do not exist.

use crate::attack::{Attack, Container, Containers};
use boxlite_proto::boxlite::v1::mounts_server::Mounts;
use boxlite_proto::boxlite::v1::*;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

/// Number of mounts in a list of the flood.
const MOUNTS: u64 = 20_000;
/// Name of the exported mount that hangs, below the volume.
const HANGING: &str = "hanging";
/// Byte range of a FUSE request's id.
const UNIQUE: std::ops::Range<usize> = 8..16;
/// Size of a FUSE request's header, in bytes.
const HEADER_BYTES: usize = 40;

pub(crate) struct MountsService(pub(crate) Arc<Containers>);

#[tonic::async_trait]
impl Mounts for MountsService {
    type WatchExportsStream = BoxStream<'static, Result<WatchExportsResponse, Status>>;

    async fn watch_exports(
        &self,
        _: Request<Streaming<WatchExportsRequest>>,
    ) -> Result<Response<Self::WatchExportsStream>, Status> {
        let state = (Arc::clone(&self.0), 0_u64, false);
        let lists = stream::unfold(state, |(containers, n, mut exported)| async move {
            let attacker = containers
                .wait(|c| {
                    c.started
                        && (c.attack == Attack::Mounts || c.attack == Attack::Fuse && !exported)
                })
                .await;
            let mounts = match attacker.attack {
                Attack::Fuse => {
                    exported = true;
                    vec![hanging_mount(&attacker)]
                }
                _ => (0..MOUNTS).map(|e| escape(&attacker, n + e)).collect(),
            };
            let list = WatchExportsResponse {
                generation: n.wrapping_mul(0x9e37_79b9_7f4a_7c15),
                mounts,
            };
            Some((Ok(list), (containers, n + 1, exported)))
        });
        Ok(Response::new(lists.boxed()))
    }

    type FuseStream = BoxStream<'static, Result<FuseResponse, Status>>;

    /// Answers the first request, FUSE_INIT, and reads the others.
    async fn fuse(
        &self,
        request: Request<Streaming<FuseRequest>>,
    ) -> Result<Response<Self::FuseStream>, Status> {
        let answers = stream::unfold(
            (request.into_inner(), false),
            |(mut requests, answered)| async move {
                let mut bytes = Vec::new();
                while let Ok(Some(request)) = requests.message().await {
                    bytes.extend_from_slice(&request.data);
                    if !answered && bytes.len() >= HEADER_BYTES {
                        let data = Bytes::from(init_reply(&bytes[UNIQUE]));
                        return Some((Ok(FuseResponse { data }), (requests, true)));
                    }
                }
                std::future::pending().await
            },
        );
        Ok(Response::new(answers.boxed()))
    }

    async fn refresh(
        &self,
        _: Request<RefreshRequest>,
    ) -> Result<Response<RefreshResponse>, Status> {
        Ok(Response::new(RefreshResponse { copied: true }))
    }
}

/// Returns the mount that hangs.
fn hanging_mount(attacker: &Container) -> ExportedMount {
    ExportedMount {
        id: u64::MAX,
        container_id: attacker.id.clone(),
        volume: attacker.volume.clone(),
        path: HANGING.to_owned(),
        read_only: false,
    }
}

/// Returns a mount that the host must refuse.
fn escape(attacker: &Container, n: u64) -> ExportedMount {
    let path = match n % 3 {
        0 => format!("../../../tmp/{n}"),
        1 => format!("/etc/{n}"),
        _ => "x/".repeat(100),
    };
    ExportedMount {
        id: n,
        container_id: attacker.foreign.clone(),
        volume: attacker.volume.repeat(n as usize % 2),
        path,
        read_only: n.is_multiple_of(2),
    }
}

/// Returns the reply to FUSE_INIT: version 7.31, no optional features.
fn init_reply(unique: &[u8]) -> Vec<u8> {
    let mut reply = Vec::new();
    let words = |reply: &mut Vec<u8>, words: &[u32]| {
        for word in words {
            reply.extend(word.to_le_bytes());
        }
    };
    words(&mut reply, &[80, 0]);
    reply.extend(unique);
    // Major, minor, read-ahead, flags, background and congestion limits, largest write, granularity of times, reserved.
    words(&mut reply, &[7, 31, 65_536, 0, 12 << 16 | 16, 65_536, 1]);
    words(&mut reply, &[0; 9]);
    reply
}
