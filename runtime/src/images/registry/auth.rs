//! How a 401 is answered: Basic, or a Bearer token from the registry's token endpoint.
//!
//! Keeps nothing; the session keeps the header that came out. Secrets never appear in errors.
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

/// Largest answer of a token endpoint in bytes: tokens of real ones have some KiB.
const MAX_TOKEN_BYTES: u64 = 256 << 10;
/// Name by which this client presents itself to OAuth2 token endpoints.
const CLIENT_ID: &str = "boxlite-cri";

/// One challenge of a `WWW-Authenticate` header.
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

/// Who asks whom for what, for errors and for the token's scope.
pub(super) struct Asked<'a> {
    pub client: &'a Client,
    /// The URL that answered 401.
    pub url: &'a Url,
    pub host: &'a str,
    pub what: &'a str,
    /// `repository:<path>:pull`, used when the challenge names none.
    pub scope: &'a str,
}

impl Asked<'_> {
    fn unauthorized(&self, reason: impl Into<String>) -> ImageError {
        ImageError::Unauthorized {
            host: self.host.into(),
            what: self.what.into(),
            reason: reason.into(),
        }
    }
}

/// The Authorization header that needs no challenge: a registry token.
pub(super) fn preset(auth: Option<&RegistryAuth>) -> Option<HeaderValue> {
    let token = &auth?.registry_token;
    if token.is_empty() {
        None
    } else {
        secret(format!("Bearer {token}"))
    }
}

/// The Authorization header that answers a 401 with `headers`.
pub(super) async fn answer(
    asked: &Asked<'_>,
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
        let token = fetch_token(asked, bearer, auth, basic).await?;
        return secret(format!("Bearer {token}"))
            .ok_or_else(|| asked.unauthorized("the token has forbidden characters"));
    }
    if challenges.iter().any(|c| c.scheme == "basic") {
        let basic = basic.ok_or_else(|| {
            asked.unauthorized("it wants a user name and password, and none were given")
        })?;
        return secret(format!("Basic {basic}"))
            .ok_or_else(|| asked.unauthorized("the credentials are unusable"));
    }
    Err(asked.unauthorized("it offers neither Basic nor Bearer authentication"))
}

async fn fetch_token(
    asked: &Asked<'_>,
    challenge: &Challenge,
    auth: Option<&RegistryAuth>,
    basic: Option<String>,
) -> ImageResult<String> {
    let protocol = |reason: String| ImageError::Protocol {
        host: asked.host.into(),
        what: "token endpoint".into(),
        reason,
    };
    let realm = challenge
        .param("realm")
        .ok_or_else(|| protocol("the challenge names no realm".into()))?;
    let mut realm = Url::parse(realm).map_err(|e| protocol(format!("realm: {e}")))?;
    if !matches!(realm.scheme(), "http" | "https") {
        return Err(protocol("the realm is no http URL".into()));
    }
    let identity = auth
        .map(|a| a.identity_token.as_str())
        .filter(|t| !t.is_empty());
    let has_secret = identity.is_some() || basic.is_some();
    if has_secret && realm.scheme() == "http" && asked.url.scheme() == "https" {
        return Err(
            asked.unauthorized("its token endpoint is plain http; credentials are not sent there")
        );
    }
    let service = challenge.param("service").unwrap_or("");
    let scope = challenge.param("scope").unwrap_or(asked.scope);
    let request = if let Some(identity) = identity {
        asked
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
        let request = asked.client.get(realm);
        match basic.and_then(|b| secret(format!("Basic {b}"))) {
            Some(value) => request.header(AUTHORIZATION, value),
            None => request,
        }
    };
    // A redirect of the token endpoint is not followed: the credentials would go along.
    let response = request
        .send()
        .await
        .map_err(|e| ImageError::transport(asked.host, "token", e))?;
    match response.status().as_u16() {
        200..=299 => {}
        400 | 401 | 403 if has_secret => {
            return Err(asked.unauthorized("its token endpoint rejects the credentials"));
        }
        400 | 401 | 403 => return Err(asked.unauthorized("it gives no anonymous access")),
        other => return Err(protocol(format!("answered {other}"))),
    }
    let bytes = http::body(response, MAX_TOKEN_BYTES, asked.host, "token").await?;
    let token: Token =
        serde_json::from_slice(&bytes).map_err(|_| protocol("gave no JSON with a token".into()))?;
    [token.token, token.access_token]
        .into_iter()
        .flatten()
        .find(|t| !t.is_empty())
        .ok_or_else(|| protocol("gave an empty token".into()))
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// base64 of `user:password`.
fn basic_credentials(auth: &RegistryAuth) -> Option<String> {
    if !auth.username.is_empty() {
        return Some(BASE64.encode(format!("{}:{}", auth.username, auth.password)));
    }
    // Some clients pad with NULs, as old Docker did.
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
    // The url crate's form encoder, by way of a query: reqwest's own `form` would be one feature more.
    let mut url = match Url::parse("http://form/") {
        Ok(url) => url,
        Err(_) => return String::new(),
    };
    url.query_pairs_mut().extend_pairs(pairs);
    url.query().unwrap_or_default().to_owned()
}

/// Parses a header value such as `Bearer realm="https://x/t",service="y", Basic realm=z`. What makes no sense is skipped.
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

/// A token or quoted string, and what follows it.
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
    fn challenges_are_read() {
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
    fn credentials_in_both_forms() {
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
        fn any_header_ends(text in ".{0,200}") {
            parse(&text);
        }
    }
}
