//! Tests of `hosts`: order, directory names, defaults, invalid files, and TLS with a real registry.

use super::*;

fn directory(files: &[(&str, &str)]) -> (tempfile::TempDir, HostDirectory) {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let options = RegistryOptions {
        certs_dir: dir.path().to_path_buf(),
        ..Default::default()
    };
    let hosts = HostDirectory::new(options);
    (dir, hosts)
}

fn urls(hosts: &[RegistryHost]) -> Vec<&str> {
    hosts.iter().map(|h| h.base.as_str()).collect()
}

#[test]
fn hosts_lists_mirrors_in_order_and_server_last() {
    let (_dir, hosts) = directory(&[(
        "registry.k8s.io/hosts.toml",
        r#"
        server = "http://127.0.0.1:9"
        [host."http://127.0.0.1:7"]
        capabilities = ["pull"]
        [host."http://127.0.0.1:5/mirror/v2/k8s"]
        override_path = true
        [host."http://127.0.0.1:5/mirror".header]
        x-key = ["a", "b"]
        "#,
    )]);
    let found = hosts.hosts("registry.k8s.io").unwrap();
    assert_eq!(
        urls(&found),
        [
            "http://127.0.0.1:7/v2",
            "http://127.0.0.1:5/mirror/v2/k8s",
            "http://127.0.0.1:5/mirror/v2",
            "http://127.0.0.1:9/v2"
        ]
    );
    assert!(!found[0].resolve && found[0].pull && found[1].resolve && found[0].mirror);
    assert_eq!(found[2].headers.get_all("x-key").iter().count(), 2);
}

#[test]
fn hosts_finds_directory_or_default() {
    let (_dir, hosts) = directory(&[
        (
            "localhost_5000_/hosts.toml",
            "server = 'http://127.0.0.1:1'",
        ),
        ("_default/hosts.toml", "[host.'http://127.0.0.1:2']\n"),
    ]);
    assert_eq!(
        urls(&hosts.hosts("localhost:5000").unwrap()),
        ["http://127.0.0.1:1/v2"]
    );
    assert_eq!(
        urls(&hosts.hosts("127.0.0.1:77").unwrap()),
        ["http://127.0.0.1:2/v2", "http://127.0.0.1:77/v2"]
    );
    let (_dir, none) = directory(&[]);
    let local = none.hosts("localhost:5000").unwrap();
    assert_eq!(urls(&local), ["http://localhost:5000/v2"]);
    assert!(!local[0].mirror);
    assert_eq!(default_server("docker.io"), "https://registry-1.docker.io");
    assert_eq!(default_server("[::1]:5000"), "http://[::1]:5000");
    assert_eq!(default_server("localhost:443"), "https://localhost:443");
    assert_eq!(default_server("ghcr.io"), "https://ghcr.io");
}

#[test]
fn hosts_error_names_the_file() {
    for text in [
        "server = 1",
        "[host.'ftp://x']",
        "[host.'http://x']\nca = 'gone.pem'",
        "[host.'http://x'.header]\n'a b'='c'",
    ] {
        let (_dir, hosts) = directory(&[("x.io/hosts.toml", text)]);
        let Err(error) = hosts.hosts("x.io") else {
            panic!("{text} was taken")
        };
        assert!(
            matches!(error, ImageError::Config { .. }),
            "{text}: {error}"
        );
        assert!(error.to_string().contains("x.io/hosts.toml"), "{error}");
    }
}

/// Debian's docker-registry with a test certificate, killed on drop.
struct TlsRegistry {
    child: std::process::Child,
    dir: tempfile::TempDir,
    port: u16,
}

impl TlsRegistry {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let openssl = |args: &[&str]| {
            let key = [
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
            ];
            let out = std::process::Command::new("openssl")
                .args(["req", "-x509", "-days", "2"])
                .args(key)
                .args(args)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success(), "{said}");
        };
        let (ca, ca_key) = (at("ca.pem"), at("ca.key"));
        openssl(&["-subj", "/CN=test root", "-keyout", &ca_key, "-out", &ca]);
        // A separate leaf certificate: webpki does not accept a root as a server certificate.
        let leaf = [
            "-subj",
            "/CN=localhost",
            "-keyout",
            &at("key.pem"),
            "-out",
            &at("cert.pem"),
        ];
        let by_root = ["-CA", &ca, "-CAkey", &ca_key];
        let names = ["-addext", "subjectAltName=DNS:localhost"];
        let no_ca = ["-addext", "basicConstraints=critical,CA:FALSE"];
        openssl(&[&leaf[..], &by_root, &names, &no_ca].concat());
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: 127.0.0.1:{port}, tls: {{certificate: {}, key: {}}}}}\n",
            at("data"),
            at("cert.pem"),
            at("key.pem")
        );
        std::fs::write(at("config.yml"), config).unwrap();
        let child = std::process::Command::new("docker-registry")
            .args(["serve", &at("config.yml")])
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("docker-registry is installed");
        // Wait up to 10 s for the start of the Go program on a loaded machine.
        for _ in 0..100 {
            if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        Self { child, dir, port }
    }
}

impl Drop for TlsRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs docker-registry")]
async fn tls_uses_configured_root_or_skips_verification() {
    use crate::images::ImageErrorKind;
    use crate::images::reference::Reference;
    use crate::images::registry::Session;

    let registry = TlsRegistry::start();
    let ca = registry.dir.path().join("ca.pem").display().to_string();
    let server = format!("server = 'https://localhost:{}'\n", registry.port);
    // NotFound proves that the TLS handshake succeeded.
    for (settings, want) in [
        (format!("{server}ca = '{ca}'\n"), ImageErrorKind::NotFound),
        (
            format!("{server}skip_verify = true\n"),
            ImageErrorKind::NotFound,
        ),
        (server.clone(), ImageErrorKind::Unavailable),
    ] {
        let (_dir, hosts) = directory(&[("x.example/hosts.toml", &settings)]);
        let reference = Reference::parse("x.example/nothing:here").unwrap();
        let session = Session::new(&hosts, &reference, None).unwrap();
        let error = session
            .manifest("here", None)
            .await
            .err()
            .expect("the registry is empty");
        assert_eq!(error.kind(), want, "{settings}: {}", error.report());
        if want == ImageErrorKind::Unavailable {
            assert!(
                error.report().to_lowercase().contains("certificate"),
                "{}",
                error.report()
            );
        }
    }
}

#[test]
fn fuzz_hosts_file_is_read_or_rejected() {
    let words = [
        "[host.\"",
        "server = ",
        "capabilities = []\n",
        "ca = ",
        "client = [[",
        "override_path = true\n",
        "http://",
        "[::1",
    ];
    boxlite_fuzz::Fuzz::new("hosts").words(&words).run(|input| {
        let (_dir, hosts) = directory(&[]);
        let path = hosts.options.certs_dir.join("example.org");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("hosts.toml"), input).unwrap();
        if let Ok(found) = hosts.hosts("example.org") {
            assert!(!found.is_empty());
        }
    });
}
