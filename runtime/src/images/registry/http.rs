//! One GET with its redirects, and reading bounded bodies.
//!
//! Knows nothing of registries. Redirects are followed here and not by reqwest, because headers from `hosts.toml` and
//! the Authorization must not reach another origin, and TLS must not turn into plain HTTP on the way.

use std::sync::Once;

use reqwest::header::{HeaderMap, LOCATION};
use reqwest::{Client, Response, StatusCode, Url};

use crate::images::error::{ImageError, ImageResult};

/// Redirects of one request. Registries need one or two (to their blob store's CDN).
const MAX_REDIRECTS: usize = 5;
/// Bytes of an error body that are looked at.
const MAX_ERROR_BODY: u64 = 8 << 10;
/// Characters of a registry's own words in a message.
const MAX_ERROR_TEXT: usize = 200;

/// Makes ring rustls' provider for this process; whoever was first wins, which is as good.
pub(super) fn install_crypto_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

/// A response and whether it came from the origin that was asked.
pub(super) struct Answer {
    pub response: Response,
    /// False after a redirect to another origin: its words then stay out of messages, since a registry could make this
    /// node read an address that only the node reaches.
    pub same_origin: bool,
}

/// GETs `url`. `private` headers go to its origin only, `public` ones along every redirect.
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
            what: what.into(),
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
            _ => return Err(protocol("redirect to something that is no http URL")),
        }
    }
    Err(ImageError::Protocol {
        host: host.into(),
        what: what.into(),
        reason: "too many redirects".into(),
    })
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// The body, if it has no more than `limit` bytes.
pub(super) async fn body(
    mut response: Response,
    limit: u64,
    host: &str,
    what: &str,
) -> ImageResult<Vec<u8>> {
    let too_large = || ImageError::TooLarge {
        what: what.into(),
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

/// What a registry says about its refusal, from the distribution specification's error document; printable and short.
pub(super) async fn error_text(answer: Answer, host: &str) -> String {
    if !answer.same_origin {
        return String::new();
    }
    let Ok(bytes) = body(answer.response, MAX_ERROR_BODY, host, "error").await else {
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
        .take(MAX_ERROR_TEXT)
        .collect()
}
