//! [`Authority`]: certificate authority of the cluster, its certificates and the kubeconfigs that contain them. Made with
//! openssl, valid for two days.

use crate::failure::Result;
use crate::namespaces::run;
use std::path::{Path, PathBuf};

/// Options of openssl for a P-256 key without a passphrase.
const KEY: [&str; 5] = [
    "-newkey",
    "ec",
    "-pkeyopt",
    "ec_paramgen_curve:P-256",
    "-nodes",
];

/// Certificate authority with its files in one directory.
pub(crate) struct Authority {
    dir: PathBuf,
}

/// Certificate and key of one component.
pub(crate) struct Certificate {
    /// PEM certificate.
    pub certificate: PathBuf,
    /// PEM key.
    pub key: PathBuf,
}

impl Authority {
    /// Creates the authority and the key pair of the service account tokens.
    pub(crate) fn create(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let authority = Self {
            dir: dir.to_owned(),
        };
        let (certificate, key) = (authority.at("ca.crt"), authority.at("ca.key"));
        let mut args = vec![
            "req",
            "-x509",
            "-subj",
            "/CN=boxlite test cluster",
            "-days",
            "2",
        ];
        args.extend(["-keyout", &key, "-out", &certificate]);
        args.extend(KEY);
        run("openssl", &args)?;
        let (private, public) = (authority.at("tokens.key"), authority.at("tokens.pub"));
        let curve = [
            "ecparam",
            "-genkey",
            "-noout",
            "-name",
            "prime256v1",
            "-out",
            &private,
        ];
        run("openssl", &curve)?;
        run(
            "openssl",
            &["ec", "-in", &private, "-pubout", "-out", &public],
        )?;
        Ok(authority)
    }

    /// Returns the path of a file of the authority.
    pub(crate) fn at(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// Issues a certificate for a subject such as `/O=system:nodes/CN=system:node:a`, valid for a server with these
    /// alternative names (`DNS:…,IP:…`) if there are any, and for a client.
    pub(crate) fn issue(&self, name: &str, subject: &str, names: &str) -> Result<Certificate> {
        let at = |suffix: &str| self.at(&format!("{name}.{suffix}"));
        let (key, request, certificate, extensions) = (at("key"), at("csr"), at("crt"), at("ext"));
        let mut text = "extendedKeyUsage=serverAuth,clientAuth\n".to_owned();
        if !names.is_empty() {
            text.push_str(&format!("subjectAltName={names}\n"));
        }
        std::fs::write(&extensions, text)?;
        let mut args = vec!["req", "-subj", subject, "-keyout", &key, "-out", &request];
        args.extend(KEY);
        run("openssl", &args)?;
        let (ca, ca_key) = (self.at("ca.crt"), self.at("ca.key"));
        let mut args = vec![
            "x509",
            "-req",
            "-days",
            "2",
            "-in",
            &request,
            "-out",
            &certificate,
        ];
        args.extend([
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-CAcreateserial",
            "-extfile",
            &extensions,
        ]);
        run("openssl", &args)?;
        Ok(Certificate {
            certificate: certificate.into(),
            key: key.into(),
        })
    }

    /// Writes a kubeconfig of a client for the server `url`.
    pub(crate) fn kubeconfig(&self, name: &str, subject: &str, url: &str) -> Result<PathBuf> {
        let issued = self.issue(name, subject, "")?;
        let config = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "boxlite",
            "clusters": [{"name": "boxlite", "cluster": {"server": url, "certificate-authority": self.at("ca.crt")}}],
            "users": [{"name": name, "user": {"client-certificate": issued.certificate, "client-key": issued.key}}],
            "contexts": [{"name": "boxlite", "context": {"cluster": "boxlite", "user": name}}],
        });
        let path = PathBuf::from(self.at(&format!("{name}.kubeconfig")));
        std::fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
        Ok(path)
    }
}
