//! [`Registry`]: Debian's docker-registry on loopback, with storage in the scratch directory, and pushing to it.
//!
//! Plain HTTP, or TLS with a certificate of a CA created here.

use super::build::{Blob, Image};
use super::digest;
use crate::failure::{During, Result};
use crate::namespaces::run;
use crate::{ensure, poll};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};

/// A listening registry; killed when dropped.
pub(crate) struct Registry {
    /// `127.0.0.1:<port>`.
    pub host: String,
    /// CA of the TLS certificate.
    pub ca: Option<PathBuf>,
    client: reqwest::Client,
    _process: Child,
}

/// Time limit for the start.
const START_TIMEOUT: Duration = Duration::from_secs(20);

impl Registry {
    /// Starts a registry on `port` with its storage below `dir`.
    pub(crate) async fn start(program: &Path, dir: &Path, port: u16, tls: bool) -> Result<Self> {
        let dir = dir.join(format!("registry-{port}"));
        std::fs::create_dir_all(&dir)?;
        let host = format!("127.0.0.1:{port}");
        let mut config = format!(
            "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: {host}\n",
            dir.join("data").display()
        );
        let mut client = reqwest::Client::builder().no_proxy();
        let mut ca = None;
        if tls {
            certificate(&dir)?;
            config.push_str(&format!(
                "  tls:\n    certificate: {0}/server.crt\n    key: {0}/server.key\n",
                dir.display()
            ));
            let path = dir.join("ca.crt");
            client =
                client.tls_certs_only([reqwest::Certificate::from_pem(&std::fs::read(&path)?)?]);
            ca = Some(path);
        }
        let file = dir.join("config.yml");
        std::fs::write(&file, config)?;
        let log = std::fs::File::create(dir.join("log"))?;
        let process = Command::new(program)
            .arg("serve")
            .arg(&file)
            .stdout(log.try_clone()?)
            .stderr(log)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .during("docker-registry")?;
        let registry = Self {
            host,
            ca,
            client: client.build()?,
            _process: process,
        };
        poll::until("the registry answers", START_TIMEOUT, || async {
            let answer = registry.client.get(registry.url("")).send().await?;
            ensure!(answer.status().is_success(), "{}", answer.status());
            Ok(())
        })
        .await?;
        Ok(registry)
    }

    fn url(&self, path: &str) -> String {
        let scheme = if self.ca.is_some() { "https" } else { "http" };
        format!("{scheme}://{}/v2/{path}", self.host)
    }

    /// Pushes an image as `name:tag`. Returns the manifest's digest.
    pub(crate) async fn push(&self, name: &str, tag: &str, image: &Image) -> Result<String> {
        self.push_blobs(name, image).await?;
        self.put_manifest(name, tag, &image.manifest()?).await
    }

    /// Pushes an index whose first entry is an empty image of another architecture. Returns the index's digest.
    pub(crate) async fn push_index(&self, name: &str, tag: &str, image: &Image) -> Result<String> {
        let foreign = Image {
            layers: Vec::new(),
            config: serde_json::json!({"Cmd": ["/not/for/this/machine"]}),
            format: image.format,
        };
        let foreign_manifest = foreign.manifest()?;
        self.push_blobs(name, &foreign).await?;
        self.put_manifest(name, &digest(&foreign_manifest.bytes), &foreign_manifest)
            .await?;
        self.push_blobs(name, image).await?;
        let manifest = image.manifest()?;
        self.put_manifest(name, &digest(&manifest.bytes), &manifest)
            .await?;
        self.put_manifest(name, tag, &image.index(&foreign_manifest)?)
            .await
    }

    async fn push_blobs(&self, name: &str, image: &Image) -> Result {
        for layer in &image.layers {
            self.put_blob(name, &layer.blob).await?;
        }
        self.put_blob(name, &image.config_blob()?.bytes).await
    }

    /// Uploads a blob under its digest.
    pub(crate) async fn put_blob(&self, name: &str, bytes: &[u8]) -> Result {
        let digest = digest(bytes);
        let there = self
            .client
            .head(self.url(&format!("{name}/blobs/{digest}")))
            .send()
            .await?;
        if there.status().is_success() {
            return Ok(());
        }
        let begun = self
            .client
            .post(self.url(&format!("{name}/blobs/uploads/")))
            .send()
            .await?;
        let location = begun
            .headers()
            .get("location")
            .and_then(|l| l.to_str().ok())
            .unwrap_or_default();
        let joint = if location.contains('?') { '&' } else { '?' };
        let url = format!("{location}{joint}digest={digest}");
        let answer = self.client.put(url).body(bytes.to_vec()).send().await?;
        ensure!(
            answer.status().is_success(),
            "failed to push a blob of {name}: {}",
            answer.status()
        );
        Ok(())
    }

    /// Uploads a manifest or index under a tag or digest. Returns its digest.
    pub(crate) async fn put_manifest(
        &self,
        name: &str,
        reference: &str,
        manifest: &Blob,
    ) -> Result<String> {
        let answer = self
            .client
            .put(self.url(&format!("{name}/manifests/{reference}")))
            .header("content-type", &manifest.kind)
            .body(manifest.bytes.clone())
            .send()
            .await?;
        let status = answer.status();
        let text = answer.text().await.unwrap_or_default();
        ensure!(
            status.is_success(),
            "failed to push {name}:{reference}: {status} {text}"
        );
        Ok(digest(&manifest.bytes))
    }
}

/// Creates a CA and a server certificate for 127.0.0.1 with openssl.
fn certificate(dir: &Path) -> Result {
    let at = |name: &str| dir.join(name).display().to_string();
    let (ca, ca_key, key, csr, crt, ext) = (
        at("ca.crt"),
        at("ca.key"),
        at("server.key"),
        at("server.csr"),
        at("server.crt"),
        at("ext"),
    );
    std::fs::write(
        &ext,
        "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth\n",
    )?;
    let curve = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
    ];
    let mut authority = vec![
        "req",
        "-x509",
        "-subj",
        "/CN=boxlite test CA",
        "-days",
        "2",
        "-keyout",
        &ca_key,
        "-out",
        &ca,
    ];
    authority.extend(curve);
    run("openssl", &authority)?;
    let mut request = vec![
        "req",
        "-subj",
        "/CN=127.0.0.1",
        "-keyout",
        &key,
        "-out",
        &csr,
    ];
    request.extend(curve);
    run("openssl", &request)?;
    run(
        "openssl",
        &[
            "x509",
            "-req",
            "-in",
            &csr,
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            &ext,
            "-out",
            &crt,
        ],
    )?;
    Ok(())
}
