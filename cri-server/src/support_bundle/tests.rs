//! Tests of the bundle: its contents, the exclusion of specs, and hostile files among the logs.

use super::*;
use crate::serve::tests::serve_fixture;
use std::collections::BTreeMap;

/// A configuration whose directories lie below `dir`, without metrics.
fn config_below(dir: &Path) -> Config {
    let mut config = Config {
        root: dir.join("r"),
        state: dir.join("s"),
        listen: dir.join("none.sock"),
        ..Config::default()
    };
    config.metrics.listen = None;
    config
}

/// Creates the directories of a pod with a shim's log.
fn pod(config: &Config, id: &str) -> FilesystemLayout {
    let layout = FilesystemLayout::new(&config.root, &config.state).unwrap();
    std::fs::create_dir_all(layout.vm(id)).unwrap();
    std::fs::write(layout.shim_log(id), "booted\n").unwrap();
    layout
}

fn unpack(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(File::open(path).unwrap()));
    let read = |entry: io::Result<tar::Entry<'_, _>>| {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap();
        let name = path.components().skip(1).collect::<PathBuf>();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        (name.to_string_lossy().into_owned(), bytes)
    };
    archive.entries().unwrap().map(read).collect()
}

#[tokio::test]
async fn bundle_has_logs_and_no_specs() {
    let dir = tempfile::tempdir().unwrap();
    let config = config_below(dir.path());
    let layout = pod(&config, "p1");
    std::fs::write(layout.console("p1"), vec![b'x'; 300 << 10]).unwrap();
    let spec = layout.container_config("p1", "c1");
    std::fs::create_dir_all(spec.parent().unwrap()).unwrap();
    std::fs::write(&spec, "PASSWORD=secret").unwrap();
    let out = dir.path().join("b.tar.gz");
    let _ = support_bundle(config, Some(out.clone())).await;

    assert_eq!(std::fs::metadata(&out).unwrap().mode() & 0o777, 0o600);
    let files = unpack(&out);
    assert_eq!(files["pods/p1/shim.log"], b"booted\n");
    assert_eq!(files["pods/p1/console.log"].len() as u64, LOG_BYTES);
    assert!(files["version.txt"].starts_with(env!("CARGO_PKG_VERSION").as_bytes()));
    assert!(files.contains_key("machine/proc-meminfo"));
    toml::from_slice::<toml::Table>(&files["config.toml"]).unwrap();
    serde_json::from_slice::<serde_json::Value>(&files["check.json"]).unwrap();
    let errors = String::from_utf8_lossy(&files["errors.txt"]).into_owned();
    assert!(errors.contains("status.json: no daemon serves"), "{errors}");
    let secret = |bytes: &Vec<u8>| bytes.windows(6).any(|word| word == b"secret");
    assert!(!files.values().any(secret), "the spec is in the bundle");
}

#[tokio::test]
async fn links_and_fifos_of_a_vmm_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let config = config_below(dir.path());
    let layout = pod(&config, "p1");
    std::os::unix::fs::symlink("/etc/passwd", layout.console("p1")).unwrap();
    pod(&config, "p2");
    nix::unistd::mkfifo(&layout.console("p2"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut parts = Parts::default();
    pods(&layout, &mut parts);
    let names: Vec<_> = parts.files.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(
        names.iter().all(|name| name.ends_with("shim.log")),
        "{names:?}"
    );
    assert_eq!(parts.errors.len(), 2, "{:?}", parts.errors);
}

#[tokio::test]
async fn bundle_of_a_running_daemon_has_its_status() {
    let serving = serve_fixture().await;
    let dir = tempfile::tempdir().unwrap();
    let mut config = config_below(dir.path());
    config.listen = serving.socket.clone();
    let parts = collect(config).await;
    let status = parts.files.iter().find(|(name, _)| name == "status.json");
    let status: serde_json::Value = serde_json::from_slice(&status.unwrap().1).unwrap();
    assert_eq!(status["api"], "v1");
    serving.stop().await;
}

#[test]
fn existing_file_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.tar.gz");
    std::fs::write(&path, "mine").unwrap();
    let error = write(&path, "b", 0, &Parts::default()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}
