//! Authentication after a 401: Basic, or a Bearer token from the registry's token endpoint.
//!
//! Stateless; the session stores the resulting header. Errors contain no secrets.
//!
//! Protocol: RFC 7235 challenges and the distribution project's token specification (docs/spec/auth/token.md, oauth2.md).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Client, Url};
use serde::Deserialize;

use super::http;
use crate::images::error::{ImageError, ImageResult};
use crate::images::types::RegistryAuth;

/// Maximum size of a token endpoint's response; real tokens have some KiB.
const MAX_TOKEN_BYTES: u64 = 256 << 10;
/// Client id for OAuth2 token endpoints.
const CLIENT_ID: &str = "boxlite-cri";

/// A challenge of a `WWW-Authenticate` header.
#[derive(Debug, PartialEq, Eq)]
struct Challenge {
    /// Lower case.
    scheme: String,
    params: Vec<(String, String)>,
}

impl Challenge {
    fn param(&self, name: &str) -> Option<&str> {
        self.params
            .iter()
            .find(|(k, _)| k == name)
            .map(|(_, v)| v.as_str())
            .filter(|v| !v.is_empty())
    }
}

/// Request that was challenged.
pub(super) struct AuthRequest<'a> {
    pub client: &'a Client,
    /// URL that returned 401.
    pub url: &'a Url,
    pub host: &'a str,
    pub what: &'a str,
    /// `repository:<path>:pull`, used if the challenge has no scope.
    pub scope: &'a str,
}

impl AuthRequest<'_> {
    fn unauthorized(&self, reason: impl Into<String>) -> ImageError {
        ImageError::Unauthorized {
            host: self.host.into(),
            subject: self.what.into(),
            reason: reason.into(),
        }
    }
}

/// Returns the Authorization header of a registry token, which needs no challenge.
pub(super) fn preset(auth: Option<&RegistryAuth>) -> Option<HeaderValue> {
    let token = &auth?.registry_token;
    if token.is_empty() {
        None
    } else {
        secret(format!("Bearer {token}"))
    }
}

/// Returns the Authorization header that answers a 401 with `headers`.
pub(super) async fn answer(
    request: &AuthRequest<'_>,
    headers: &HeaderMap,
    auth: Option<&RegistryAuth>,
) -> ImageResult<HeaderValue> {
    let challenges: Vec<Challenge> = headers
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(parse)
        .collect();
    let basic = auth.and_then(basic_credentials);
    if let Some(bearer) = challenges.iter().find(|c| c.scheme == "bearer") {
        let token = fetch_token(request, bearer, auth, basic).await?;
        return secret(format!("Bearer {token}"))
            .ok_or_else(|| request.unauthorized("the token has invalid characters"));
    }
    if challenges.iter().any(|c| c.scheme == "basic") {
        let basic =
            basic.ok_or_else(|| request.unauthorized("it requires a user name and password"))?;
        return secret(format!("Basic {basic}"))
            .ok_or_else(|| request.unauthorized("the credentials have invalid characters"));
    }
    Err(request.unauthorized("it supports neither Basic nor Bearer authentication"))
}

async fn fetch_token(
    request: &AuthRequest<'_>,
    challenge: &Challenge,
    auth: Option<&RegistryAuth>,
    basic: Option<String>,
) -> ImageResult<String> {
    let protocol = |reason: String| ImageError::Protocol {
        host: request.host.into(),
        subject: "token endpoint".into(),
        reason,
    };
    let realm = challenge
        .param("realm")
        .ok_or_else(|| protocol("the challenge has no realm".into()))?;
    let mut realm = Url::parse(realm).map_err(|e| protocol(format!("realm: {e}")))?;
    if !matches!(realm.scheme(), "http" | "https") {
        return Err(protocol("the realm is not an http URL".into()));
    }
    let identity = auth
        .map(|a| a.identity_token.as_str())
        .filter(|t| !t.is_empty());
    let has_secret = identity.is_some() || basic.is_some();
    if has_secret && realm.scheme() == "http" && request.url.scheme() == "https" {
        return Err(
            request.unauthorized("its token endpoint uses plain http, so credentials are not sent")
        );
    }
    let service = challenge.param("service").unwrap_or("");
    let scope = challenge.param("scope").unwrap_or(request.scope);
    let builder = if let Some(identity) = identity {
        request
            .client
            .post(realm)
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(form(&[
                ("grant_type", "refresh_token"),
                ("refresh_token", identity),
                ("client_id", CLIENT_ID),
                ("service", service),
                ("scope", scope),
            ]))
    } else {
        realm.query_pairs_mut().extend_pairs(
            [("service", service), ("scope", scope)]
                .iter()
                .filter(|(_, v)| !v.is_empty()),
        );
        let builder = request.client.get(realm);
        match basic.and_then(|b| secret(format!("Basic {b}"))) {
            Some(value) => builder.header(AUTHORIZATION, value),
            None => builder,
        }
    };
    // Redirects are not followed because they would forward the credentials.
    let response = builder
        .send()
        .await
        .map_err(|e| ImageError::transport(request.host, "token", e))?;
    match response.status().as_u16() {
        200..=299 => {}
        400 | 401 | 403 if has_secret => {
            return Err(request.unauthorized("its token endpoint rejected the credentials"));
        }
        400 | 401 | 403 => return Err(request.unauthorized("it denied anonymous access")),
        other => return Err(protocol(format!("status {other}"))),
    }
    let bytes = http::body(response, MAX_TOKEN_BYTES, request.host, "token").await?;
    let token: Token =
        serde_json::from_slice(&bytes).map_err(|_| protocol("not a JSON token".into()))?;
    [token.token, token.access_token]
        .into_iter()
        .flatten()
        .find(|t| !t.is_empty())
        .ok_or_else(|| protocol("the token is empty".into()))
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// Returns base64 of `user:password`.
fn basic_credentials(auth: &RegistryAuth) -> Option<String> {
    if !auth.username.is_empty() {
        return Some(BASE64.encode(format!("{}:{}", auth.username, auth.password)));
    }
    // Some clients pad with NULs, as old versions of Docker did.
    let decoded = BASE64
        .decode(auth.auth.trim())
        .ok()
        .filter(|d| d.contains(&b':'))?;
    let end = decoded.iter().rposition(|&b| b != 0).map_or(0, |p| p + 1);
    Some(BASE64.encode(&decoded[..end]))
}

fn secret(value: String) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(value).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn form(pairs: &[(&str, &str)]) -> String {
    // Uses the url crate's form encoder, because reqwest's `form` needs another feature.
    let mut url = match Url::parse("http://form/") {
        Ok(url) => url,
        Err(_) => return String::new(),
    };
    url.query_pairs_mut().extend_pairs(pairs);
    url.query().unwrap_or_default().to_owned()
}

/// Parses a header value such as `Bearer realm="https://x/t",service="y", Basic realm=z`, skipping malformed parts.
fn parse(value: &str) -> Vec<Challenge> {
    let mut challenges: Vec<Challenge> = Vec::new();
    let mut rest = value.trim_start_matches([' ', ',', '\t']);
    while !rest.is_empty() {
        let end = rest.find(['=', ' ', ',', '\t']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let after = after.trim_start_matches([' ', '\t']);
        match (after.strip_prefix('='), challenges.last_mut()) {
            (Some(value), Some(challenge)) if !word.is_empty() => {
                let (value, remaining) = parse_value(value.trim_start_matches([' ', '\t']));
                challenge.params.push((word.to_ascii_lowercase(), value));
                rest = remaining;
            }
            (Some(value), _) => rest = parse_value(value).1,
            (None, _) => {
                if !word.is_empty() {
                    challenges.push(Challenge {
                        scheme: word.to_ascii_lowercase(),
                        params: Vec::new(),
                    });
                }
                rest = after;
            }
        }
        rest = rest.trim_start_matches([' ', ',', '\t']);
    }
    challenges
}

/// Parses a token or quoted string; returns the rest of the text too.
fn parse_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, c)| c)),
            c => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parse_reads_several_challenges() {
        let got = parse(
            r#"Bearer realm="https://a/t,x",service="s \"q\"" , scope=repository:a:pull, Basic realm=r"#,
        );
        assert_eq!(got.len(), 2);
        assert_eq!(got[0].param("realm"), Some("https://a/t,x"));
        assert_eq!(got[0].param("service"), Some("s \"q\""));
        assert_eq!(got[0].param("scope"), Some("repository:a:pull"));
        assert_eq!(
            (got[1].scheme.as_str(), got[1].param("realm")),
            ("basic", Some("r"))
        );
    }

    #[test]
    fn basic_credentials_accepts_both_forms() {
        let pair = RegistryAuth {
            username: "u".into(),
            password: "p:q".into(),
            ..Default::default()
        };
        let encoded = RegistryAuth {
            auth: BASE64.encode("u:p:q\0\0"),
            ..Default::default()
        };
        assert_eq!(basic_credentials(&pair), basic_credentials(&encoded));
        assert_eq!(basic_credentials(&RegistryAuth::default()), None);
        assert!(!format!("{pair:?}").contains("p:q"));
        assert_eq!(form(&[("a", "b c&d"), ("e", "=")]), "a=b+c%26d&e=%3D");
    }

    proptest! {
        #[test]
        fn parse_terminates_for_any_header(text in ".{0,200}") {
            parse(&text);
        }
    }
}
