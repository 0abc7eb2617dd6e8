//! The steps of [`Installer`] and [`remove_all`] on a directory as the node's root, with a cluster and a host in memory.

use crate::error::{InstallError, Result};
use crate::host::Host;
use crate::kube::{Change, Cluster, EventKind, NodeInfo};
use crate::node::{Installer, Settings};
use crate::removal::{RemovalSettings, remove_all};
use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};

const IMPORTS: &str = "version = 3\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n";
const DROP_IN: &str = "etc/containerd/conf.d/boxlite.toml";

/// Cluster with one node whose handlers are those of the drop-in at the last restart, and a record of all calls.
struct Fake {
    root: tempfile::TempDir,
    node: RefCell<NodeInfo>,
    calls: RefCell<Vec<String>>,
    /// Reason why a restart fails.
    broken: Option<&'static str>,
}

impl Fake {
    fn new(config: &str) -> Self {
        let root = tempfile::tempdir().expect("a directory");
        let fake = Self {
            node: RefCell::new(NodeInfo {
                name: "n".into(),
                runtime_version: "containerd://2.1.9".into(),
                handlers: Some(vec!["runc".into()]),
                ..NodeInfo::default()
            }),
            root,
            calls: RefCell::default(),
            broken: None,
        };
        for dir in ["etc/containerd", "proc", "opt", "payload/bin"] {
            fs::create_dir_all(fake.path(dir)).expect("a directory");
        }
        fs::write(fake.path("etc/containerd/config.toml"), config).expect("a file");
        fs::write(fake.path("payload/bin/containerd-shim-boxlite-v2"), "shim").expect("a file");
        fake
    }

    fn path(&self, file: &str) -> PathBuf {
        self.root.path().join(file)
    }

    fn settings(&self) -> Settings {
        Settings {
            node: "n".into(),
            handler: "boxlite".into(),
            prefix: "/opt/boxlite".into(),
            payload: self.path("payload"),
            root: self.root.path().to_owned(),
            runtime: None,
            containerd_config: "/etc/containerd/config.toml".into(),
            restart: Vec::new(),
            shim_toml: "vmm = \"auto\"".into(),
            timeout_seconds: 0,
            poll_ms: 1,
        }
    }

    async fn install(&self) -> Result<()> {
        let settings = self.settings();
        self.installer(&settings).install().await
    }

    async fn uninstall(&self) -> Result<()> {
        let settings = self.settings();
        self.installer(&settings).uninstall().await
    }

    fn installer<'a>(&'a self, settings: &'a Settings) -> Installer<'a, Self, Self> {
        Installer {
            settings,
            cluster: self,
            host: self,
        }
    }

    fn calls(&self) -> Vec<String> {
        self.calls.take()
    }

    /// Files below the root, except the payload's.
    fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        visit(self.root.path(), self.root.path(), &mut files);
        files.retain(|f| !f.starts_with("payload"));
        files.sort();
        files
    }
}

fn visit(root: &Path, dir: &Path, files: &mut Vec<String>) {
    for entry in fs::read_dir(dir).expect("a directory").flatten() {
        let path = entry.path();
        let relative = path.strip_prefix(root).expect("below the root");
        files.push(relative.display().to_string());
        if path.is_dir() {
            visit(root, &path, files);
        }
    }
}

impl Host for Fake {
    fn run(&self, command: &[String]) -> Result<String> {
        self.calls.borrow_mut().push(command.join(" "));
        if let Some(reason) = self.broken {
            return Err(InstallError::Command {
                command: command.join(" "),
                reason: reason.into(),
            });
        }
        let mut handlers = vec!["runc".to_owned()];
        handlers.extend(self.path(DROP_IN).exists().then(|| "boxlite".to_owned()));
        self.node.borrow_mut().handlers = Some(handlers);
        Ok(String::new())
    }
}

impl Cluster for Fake {
    async fn node(&self, _name: &str) -> Result<NodeInfo> {
        Ok(self.node.borrow().clone())
    }

    async fn nodes(&self) -> Result<Vec<NodeInfo>> {
        Ok(vec![self.node.borrow().clone()])
    }

    async fn change(&self, _name: &str, changes: &[Change]) -> Result<()> {
        let mut node = self.node.borrow_mut();
        for change in changes {
            self.calls.borrow_mut().push(format!("{change:?}"));
            match change {
                Change::Label(value) => node.labeled = value.is_some(),
                Change::State(value) => node.state = value.map(str::to_owned),
                Change::Uninstall(value) => {
                    node.uninstall = value.is_some();
                    // The node's installer answers at once.
                    if node.uninstall && self.broken.is_none() {
                        node.state = Some("removed".into());
                    }
                }
            }
        }
        Ok(())
    }

    async fn event(&self, _node: &NodeInfo, kind: EventKind, message: &str) -> Result<()> {
        self.calls.borrow_mut().push(format!("{kind:?}: {message}"));
        Ok(())
    }

    async fn delete_daemon_set(&self, namespace: &str, name: &str) -> Result<bool> {
        let call = format!("delete {namespace}/{name}");
        let again = self.calls.borrow().contains(&call);
        self.calls.borrow_mut().push(call);
        Ok(!again)
    }
}

#[tokio::test]
async fn install_labels_after_the_handler_is_reported() {
    let fake = Fake::new(IMPORTS);
    fake.install().await.expect("installed");
    assert_eq!(
        fake.calls(),
        [
            "State(Some(\"installing\"))",
            "systemctl restart containerd",
            "Label(Some(\"true\"))",
            "State(Some(\"ready\"))",
            "Installed: runtime handler boxlite installed",
        ]
    );
    let config = fs::read_to_string(fake.path("opt/boxlite/etc/shim.toml")).expect("a file");
    let config: toml::Table = config.parse().expect("TOML");
    assert_eq!(config["vmm"].as_str(), Some("auto"));
    assert_eq!(
        config["paths"]["cache"].as_str(),
        Some("/opt/boxlite/cache")
    );
    // A restarted pod changes nothing and restarts nothing.
    fake.install().await.expect("installed again");
    assert_eq!(
        fake.calls(),
        ["Label(Some(\"true\"))", "State(Some(\"ready\"))"]
    );
}

#[tokio::test]
async fn install_restarts_if_the_handler_is_missing() {
    let fake = Fake::new(IMPORTS);
    fake.install().await.expect("installed");
    fake.node.borrow_mut().handlers = Some(Vec::new());
    fake.calls();
    fake.install().await.expect("installed again");
    assert!(
        fake.calls()
            .contains(&"systemctl restart containerd".to_owned())
    );
}

#[tokio::test]
async fn install_without_import_fails_and_removes_the_drop_in() {
    let fake = Fake::new("version = 3\n");
    let error = fake.install().await.expect_err("refused").to_string();
    assert!(error.contains("/etc/containerd/conf.d/*.toml"), "{error}");
    assert!(!fake.path(DROP_IN).exists());
    let calls = fake.calls();
    assert!(
        !calls
            .iter()
            .any(|c| c.contains("systemctl") || c.contains("true")),
        "{calls:?}"
    );
    assert!(
        calls
            .iter()
            .any(|c| c.starts_with("InstallFailed: invalid configuration"))
    );
    assert_eq!(fake.node.borrow().state.as_deref(), Some("failed"));
}

#[tokio::test]
async fn install_on_k3s_without_drop_ins_fails() {
    let fake = Fake::new("");
    let dir = fake.path("var/lib/rancher/k3s/agent/etc/containerd");
    fs::create_dir_all(&dir).expect("a directory");
    fs::write(dir.join("config.toml"), "version = 3\n").expect("a file");
    let error = fake.install().await.expect_err("refused").to_string();
    assert!(
        error.contains("k3s/agent/etc/containerd/config-v3.toml.d/*.toml"),
        "{error}"
    );
    assert!(!dir.join("config-v3.toml.d").exists());
}

#[tokio::test]
async fn install_demotes_a_node_whose_restart_fails() {
    let mut fake = Fake::new(IMPORTS);
    fake.broken = Some("exit status: 1");
    fake.node.borrow_mut().labeled = true;
    let error = fake.install().await.expect_err("refused").to_string();
    assert!(error.contains("systemctl restart containerd"), "{error}");
    assert!(!fake.node.borrow().labeled);
}

#[tokio::test]
async fn uninstall_restores_the_file_tree() {
    let fake = Fake::new(IMPORTS);
    let before = fake.files();
    fake.install().await.expect("installed");
    fs::write(fake.path("opt/boxlite/cache"), "").expect("a file of the shim");
    fake.calls();
    fake.uninstall().await.expect("removed");
    assert_eq!(fake.files(), before);
    assert_eq!(
        fake.calls(),
        [
            "Label(None)",
            "systemctl restart containerd",
            "Removed: runtime handler removed",
            "State(Some(\"removed\"))",
        ]
    );
    fake.uninstall().await.expect("removed again");
}

#[tokio::test]
async fn uninstall_with_running_pods_keeps_their_programs() {
    let fake = Fake::new(IMPORTS);
    fake.install().await.expect("installed");
    fs::create_dir(fake.path("proc/77")).expect("a process");
    let shim = "/opt/boxlite/bin/containerd-shim-boxlite-v2";
    std::os::unix::fs::symlink(shim, fake.path("proc/77/exe")).expect("a link");
    let error = fake.uninstall().await.expect_err("refused").to_string();
    assert!(error.contains("1 pods are running"), "{error}");
    assert!(!fake.node.borrow().labeled);
    assert!(fake.path(&shim[1..]).exists() && fake.path(DROP_IN).exists());
}

#[tokio::test]
async fn remove_all_deletes_the_daemon_set_before_the_annotations() {
    let fake = Fake::new(IMPORTS);
    fake.node.borrow_mut().state = Some("ready".into());
    let settings = RemovalSettings {
        namespace: "boxlite".into(),
        daemon_set: "installer".into(),
        timeout_seconds: 10,
        poll_ms: 1,
    };
    remove_all(&fake, &settings).await.expect("removed");
    assert_eq!(
        fake.calls(),
        [
            "Label(None)",
            "Uninstall(Some(\"true\"))",
            "delete boxlite/installer",
            "delete boxlite/installer",
            "State(None)",
            "Uninstall(None)",
        ]
    );
}

#[tokio::test]
async fn remove_all_names_nodes_that_do_not_answer() {
    let mut fake = Fake::new(IMPORTS);
    fake.broken = Some("silent");
    fake.node.borrow_mut().state = Some("ready".into());
    let settings = RemovalSettings {
        namespace: "boxlite".into(),
        daemon_set: "installer".into(),
        timeout_seconds: 0,
        poll_ms: 1,
    };
    let error = remove_all(&fake, &settings).await.expect_err("refused");
    assert!(error.to_string().contains("n: ready"), "{error}");
    assert!(!fake.calls().iter().any(|c| c.starts_with("delete")));
}
