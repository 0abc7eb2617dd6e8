//! [`Reference`]: an image reference, parsed and normalized as containerd's CRI plugin does.
//!
//! `busybox` becomes `docker.io/library/busybox:latest`; the tag is dropped if there is a digest. The grammar is that of
//! the distribution project. The hosts of a registry are in `registry::hosts`.

use std::fmt;

use super::error::{ImageError, ImageResult};

const DEFAULT_DOMAIN: &str = "docker.io";
const LEGACY_DEFAULT_DOMAIN: &str = "index.docker.io";
const OFFICIAL_PREFIX: &str = "library/";
const DEFAULT_TAG: &str = "latest";
/// Maximum length of a repository name including the domain, from the distribution grammar.
const MAX_NAME_BYTES: usize = 255;
/// Maximum length of a tag, from the distribution grammar.
const MAX_TAG_BYTES: usize = 128;

/// A sha256 digest, `sha256:` and 64 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(String);

impl Digest {
    /// Parses `sha256:<64 hex>`. Other algorithms are rejected: the store is keyed by sha256.
    pub fn parse(text: &str) -> Result<Self, String> {
        let Some((algorithm, hex)) = text.split_once(':') else {
            return Err(format!("{text:?} is not a digest (algorithm:hex)"));
        };
        if algorithm != "sha256" {
            return Err(format!(
                "digest algorithm {algorithm:?} is not supported, only sha256"
            ));
        }
        if hex.len() != 64 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(format!(
                "digest {text:?} does not have 64 lower-case hex digits"
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// Returns the digest of a finished hash.
    pub(super) fn from_hash(hash: impl AsRef<[u8]>) -> Self {
        Self(format!("sha256:{}", hex::encode(hash)))
    }

    /// Returns the digest of `bytes`.
    pub(super) fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self::from_hash(sha2::Sha256::digest(bytes))
    }

    /// Returns the digest with its algorithm: `sha256:…`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the 64 hex digits.
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A normalized image reference with a domain, a path and either a tag or a digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    domain: String,
    path: String,
    target: Target,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Target {
    Tag(String),
    Digest(Digest),
}

impl Reference {
    /// Parses and normalizes `text`. The error names `text` and the invalid part.
    pub fn parse(text: &str) -> ImageResult<Self> {
        Self::parse_inner(text).map_err(|reason| ImageError::InvalidReference {
            reference: shorten(text),
            reason,
        })
    }

    fn parse_inner(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("it is empty".into());
        }
        if text.len() > MAX_NAME_BYTES + MAX_TAG_BYTES + 80 {
            return Err(format!(
                "it is longer than {} bytes",
                MAX_NAME_BYTES + MAX_TAG_BYTES + 80
            ));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest)?)),
            None => (text, None),
        };
        let (name, tag) = match rest.rfind(':') {
            // A colon before the last slash belongs to the domain's port.
            Some(colon) if !rest[colon..].contains('/') => {
                (&rest[..colon], Some(&rest[colon + 1..]))
            }
            _ => (rest, None),
        };
        if let Some(tag) = tag {
            check_tag(tag)?;
        }
        let (domain, path) = split_domain(name);
        check_domain(&domain)?;
        check_path(&path)?;
        if domain.len() + 1 + path.len() > MAX_NAME_BYTES {
            return Err(format!("the name is longer than {MAX_NAME_BYTES} bytes"));
        }
        let target = match (digest, tag) {
            (Some(digest), _) => Target::Digest(digest),
            (None, tag) => Target::Tag(tag.unwrap_or(DEFAULT_TAG).to_owned()),
        };
        Ok(Self {
            domain,
            path,
            target,
        })
    }

    /// Returns the registry's host and optional port.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Returns the repository's name without the domain.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Returns domain and path.
    pub fn name(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// Returns the tag, unless the reference is by digest.
    pub fn tag(&self) -> Option<&str> {
        match &self.target {
            Target::Tag(tag) => Some(tag),
            Target::Digest(_) => None,
        }
    }

    /// Returns the digest, if the reference is by digest.
    pub fn digest(&self) -> Option<&Digest> {
        match &self.target {
            Target::Tag(_) => None,
            Target::Digest(digest) => Some(digest),
        }
    }

    /// Returns the path component after `/manifests/` of a request.
    pub(super) fn target(&self) -> &str {
        match &self.target {
            Target::Tag(tag) => tag,
            Target::Digest(digest) => digest.as_str(),
        }
    }

    /// Returns the reference of `digest` in the same repository.
    pub(super) fn with_digest(&self, digest: &Digest) -> String {
        format!("{}@{digest}", self.name())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Tag(tag) => write!(f, "{}/{}:{tag}", self.domain, self.path),
            Target::Digest(digest) => write!(f, "{}/{}@{digest}", self.domain, self.path),
        }
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(MAX_NAME_BYTES).collect()
}

fn split_domain(name: &str) -> (String, String) {
    let (domain, path) = match name.split_once('/') {
        Some((first, rest)) if is_domain(first) => (first, rest),
        _ => (DEFAULT_DOMAIN, name),
    };
    let domain = if domain == LEGACY_DEFAULT_DOMAIN {
        DEFAULT_DOMAIN
    } else {
        domain
    };
    if domain == DEFAULT_DOMAIN && !path.contains('/') {
        return (domain.to_owned(), format!("{OFFICIAL_PREFIX}{path}"));
    }
    (domain.to_owned(), path.to_owned())
}

fn is_domain(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':'])
        || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn check_domain(domain: &str) -> Result<(), String> {
    let bad = || format!("{domain:?} is not a registry host");
    let (host, port) = match domain.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']').ok_or_else(bad)?;
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return Err(bad());
            }
            (
                None,
                after
                    .strip_prefix(':')
                    .or(if after.is_empty() { None } else { Some("x") }),
            )
        }
        None => match domain.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(domain), None),
        },
    };
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return Err(bad());
    }
    let Some(host) = host else { return Ok(()) };
    let label = |l: &str| {
        !l.is_empty()
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    if host.split('.').all(label) {
        Ok(())
    } else {
        Err(bad())
    }
}

fn check_path(path: &str) -> Result<(), String> {
    for component in path.split('/') {
        if !is_path_component(component.as_bytes()) {
            return Err(if component.bytes().any(|b| b.is_ascii_uppercase()) {
                "the repository name must be lower case".into()
            } else {
                format!("{component:?} is not a valid repository name component")
            });
        }
    }
    Ok(())
}

/// Matches `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn is_path_component(component: &[u8]) -> bool {
    let alnum = |b: &u8| matches!(b, b'a'..=b'z' | b'0'..=b'9');
    let (Some(first), Some(last)) = (component.first(), component.last()) else {
        return false;
    };
    if !alnum(first) || !alnum(last) {
        return false;
    }
    component
        .split(alnum)
        .filter(|separator| !separator.is_empty())
        .all(|separator| {
            matches!(separator, b"." | b"_" | b"__") || separator.iter().all(|&b| b == b'-')
        })
}

fn check_tag(tag: &str) -> Result<(), String> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let ok = tag.len() <= MAX_TAG_BYTES
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'));
    if ok {
        Ok(())
    } else {
        Err(format!("{:?} is not a tag", shorten(tag)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn parse_normalizes_as_containerd() {
        let d = format!("sha256:{HEX}");
        for (text, want) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            (
                "index.docker.io/busybox:1",
                "docker.io/library/busybox:1".into(),
            ),
            ("a/b", "docker.io/a/b:latest".into()),
            ("localhost/b", "localhost/b:latest".into()),
            ("localhost:5000/b/c_d:t", "localhost:5000/b/c_d:t".into()),
            ("[::1]:5000/b", "[::1]:5000/b:latest".into()),
            (
                "registry.k8s.io/pause:3.9",
                "registry.k8s.io/pause:3.9".into(),
            ),
            (
                &format!("busybox@{d}"),
                format!("docker.io/library/busybox@{d}"),
            ),
            (&format!("quay.io/x/y:tag@{d}"), format!("quay.io/x/y@{d}")),
        ] {
            let parsed = Reference::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(parsed.to_string(), want);
            assert_eq!(
                Reference::parse(&want).unwrap(),
                parsed,
                "normal form is stable"
            );
        }
    }

    #[test]
    fn parse_rejects_invalid_references() {
        let long = "a/".repeat(200);
        for text in [
            "",
            ":",
            "Busybox",
            "busy box",
            "a//b",
            "-a",
            "a..b",
            "a/b:",
            "a/b:-x",
            "http://a/b",
            "a@sha256:12",
            "a@sha512:00",
            "../a",
            "a/../b",
            "x:y/z",
            "host_.x/y",
            "[::1/x",
            "[zz]/x",
            "[::1]x/y",
            "a:b@",
            &long,
        ] {
            let error = Reference::parse(text).expect_err(text);
            assert!(
                matches!(error, ImageError::InvalidReference { .. }),
                "{text}: {error}"
            );
        }
    }
}
