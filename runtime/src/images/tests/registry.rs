//! An in-process registry with injected faults: broken connections, wrong bytes, challenges, redirects.
//!
//! Supports the HTTP/1.1 subset that the client needs, with one request per connection to control every byte.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::images::manifest::{DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST};
use crate::images::reference::Digest;

/// Compression of a layer in the registry.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pack {
    Plain,
    Gzip,
    Zstd,
}

/// Faults and requirements of the server.
#[derive(Debug, Clone, Default)]
pub(crate) struct Faults {
    /// Closes the connection after (bytes of a blob's body, for the next number of blob requests).
    pub cut: Option<(usize, usize)>,
    /// Sends the whole blob in spite of a Range.
    pub ignore_range: bool,
    /// Delay before each blob's body in milliseconds.
    pub delay_ms: u64,
    /// Delay after each 10 bytes of a blob's body in milliseconds.
    pub drip_ms: u64,
    /// `user:password` required by Basic authentication.
    pub basic: Option<String>,
    /// `user:password` required by the token endpoint; requests need its token.
    pub bearer: Option<String>,
    /// Origin to which blobs are redirected.
    pub redirect: Option<String>,
    /// Status of every response.
    pub status: Option<u16>,
}

/// A received request.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub path: String,
    pub range: Option<u64>,
    pub authorization: Option<String>,
    /// `x-key` header.
    pub key: Option<String>,
}

#[derive(Default)]
struct State {
    blobs: HashMap<String, Vec<u8>>,
    /// By `repository/manifests/reference`.
    manifests: HashMap<String, (String, Vec<u8>)>,
    faults: Faults,
    requests: Vec<Request>,
    /// Bytes of blob bodies sent.
    sent: u64,
}

pub(crate) struct Registry {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Digests of a pushed image.
#[derive(Debug, Clone)]
pub(crate) struct Pushed {
    pub config: String,
    pub manifest: String,
    /// Blob digests, lowest first.
    pub blobs: Vec<String>,
}

impl Registry {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // The task ends with its connection.
                tokio::spawn(serve(stream, shared.clone(), address));
            }
        });
        Self {
            address,
            state,
            task,
        }
    }

    pub(crate) fn name(&self, repository: &str) -> String {
        format!("{}/{repository}", self.address)
    }

    pub(crate) fn faults(&self, faults: Faults) {
        self.state.lock().unwrap().faults = faults;
    }

    /// Returns and clears the recorded requests.
    pub(crate) fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    /// Returns the recorded requests.
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.state.lock().unwrap().requests.clone()
    }

    /// Returns the offsets of the requests for a blob, and clears the recorded requests.
    pub(crate) fn take_ranges(&self, blob: &str) -> Vec<Option<u64>> {
        let requests = self.take_requests().into_iter();
        requests
            .filter(|r| r.path.contains(blob))
            .map(|r| r.range)
            .collect()
    }

    pub(crate) fn sent(&self) -> u64 {
        self.state.lock().unwrap().sent
    }

    pub(crate) fn put_blob(&self, bytes: &[u8]) -> String {
        let digest = Digest::of(bytes).to_string();
        self.state
            .lock()
            .unwrap()
            .blobs
            .insert(digest.clone(), bytes.to_vec());
        digest
    }

    /// Modifies the bytes served under a digest.
    pub(crate) fn spoil_blob(&self, digest: &str, spoil: impl FnOnce(&mut Vec<u8>)) {
        spoil(self.state.lock().unwrap().blobs.get_mut(digest).unwrap());
    }

    pub(crate) fn put_manifest(
        &self,
        repository: &str,
        tag: &str,
        media_type: &str,
        body: serde_json::Value,
    ) -> String {
        let bytes = body.to_string().into_bytes();
        let digest = Digest::of(&bytes).to_string();
        let mut state = self.state.lock().unwrap();
        for reference in [tag, &digest] {
            state.manifests.insert(
                format!("{repository}/manifests/{reference}"),
                (media_type.into(), bytes.clone()),
            );
        }
        digest
    }

    /// Pushes an image of these layers with an index whose first entry is for another platform.
    pub(crate) fn push(&self, repository: &str, tag: &str, layers: &[(&[u8], Pack)]) -> Pushed {
        self.push_with(repository, tag, layers, false, |_| {})
    }

    /// As `push`, optionally with Docker's media types, and with a config modified by `edit`.
    pub(crate) fn push_with(
        &self,
        repository: &str,
        tag: &str,
        layers: &[(&[u8], Pack)],
        docker: bool,
        edit: impl FnOnce(&mut serde_json::Value),
    ) -> Pushed {
        let diff_ids: Vec<String> = layers
            .iter()
            .map(|(tar, _)| Digest::of(tar).to_string())
            .collect();
        let mut config = json!({
            "architecture": "amd64", "os": "linux", "config": {"User": "1000:5", "Cmd": ["sh"], "Env": ["A=b"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        edit(&mut config);
        let config_bytes = config.to_string().into_bytes();
        let mut blobs = Vec::new();
        let mut descriptors = Vec::new();
        for (tar, pack) in layers {
            let bytes = packed(tar, *pack);
            let suffix = match (pack, docker) {
                (Pack::Plain, _) => "",
                (Pack::Gzip, false) => "+gzip",
                (Pack::Zstd, false) => "+zstd",
                (Pack::Gzip, true) => ".gzip",
                (Pack::Zstd, true) => ".zstd",
            };
            let base = if docker {
                "application/vnd.docker.image.rootfs.diff.tar"
            } else {
                "application/vnd.oci.image.layer.v1.tar"
            };
            let digest = self.put_blob(&bytes);
            descriptors.push(json!({"mediaType": format!("{base}{suffix}"), "digest": digest, "size": bytes.len()}));
            blobs.push(digest);
        }
        let config_digest = self.put_blob(&config_bytes);
        let (manifest_type, index_type) = if docker {
            (DOCKER_MANIFEST, DOCKER_LIST)
        } else {
            (OCI_MANIFEST, OCI_INDEX)
        };
        let manifest = json!({
            "schemaVersion": 2, "mediaType": manifest_type,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config_bytes.len()},
            "layers": descriptors,
        });
        let length = manifest.to_string().len();
        let manifest_digest = self.put_manifest(repository, "unused", manifest_type, manifest);
        let entry = |arch: &str, digest: &str| json!({"mediaType": manifest_type, "digest": digest, "size": length, "platform": {"os": "linux", "architecture": arch}});
        let foreign = Digest::of(b"foreign").to_string();
        let index = json!({
            "schemaVersion": 2, "mediaType": index_type,
            "manifests": [entry("s390x", &foreign), entry("amd64", &manifest_digest)],
        });
        let manifest = self.put_manifest(repository, tag, index_type, index);
        Pushed {
            config: config_digest,
            manifest,
            blobs,
        }
    }
}

pub(crate) fn packed(tar: &[u8], pack: Pack) -> Vec<u8> {
    use std::io::Write;
    match pack {
        Pack::Plain => tar.to_vec(),
        Pack::Zstd => zstd::encode_all(tar, 1).unwrap(),
        Pack::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(tar).unwrap();
            encoder.finish().unwrap()
        }
    }
}

async fn serve(mut stream: TcpStream, state: Arc<Mutex<State>>, address: SocketAddr) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        match stream.read(&mut byte).await {
            Ok(1) => head.push(byte[0]),
            _ => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let header = |name: &str| {
        head.lines().find_map(|l| {
            let (key, value) = l.split_once(':')?;
            (key.eq_ignore_ascii_case(name)).then(|| value.trim().to_owned())
        })
    };
    let request = Request {
        path: head.split(' ').nth(1).unwrap().to_owned(),
        range: header("range")
            .and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()),
        authorization: header("authorization"),
        key: header("x-key"),
    };
    let (response, body, delay) = respond(&mut state.lock().unwrap(), &request, address);
    let drip = match request.path.contains("/blobs/") {
        true => state.lock().unwrap().faults.drip_ms,
        false => 0,
    };
    let _ = stream.write_all(response.as_bytes()).await;
    if delay > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(delay)).await;
    }
    for part in body.chunks(if drip > 0 { 10 } else { usize::MAX }) {
        if stream.write_all(part).await.is_err() {
            return;
        }
        if drip > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(drip)).await;
        }
    }
    let _ = stream.shutdown().await;
}

/// Returns head, body and the delay between them. The Content-Length may exceed the body.
fn respond(state: &mut State, request: &Request, address: SocketAddr) -> (String, Vec<u8>, u64) {
    state.requests.push(request.clone());
    let answer = |status: &str, extra: &str, length: usize, body: &[u8]| {
        (
            format!(
                "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{extra}\r\n"
            ),
            body.to_vec(),
            0,
        )
    };
    let path = request.path.split('?').next().unwrap();
    let encoded = |pair: &String| base64::engine::general_purpose::STANDARD.encode(pair);
    if path == "/token" {
        let pair = state.faults.bearer.clone().unwrap_or_default();
        return if request.authorization == Some(format!("Basic {}", encoded(&pair))) {
            answer("200 OK", "", 15, br#"{"token":"tok"}"#)
        } else {
            answer("401 No", "", 0, b"")
        };
    }
    if let Some(status) = state.faults.status {
        let body = br#"{"errors":[{"code":"BROKEN","message":"by\u0007 order"}]}"#;
        return answer(&format!("{status} X"), "", body.len(), body);
    }
    if let Some(pair) = &state.faults.basic
        && request.authorization != Some(format!("Basic {}", encoded(pair)))
    {
        return answer("401 No", "WWW-Authenticate: Basic realm=\"r\"\r\n", 0, b"");
    }
    if state.faults.bearer.is_some() && request.authorization.as_deref() != Some("Bearer tok") {
        let challenge =
            format!("WWW-Authenticate: Bearer realm=\"http://{address}/token\",service=\"s\"\r\n");
        return answer("401 No", &challenge, 0, b"");
    }
    let path = path.strip_prefix("/v2/").unwrap_or("");
    if let Some((media_type, bytes)) = state.manifests.get(path) {
        return answer(
            "200 OK",
            &format!("Content-Type: {media_type}\r\n"),
            bytes.len(),
            bytes,
        );
    }
    let blob = path
        .rsplit_once("/blobs/")
        .and_then(|(_, digest)| state.blobs.get(digest))
        .cloned();
    let Some(blob) = blob else {
        return answer("404 Not Found", "", 0, b"");
    };
    if let Some(origin) = &state.faults.redirect {
        return answer(
            "307 There",
            &format!("Location: {origin}{}\r\n", request.path),
            0,
            b"",
        );
    }
    let offset = if state.faults.ignore_range {
        0
    } else {
        request.range.unwrap_or(0) as usize
    };
    let rest = &blob[offset.min(blob.len())..];
    let mut body = rest;
    if let Some((bytes, times)) = &mut state.faults.cut
        && *times > 0
        && body.len() > *bytes
    {
        *times -= 1;
        body = &body[..*bytes];
    }
    state.sent += body.len() as u64;
    let delay = state.faults.delay_ms;
    let (status, extra) = if offset > 0 {
        (
            "206 Partial",
            format!(
                "Content-Range: bytes {offset}-{}/{}\r\n",
                blob.len() - 1,
                blob.len()
            ),
        )
    } else {
        ("200 OK", String::new())
    };
    let (head, body, _) = answer(status, &extra, rest.len(), body);
    (head, body, delay)
}
