//! The host for which the credentials of a pull are.
//!
//! Credentials go to the registry that the reference names, or to the host in their `serverAddress`; never to another host of
//! `hosts.toml`, such as a mirror, which would otherwise learn the registry's password. A mirror that needs credentials has an
//! `Authorization` header in `hosts.toml`. Called by the session for each request and each challenge.

use reqwest::Url;

use super::hosts::upstream;
use crate::images::types::RegistryAuth;

/// Returns true if the credentials for a pull from `domain` are for the host with the URL `base`: the same host and port, and
/// the scheme if the credentials name one.
pub(super) fn covers(auth: &RegistryAuth, domain: &str, base: &Url) -> bool {
    let address = auth.server_address.trim();
    if address.is_empty() {
        return same_host(upstream(domain), base);
    }
    let (scheme, rest) = match address.split_once("://") {
        Some((scheme, rest)) => (Some(scheme), rest),
        None => (None, address),
    };
    let host = rest.split('/').next().unwrap_or(rest);
    let host = match host {
        "index.docker.io" => upstream("docker.io"),
        host => upstream(host),
    };
    scheme.is_none_or(|scheme| scheme.eq_ignore_ascii_case(base.scheme())) && same_host(host, base)
}

/// Returns true if `authority` (a host, and a port unless it is the scheme's) is that of `base`.
fn same_host(authority: &str, base: &Url) -> bool {
    Url::parse(&format!("{}://{authority}", base.scheme()))
        .is_ok_and(|url| url.origin() == base.origin())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn covered(server_address: &str, domain: &str, base: &str) -> bool {
        let auth = RegistryAuth {
            server_address: server_address.into(),
            ..Default::default()
        };
        covers(&auth, domain, &Url::parse(base).unwrap())
    }

    #[test]
    fn covers_only_the_named_host() {
        let hub = "https://registry-1.docker.io/v2";
        for (address, domain, base, expected) in [
            ("", "reg.example", "https://reg.example/v2", true),
            ("", "reg.example:443", "https://reg.example/v2", true),
            ("", "reg.example", "https://reg.example:5000/v2", false),
            ("", "reg.example:5000", "http://reg.example:5000/v2", true),
            ("", "reg.example", "https://mirror.example/v2", false),
            ("", "docker.io", hub, true),
            ("https://index.docker.io/v1/", "docker.io", hub, true),
            ("docker.io", "reg.example", "https://reg.example/v2", false),
            ("reg.example", "docker.io", hub, false),
            (
                "mirror.example",
                "reg.example",
                "https://mirror.example/v2",
                true,
            ),
            (
                "mirror.example",
                "reg.example",
                "https://reg.example/v2",
                false,
            ),
            (
                "https://reg.example",
                "reg.example",
                "http://reg.example/v2",
                false,
            ),
            (
                "https://REG.example/x",
                "reg.example",
                "https://reg.example/v2",
                true,
            ),
            (
                "reg.example@evil.example",
                "reg.example",
                "https://reg.example/v2",
                false,
            ),
        ] {
            let got = covered(address, domain, base);
            assert_eq!(got, expected, "{address:?} {domain} {base}");
        }
    }
}
