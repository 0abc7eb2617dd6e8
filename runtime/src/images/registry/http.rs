//! GET requests with redirects, and bounded response bodies.
//!
//! Redirects are followed here instead of by reqwest, because headers from `hosts.toml` and the Authorization must not
//! reach another origin, and a redirect must not downgrade from https to http.

use std::sync::Once;
use std::time::Duration;

use reqwest::header::{HeaderMap, LOCATION};
use reqwest::{Client, Response, StatusCode, Url};

use crate::images::error::{ImageError, ImageResult};

/// Maximum number of redirects of a request. Registries need one or two, to the CDN of their blob store.
const MAX_REDIRECTS: usize = 5;
/// Timeout of a response body that is read as a whole (a manifest, config, token or error); usually it has some KiB.
const BODY_TIMEOUT: Duration = Duration::from_secs(120);
/// Maximum size of an error body.
const MAX_ERROR_BODY_BYTES: u64 = 8 << 10;
/// Maximum length of a registry's message in an error.
const MAX_ERROR_TEXT_CHARS: usize = 200;

/// Installs ring as rustls' provider of this process, unless one is installed.
pub(super) fn install_crypto_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

/// A response and whether it came from the original origin.
pub(super) struct Answer {
    pub response: Response,
    /// False after a redirect to another origin: its body then does not become part of messages, because a registry could
    /// make this node read an address that only the node can reach.
    pub same_origin: bool,
}

/// Sends a GET request. `private` headers are sent to the origin of `url` only, `public` headers to every redirect.
pub(super) async fn get(
    client: &Client,
    url: &Url,
    private: &HeaderMap,
    public: &HeaderMap,
    host: &str,
    what: &str,
) -> ImageResult<Answer> {
    let origin = url.origin();
    let mut url = url.clone();
    for _ in 0..=MAX_REDIRECTS {
        let same_origin = url.origin() == origin;
        let mut request = client.get(url.clone()).headers(public.clone());
        if same_origin {
            request = request.headers(private.clone());
        }
        let response = request
            .send()
            .await
            .map_err(|e| ImageError::transport(host, what, e))?;
        if !is_redirect(response.status()) {
            return Ok(Answer {
                response,
                same_origin,
            });
        }
        let protocol = |reason: &str| ImageError::Protocol {
            host: host.into(),
            subject: what.into(),
            reason: reason.into(),
        };
        let next = response
            .headers()
            .get(LOCATION)
            .and_then(|l| l.to_str().ok())
            .and_then(|l| url.join(l).ok())
            .ok_or_else(|| protocol("redirect without a usable Location"))?;
        match (url.scheme(), next.scheme()) {
            ("https", "http") => return Err(protocol("redirect from https to plain http refused")),
            (_, "http" | "https") => url = next,
            _ => return Err(protocol("redirect to a URL that is not http")),
        }
    }
    Err(ImageError::Protocol {
        host: host.into(),
        subject: what.into(),
        reason: "too many redirects".into(),
    })
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Reads a body of at most `limit` bytes.
pub(super) async fn body(
    response: Response,
    limit: u64,
    host: &str,
    what: &str,
) -> ImageResult<Vec<u8>> {
    let body = read_body(response, limit, host, what);
    tokio::time::timeout(BODY_TIMEOUT, body)
        .await
        .unwrap_or_else(|_| {
            Err(ImageError::TimedOut {
                subject: format!("{what} from {host}"),
                seconds: BODY_TIMEOUT.as_secs(),
            })
        })
}

async fn read_body(
    mut response: Response,
    limit: u64,
    host: &str,
    what: &str,
) -> ImageResult<Vec<u8>> {
    let too_large = || ImageError::TooLarge {
        subject: what.into(),
        limit,
        unit: "bytes",
    };
    if response.content_length().is_some_and(|l| l > limit) {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = response
        .chunk()
        .await
        .map_err(|e| ImageError::transport(host, what, e))?
    {
        if (bytes.len() + chunk.len()) as u64 > limit {
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Returns the printable, bounded message of the distribution specification's error document.
pub(super) async fn error_text(answer: Answer, host: &str) -> String {
    if !answer.same_origin {
        return String::new();
    }
    let Ok(bytes) = body(answer.response, MAX_ERROR_BODY_BYTES, host, "error").await else {
        return String::new();
    };
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(&bytes) else {
        return String::new();
    };
    let error = &value["errors"][0];
    let part = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
    let text = [part("code"), part("message")]
        .into_iter()
        .filter(|s| !s.is_empty())
        .collect::<Vec<_>>()
        .join(", ");
    text.chars()
        .filter(|c| !c.is_control())
        .take(MAX_ERROR_TEXT_CHARS)
        .collect()
}
