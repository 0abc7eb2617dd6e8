//! Hosts of a registry: containerd's `certs.d/<host>/hosts.toml`, and the defaults without that file.
//!
//! Reads the configuration and builds one HTTP client per host. Called once per pull, so that an edited file takes effect
//! with the next pull, as with containerd.
//!
//! The layout is containerd's (docs/hosts.md): the directory is `host_port_`, `host:port` or `host`, else `_default`;
//! mirrors are tried in the file's order, the `server` last. A directory without `hosts.toml` may contain Docker's
//! `*.crt`, `*.cert` and `*.key`. Unknown keys are ignored, because newer containerd versions add some.
//!
//! One difference from containerd: rustls does not accept a CA certificate as a server certificate. A self-signed
//! certificate must have CA:FALSE.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Certificate, Client, Identity, Url};
use serde::Deserialize;

use crate::images::error::{ImageError, ImageResult};
use crate::images::types::RegistryOptions;

/// Maximum size of `hosts.toml` and of a certificate file.
const MAX_CONFIG_FILE_BYTES: u64 = 1 << 20;

/// A host that may serve a repository.
#[derive(Clone)]
pub(super) struct RegistryHost {
    /// Scheme, authority and the path up to and including `/v2`; no trailing slash.
    pub base: Url,
    /// Host and port, for messages.
    pub name: String,
    /// May turn a tag into a digest.
    pub resolve: bool,
    /// May serve content by digest.
    pub pull: bool,
    /// Headers for requests to this host only.
    pub headers: HeaderMap,
    /// True for a mirror, false for the registry itself; mirrors get `?ns=`.
    pub mirror: bool,
    pub client: Client,
}

/// Builds hosts. Caches the client without special settings, because loading the system's root certificates is slow.
pub(in crate::images) struct HostDirectory {
    options: RegistryOptions,
    default_client: OnceLock<Client>,
}

#[derive(Deserialize, Default)]
struct HostsFile {
    server: Option<String>,
    #[serde(default)]
    host: toml::Table,
    #[serde(flatten)]
    settings: HostSettings,
}

#[derive(Deserialize, Default)]
struct HostSettings {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<ClientCerts>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    override_path: bool,
    #[serde(default)]
    header: std::collections::BTreeMap<String, OneOrMany>,
}

#[derive(Deserialize, Clone)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// `"both.pem"`, `["a.pem", "b.pem"]` or `[["cert", "key"], …]`.
#[derive(Deserialize, Clone)]
#[serde(untagged)]
enum ClientCerts {
    One(String),
    Many(Vec<OneOrMany>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// TLS material of a host, paths made absolute.
#[derive(Default)]
struct Tls {
    ca: Vec<PathBuf>,
    /// Certificate and key; the same file twice if it holds both.
    client: Vec<(PathBuf, PathBuf)>,
    skip_verify: bool,
}

impl HostDirectory {
    pub(in crate::images) fn new(options: RegistryOptions) -> Self {
        Self {
            options,
            default_client: OnceLock::new(),
        }
    }

    /// Returns the hosts for `domain`, at least one, in the order in which they are tried.
    pub(super) fn hosts(&self, domain: &str) -> ImageResult<Vec<RegistryHost>> {
        let Some(dir) = self.directory(domain) else {
            return Ok(vec![self.host(
                &default_server(domain),
                domain,
                &self.options.certs_dir,
                HostSettings::default(),
            )?]);
        };
        let path = dir.join("hosts.toml");
        let Some(text) = read_limited(&path)? else {
            let tls = docker_style(&dir)?;
            let scheme = if tls.ca.is_empty() && tls.client.is_empty() {
                None
            } else {
                Some("https")
            };
            let url = scheme.map_or_else(
                || default_server(domain),
                |s| format!("{s}://{}", upstream(domain)),
            );
            return Ok(vec![self.host_with(
                &url,
                domain,
                &path,
                HostSettings::default(),
                tls,
            )?]);
        };
        let text = String::from_utf8(text).map_err(|_| config(&path, "not UTF-8"))?;
        let file: HostsFile = toml::from_str(&text).map_err(|e| config(&path, e.message()))?;
        let mut hosts = Vec::new();
        for (url, settings) in file.host {
            let settings: HostSettings = settings.try_into().map_err(|e: toml::de::Error| {
                config(&path, &format!("host {url:?}: {}", e.message()))
            })?;
            hosts.push(self.host(&url, domain, &path, settings)?);
        }
        let server = file.server.unwrap_or_else(|| default_server(domain));
        hosts.push(self.host(&server, domain, &path, file.settings)?);
        Ok(hosts)
    }

    /// Returns the first existing directory for `domain`.
    fn directory(&self, domain: &str) -> Option<PathBuf> {
        let mut names = Vec::new();
        if let Some((host, port)) = domain.rsplit_once(':') {
            names.push(format!("{host}_{port}_"));
        }
        names.push(domain.to_owned());
        names.push("_default".to_owned());
        names
            .into_iter()
            .map(|name| self.options.certs_dir.join(name))
            .find(|dir| dir.is_dir())
    }

    fn host(
        &self,
        url: &str,
        domain: &str,
        path: &Path,
        settings: HostSettings,
    ) -> ImageResult<RegistryHost> {
        let dir = path.parent().unwrap_or(Path::new("/"));
        let tls = Tls {
            ca: settings
                .ca
                .clone()
                .map_or(Vec::new(), OneOrMany::into_vec)
                .iter()
                .map(|p| dir.join(p))
                .collect(),
            client: client_pairs(dir, settings.client.clone())
                .map_err(|reason| config(path, &reason))?,
            skip_verify: settings.skip_verify,
        };
        self.host_with(url, domain, path, settings, tls)
    }

    fn host_with(
        &self,
        url: &str,
        domain: &str,
        path: &Path,
        settings: HostSettings,
        tls: Tls,
    ) -> ImageResult<RegistryHost> {
        let text = if url.contains("://") {
            url.to_owned()
        } else {
            format!("{}://{url}", scheme_for(url))
        };
        let mut base =
            Url::parse(&text).map_err(|e| config(path, &format!("host {url:?}: {e}")))?;
        if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
            return Err(config(
                path,
                &format!("host {url:?} is not an http or https URL"),
            ));
        }
        let has_v2 = base.path().trim_end_matches('/').ends_with("/v2");
        let prefix = base.path().trim_end_matches('/').to_owned();
        base.set_path(&if settings.override_path || has_v2 {
            prefix
        } else {
            format!("{prefix}/v2")
        });
        base.set_query(None);
        let name = authority(&base);
        let (pull, resolve) = match &settings.capabilities {
            None => (true, true),
            Some(list) => (
                list.iter().any(|c| c == "pull"),
                list.iter().any(|c| c == "resolve"),
            ),
        };
        let headers = headers(path, settings.header)?;
        let client = self
            .client(&base, &tls)
            .map_err(|reason| config(path, &format!("host {url:?}: {reason}")))?;
        Ok(RegistryHost {
            mirror: name != upstream(domain),
            base,
            name,
            resolve,
            pull,
            headers,
            client,
        })
    }

    fn client(&self, base: &Url, tls: &Tls) -> Result<Client, String> {
        let plain = base.scheme() == "http";
        let loopback = is_loopback(base.host_str().unwrap_or(""));
        let special =
            plain || loopback || tls.skip_verify || !tls.ca.is_empty() || !tls.client.is_empty();
        if !special && let Some(client) = self.default_client.get() {
            return Ok(client.clone());
        }
        super::http::install_crypto_provider();
        let mut builder = Client::builder()
            .user_agent(concat!("boxlite-cri/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(self.options.connect_timeout)
            .read_timeout(self.options.stall_timeout);
        if loopback {
            builder = builder.no_proxy();
        }
        if plain {
            // Without TLS the system's root certificates are not needed, and the node may have none.
            builder = builder.tls_certs_only([]);
        }
        for ca in &tls.ca {
            let pem = read_limited(ca)
                .map_err(|e| e.report())?
                .ok_or(format!("{} not found", ca.display()))?;
            let certs =
                Certificate::from_pem_bundle(&pem).map_err(|e| format!("{}: {e}", ca.display()))?;
            builder = builder.tls_certs_merge(certs);
        }
        for (cert, key) in &tls.client {
            let mut pem = read_limited(cert)
                .map_err(|e| e.report())?
                .ok_or(format!("{} not found", cert.display()))?;
            if key != cert {
                pem.push(b'\n');
                pem.extend(
                    read_limited(key)
                        .map_err(|e| e.report())?
                        .ok_or(format!("{} not found", key.display()))?,
                );
            }
            // The cause is omitted because it might quote the key.
            let identity = Identity::from_pem(&pem)
                .map_err(|_| format!("{} does not contain a usable key pair", cert.display()))?;
            builder = builder.identity(identity);
        }
        if tls.skip_verify {
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
        let client = builder
            .build()
            .map_err(|e| format!("failed to set up TLS: {}", e.without_url()))?;
        if !special {
            return Ok(self.default_client.get_or_init(|| client).clone());
        }
        Ok(client)
    }
}

/// Returns the host of a domain's registry: the domain itself, except for Docker Hub.
pub(super) fn upstream(domain: &str) -> &str {
    if domain == "docker.io" {
        "registry-1.docker.io"
    } else {
        domain
    }
}

fn default_server(domain: &str) -> String {
    let host = upstream(domain);
    format!("{}://{host}", scheme_for(host))
}

/// Returns http for registries on this machine, as containerd and Docker do, unless the port is 443.
fn scheme_for(host: &str) -> &'static str {
    if is_loopback(host.split('/').next().unwrap_or(host)) && !host.ends_with(":443") {
        "http"
    } else {
        "https"
    }
}

/// Returns true if `host`, with or without a port, is this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => match host.rsplit_once(':') {
            // More than one colon: a bare IPv6 address.
            Some((name, _)) if !name.contains(':') => name,
            _ => host,
        },
    };
    name == "localhost"
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

/// Returns host and port of a URL in the form used by references.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

fn client_pairs(
    dir: &Path,
    client: Option<ClientCerts>,
) -> Result<Vec<(PathBuf, PathBuf)>, String> {
    let entries = match client {
        None => return Ok(Vec::new()),
        Some(ClientCerts::One(one)) => vec![OneOrMany::One(one)],
        Some(ClientCerts::Many(many)) => many,
    };
    entries
        .into_iter()
        .map(|entry| match entry.into_vec().as_slice() {
            [both] => Ok((dir.join(both), dir.join(both))),
            [cert, key] => Ok((
                dir.join(cert),
                dir.join(if key.is_empty() { cert } else { key }),
            )),
            other => Err(format!(
                "client: expected a certificate and a key, got {} files",
                other.len()
            )),
        })
        .collect()
}

fn headers(
    path: &Path,
    table: std::collections::BTreeMap<String, OneOrMany>,
) -> ImageResult<HeaderMap> {
    let mut headers = HeaderMap::new();
    for (name, values) in table {
        let key: HeaderName = name
            .parse()
            .map_err(|_| config(path, &format!("{name:?} is not a header name")))?;
        for value in values.into_vec() {
            // The value may be a secret and is not part of the message.
            let mut value = HeaderValue::from_str(&value).map_err(|_| {
                config(
                    path,
                    &format!("the value of header {name:?} has invalid characters"),
                )
            })?;
            value.set_sensitive(true);
            headers.append(key.clone(), value);
        }
    }
    Ok(headers)
}

/// Reads Docker's layout: every `*.crt` is a root certificate, every `*.cert` has a `*.key`.
fn docker_style(dir: &Path) -> ImageResult<Tls> {
    let mut tls = Tls::default();
    let entries = std::fs::read_dir(dir).map_err(|e| ImageError::io("read", dir, e))?;
    for entry in entries {
        let path = entry.map_err(|e| ImageError::io("read", dir, e))?.path();
        match path.extension().and_then(|e| e.to_str()) {
            Some("crt") => tls.ca.push(path),
            Some("cert") => tls.client.push((path.clone(), path.with_extension("key"))),
            _ => {}
        }
    }
    tls.ca.sort();
    tls.client.sort();
    Ok(tls)
}

/// Returns the file's content, `None` if it does not exist.
fn read_limited(path: &Path) -> ImageResult<Option<Vec<u8>>> {
    use std::io::Read;
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(ImageError::io("read", path, e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_CONFIG_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| ImageError::io("read", path, e))?;
    if bytes.len() as u64 > MAX_CONFIG_FILE_BYTES {
        return Err(ImageError::TooLarge {
            subject: path.display().to_string(),
            limit: MAX_CONFIG_FILE_BYTES,
            unit: "bytes",
        });
    }
    Ok(Some(bytes))
}

fn config(path: &Path, reason: &str) -> ImageError {
    ImageError::Config {
        path: path.to_path_buf(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests;
