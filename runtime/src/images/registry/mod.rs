//! [`Session`]: the requests of one pull to the hosts of a registry.
//!
//! Built on reqwest instead of the crate oci-client, which supports neither containerd's `hosts.toml` (mirrors with paths,
//! certificates and headers) nor resuming a blob at an offset on another host.
//!
//! Returns manifests and configs with verified digests, and blobs as a stream whose digest the caller verifies. Called by
//! `pull` and `download`.
//!
//! Hosts are tried in order, the registry itself last; the last host's error determines the kind of the error.

mod auth;
mod hosts;
mod http;
mod scope;

use boxlite_sys::sync::Mutex;
use std::collections::HashMap;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE,
};
use reqwest::{Response, Url};

use super::error::{ImageError, ImageErrorKind, ImageResult};
use super::manifest::{
    DOCKER_LIST, DOCKER_MANIFEST, Descriptor, MAX_MANIFEST_BYTES, OCI_INDEX, OCI_MANIFEST,
};
use super::reference::{Digest, Reference};
use super::types::RegistryAuth;
use hosts::RegistryHost;

pub(super) use hosts::HostDirectory;

/// Maximum number of rounds over all hosts for a manifest or config while the errors are temporary.
const MAX_ROUNDS: u32 = 3;
/// Delay before the second round; doubles.
const ROUND_DELAY: Duration = Duration::from_millis(300);

/// Session of one pull. Dropping it, or a future of its methods, closes the connections.
pub(super) struct Session {
    reference: Reference,
    hosts: Vec<RegistryHost>,
    auth: Option<RegistryAuth>,
    /// Authorization header by origin (scheme, host, port), after a challenge.
    tokens: Mutex<HashMap<String, HeaderValue>>,
}

/// A manifest or index with its verified digest.
pub(super) struct FetchedManifest {
    pub digest: Digest,
    pub media_type: Option<String>,
    pub bytes: Vec<u8>,
}

/// An open blob download.
pub(super) struct BlobStream {
    /// Host, for messages.
    pub host: String,
    pub response: Response,
    /// Leading bytes to skip, because the host ignored the Range.
    pub skip: u64,
}

impl Session {
    /// Reads the host configuration for `reference`, without sending requests.
    pub(super) fn new(
        directory: &HostDirectory,
        reference: &Reference,
        auth: Option<RegistryAuth>,
    ) -> ImageResult<Self> {
        let hosts = directory.hosts(reference.domain())?;
        Ok(Self {
            reference: reference.clone(),
            hosts,
            auth,
            tokens: Mutex::default(),
        })
    }

    /// Fetches the manifest or index `target` (a tag or digest).
    pub(super) async fn manifest(
        &self,
        target: &str,
        expected: Option<&Digest>,
    ) -> ImageResult<FetchedManifest> {
        let what = match expected {
            Some(digest) => format!("manifest {digest} of {}", self.reference.name()),
            None => format!("manifest {}:{target}", self.reference.name()),
        };
        let by_tag = expected.is_none();
        let can = |host: &RegistryHost| if by_tag { host.resolve } else { host.pull };
        self.on_hosts(&what, can, |host| {
            self.manifest_from(host, target, expected, &what).boxed()
        })
        .await
    }

    async fn manifest_from(
        &self,
        host: &RegistryHost,
        target: &str,
        expected: Option<&Digest>,
        what: &str,
    ) -> ImageResult<FetchedManifest> {
        let path = format!("manifests/{target}");
        let accept =
            format!("{OCI_INDEX}, {DOCKER_LIST}, {OCI_MANIFEST}, {DOCKER_MANIFEST}, */*;q=0.1");
        let response = self.get(host, &path, what, &accept, 0).await?;
        let media_type = response
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|v| v.to_str().ok())
            .map(|v| v.split(';').next().unwrap_or(v).trim().to_owned());
        let bytes = http::body(response, MAX_MANIFEST_BYTES, &host.name, what).await?;
        let digest = Digest::of(&bytes);
        if let Some(expected) = expected.filter(|e| **e != digest) {
            return Err(ImageError::corrupt(
                format!("{what} from {}", host.name),
                expected.as_str(),
                digest.as_str(),
            ));
        }
        Ok(FetchedManifest {
            digest,
            media_type,
            bytes,
        })
    }

    /// Fetches a small blob and verifies its size and digest.
    pub(super) async fn small_blob(
        &self,
        what: &str,
        descriptor: &Descriptor,
        limit: u64,
    ) -> ImageResult<Vec<u8>> {
        if descriptor.size > limit {
            return Err(ImageError::TooLarge {
                subject: what.into(),
                limit,
                unit: "bytes",
            });
        }
        let ask = |host| self.small_blob_from(host, what, descriptor, limit).boxed();
        self.on_hosts(what, |host| host.pull, ask).await
    }

    async fn small_blob_from(
        &self,
        host: &RegistryHost,
        what: &str,
        descriptor: &Descriptor,
        limit: u64,
    ) -> ImageResult<Vec<u8>> {
        let path = format!("blobs/{}", descriptor.digest);
        let response = self.get(host, &path, what, "*/*", 0).await?;
        let bytes = http::body(response, limit, &host.name, what).await?;
        let digest = Digest::of(&bytes);
        if bytes.len() as u64 != descriptor.size || digest != descriptor.digest {
            let show = |d: &Digest, size| format!("{d} ({size} bytes)");
            return Err(ImageError::corrupt(
                format!("{what} from {}", host.name),
                show(&descriptor.digest, descriptor.size),
                show(&digest, bytes.len() as u64),
            ));
        }
        Ok(bytes)
    }

    /// Opens the blob at `offset`. `turn` rotates the hosts, so that a failing host is not always tried first.
    pub(super) async fn blob(
        &self,
        digest: &Digest,
        offset: u64,
        turn: usize,
    ) -> ImageResult<BlobStream> {
        let what = format!("blob {digest} of {}", self.reference.name());
        let path = format!("blobs/{digest}");
        let pullers: Vec<&RegistryHost> = self.hosts.iter().filter(|h| h.pull).collect();
        let mut failures = Vec::new();
        for at in 0..pullers.len() {
            let host = pullers[(at + turn) % pullers.len()];
            match self
                .get(host, &path, &what, "*/*", offset)
                .await
                .and_then(|r| blob_stream(host, r, offset, &what))
            {
                Ok(stream) => return Ok(stream),
                Err(e) => failures.push(e),
            }
        }
        Err(combine(&what, failures))
    }

    /// Runs `ask` on every host that `can` serve it until one succeeds; repeats while errors are temporary.
    async fn on_hosts<'a, T>(
        &'a self,
        what: &str,
        can: impl Fn(&RegistryHost) -> bool,
        ask: impl Fn(&'a RegistryHost) -> BoxFuture<'a, ImageResult<T>>,
    ) -> ImageResult<T> {
        let mut round = 0;
        loop {
            let mut failures = Vec::new();
            for host in self.hosts.iter().filter(|h| can(h)) {
                match ask(host).await {
                    Ok(answer) => return Ok(answer),
                    Err(e) => failures.push(e),
                }
            }
            round += 1;
            if round == MAX_ROUNDS || !failures.iter().any(|e| e.is_transient() && !refused(e)) {
                return Err(combine(what, failures));
            }
            tokio::time::sleep(ROUND_DELAY * 2u32.pow(round - 1)).await;
        }
    }

    /// Sends a GET request below the repository and answers an authentication challenge.
    async fn get(
        &self,
        host: &RegistryHost,
        path: &str,
        what: &str,
        accept: &str,
        offset: u64,
    ) -> ImageResult<Response> {
        let url = self.url(host, path)?;
        let mut public = HeaderMap::new();
        if let Ok(accept) = HeaderValue::from_str(accept) {
            public.insert(ACCEPT, accept);
        }
        if offset > 0
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={offset}-"))
        {
            public.insert(RANGE, range);
        }
        let mut challenged = false;
        loop {
            let mut private = host.headers.clone();
            if let Some(token) = self.token(host) {
                private.insert(AUTHORIZATION, token);
            }
            let answer = http::get(&host.client, &url, &private, &public, &host.name, what).await?;
            let status = answer.response.status().as_u16();
            match status {
                200 | 206 => return Ok(answer.response),
                401 if !challenged && answer.same_origin => {
                    challenged = true;
                    let scope = format!("repository:{}:pull", self.reference.path());
                    let request = auth::AuthRequest {
                        client: &host.client,
                        url: &url,
                        host: &host.name,
                        what,
                        scope: &scope,
                    };
                    let token =
                        auth::answer(&request, answer.response.headers(), self.credentials(host))
                            .await?;
                    self.tokens_lock().insert(origin(host), token);
                }
                401 | 403 => {
                    let said = http::error_text(answer, &host.name).await;
                    let reason = if said.is_empty() {
                        format!("status {status}")
                    } else {
                        said
                    };
                    return Err(ImageError::Unauthorized {
                        host: host.name.clone(),
                        subject: what.into(),
                        reason,
                    });
                }
                404 => {
                    return Err(ImageError::NotFound {
                        subject: what.into(),
                        host: Some(host.name.clone()),
                    });
                }
                status => {
                    let message = http::error_text(answer, &host.name).await;
                    return Err(ImageError::Status {
                        host: host.name.clone(),
                        subject: what.into(),
                        status,
                        message,
                    });
                }
            }
        }
    }

    fn url(&self, host: &RegistryHost, path: &str) -> ImageResult<Url> {
        let mut url = host.base.clone();
        url.set_path(&format!(
            "{}/{}/{path}",
            host.base.path(),
            self.reference.path()
        ));
        if host.mirror {
            // As containerd does, for mirrors of several registries.
            url.query_pairs_mut()
                .append_pair("ns", self.reference.domain());
        }
        Ok(url)
    }

    fn token(&self, host: &RegistryHost) -> Option<HeaderValue> {
        let token = self.tokens_lock().get(&origin(host)).cloned();
        token.or_else(|| auth::preset(self.credentials(host)))
    }

    /// Returns the credentials if they are for this host.
    fn credentials(&self, host: &RegistryHost) -> Option<&RegistryAuth> {
        let domain = self.reference.domain();
        self.auth
            .as_ref()
            .filter(|auth| scope::covers(auth, domain, &host.base))
    }

    fn tokens_lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, HeaderValue>> {
        self.tokens.lock()
    }
}

fn blob_stream(
    host: &RegistryHost,
    response: Response,
    offset: u64,
    what: &str,
) -> ImageResult<BlobStream> {
    let skip = if response.status().as_u16() == 206 {
        let range = response
            .headers()
            .get(CONTENT_RANGE)
            .and_then(|v| v.to_str().ok())
            .unwrap_or("");
        let start = range
            .strip_prefix("bytes ")
            .and_then(|r| r.split('-').next())
            .and_then(|s| s.trim().parse().ok());
        if start != Some(offset) {
            return Err(ImageError::Protocol {
                host: host.name.clone(),
                subject: what.to_owned(),
                reason: format!("requested byte {offset}, got Content-Range {range:?}"),
            });
        }
        0
    } else {
        offset
    };
    Ok(BlobStream {
        host: host.name.clone(),
        response,
        skip,
    })
}

fn origin(host: &RegistryHost) -> String {
    host.base.origin().ascii_serialization()
}

/// Returns true if the connection was refused or the name is unknown, which a retry within a second does not change.
fn refused(error: &ImageError) -> bool {
    match error {
        ImageError::Transport { source, .. } => source
            .downcast_ref::<reqwest::Error>()
            .is_some_and(reqwest::Error::is_connect),
        _ => false,
    }
}

fn combine(what: &str, mut failures: Vec<ImageError>) -> ImageError {
    match failures.len() {
        0 => ImageError::invalid(
            what,
            "no host of the registry configuration has the required capability",
        ),
        1 => failures.remove(0),
        _ => {
            let kind = failures
                .last()
                .map_or(ImageErrorKind::Unavailable, ImageError::kind);
            let attempts = failures
                .iter()
                .map(ImageError::report)
                .collect::<Vec<_>>()
                .join("; ");
            ImageError::AllHosts {
                subject: what.to_owned(),
                attempts,
                kind,
            }
        }
    }
}
