//! [`Containerd`]: a stock containerd with a private root, state, sockets and configuration, and `ctr` commands against
//! it.
//!
//! The programs come from Debian or are built from source by `e2e/scripts/containerd`; none is installed. Assertions are
//! made by the cases.

use crate::failure::{During, Failure, Result};
use crate::install::{self, Install};
use crate::node::{Mirror, write_mirrors};
use crate::service::Service;
use crate::{ensure, poll};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;
use tokio::process::Command;
use tokio::sync::Mutex;

/// Name of the runtime as users write it.
pub(crate) const RUNTIME: &str = "io.containerd.boxlite.v2";
/// Time limit for a task's state.
pub(crate) const STATE_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit of one `ctr` command, which may boot a VM.
const CTR_TIMEOUT: Duration = Duration::from_secs(240);

/// containerd version, in order of release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Version {
    /// 1.6 of Debian 12.
    #[value(name = "1.6")]
    V1,
    /// The last 1.x release. Built from source, since Debian does not have it; only on request.
    #[value(name = "1.7")]
    V17,
    /// 2.1 of Debian unstable.
    #[value(name = "2")]
    V2,
    /// 2.3, which starts shims with protobuf messages. Built from source; only on request.
    #[value(name = "2.3")]
    V23,
}

impl Version {
    /// Versions from Debian, which run by default.
    pub(crate) const DEFAULT: [Self; 2] = [Self::V1, Self::V2];
    const ALL: [Self; 4] = [Self::V1, Self::V17, Self::V2, Self::V23];

    /// Returns a short name for directories.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V1 => "1.6",
            Self::V17 => "1.7",
            Self::V2 => "2",
            Self::V23 => "2.3",
        }
    }

    /// Returns the flag of `ctr run` that sets an annotation: ctr 1.6 turns labels into annotations.
    pub(crate) fn annotation_flag(self) -> &'static str {
        match self {
            Self::V1 => "--label",
            Self::V17 | Self::V2 | Self::V23 => "--annotation",
        }
    }
}

/// Options of a containerd.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// Name of the directory below the scratch directory. Short, because socket paths are limited.
    pub name: String,
    /// Version to run.
    pub version: Version,
    /// `vmm` key of the shim's configuration.
    pub vmm: String,
    /// Sandboxer of 2.x: `podsandbox` or `shim`.
    pub sandboxer: &'static str,
    /// CRI snapshotter: `overlayfs` or `erofs`.
    pub snapshotter: &'static str,
    /// Additional lines at the start of the shim's configuration.
    pub shim: String,
    /// Registry mirrors of the CRI plugin.
    pub registries: Vec<Mirror>,
    /// Additional variables of containerd, which its shims inherit.
    pub environment: Vec<(&'static str, String)>,
}

impl Options {
    /// Returns the default options.
    pub(crate) fn new(name: &str, version: Version, vmm: &str) -> Self {
        Self {
            name: name.to_owned(),
            version,
            vmm: vmm.to_owned(),
            sandboxer: "podsandbox",
            snapshotter: "overlayfs",
            shim: String::new(),
            registries: Vec::new(),
            environment: Vec::new(),
        }
    }
}

/// A containerd under test.
pub(crate) struct Containerd {
    /// Directory of all its files.
    pub dir: PathBuf,
    bin: Mutex<PathBuf>,
    path: String,
    environment: Vec<(&'static str, String)>,
    service: Service,
}

fn programs(version: Version) -> PathBuf {
    install::cache().join(format!("containerd-{}/usr/bin", version.name()))
}

impl Containerd {
    /// Writes the configuration and starts containerd.
    pub(crate) async fn start(scratch: &Path, install: &Install, options: Options) -> Result<Self> {
        let dir = scratch.join(&options.name);
        std::fs::create_dir_all(dir.join("cni"))?;
        // containerd finds the shim by its name in PATH.
        let shims = install.shim.parent().unwrap_or(Path::new("/"));
        let bin = programs(options.version);
        ensure!(
            bin.join("containerd").exists(),
            "{} not found: run `make test-containerd VERSION={}`",
            bin.display(),
            options.version.name()
        );
        std::fs::create_dir_all("/run/containerd")?;
        std::fs::write(dir.join("shim.toml"), shim_config(&dir, install, &options))?;
        std::fs::write(dir.join("cni/10-e2e.conflist"), conflist(&dir))?;
        write_mirrors(&dir.join("certs.d"), &options.registries)?;
        for version in Version::ALL {
            let text = config(&dir, install, &options, version);
            std::fs::write(dir.join(format!("config-{}.toml", version.name())), text)?;
        }
        let daemon = Self {
            path: format!(
                "{}:{}",
                shims.display(),
                std::env::var("PATH").unwrap_or_default()
            ),
            bin: Mutex::new(bin),
            environment: options.environment,
            service: Service::new("containerd", dir.join("containerd.log")),
            dir,
        };
        daemon.serve(options.version).await?;
        Ok(daemon)
    }

    /// Starts a version of containerd on these files and waits until it answers: a restart or an upgrade.
    pub(crate) async fn serve(&self, version: Version) -> Result {
        let bin = programs(version);
        let mut command = Command::new(bin.join("containerd"));
        command
            .arg("--config")
            .arg(self.dir.join(format!("config-{}.toml", version.name())))
            .env("PATH", format!("{}:{}", bin.display(), self.path))
            .env("BOXLITE_SHIM_CONFIG", self.dir.join("shim.toml"))
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        *self.bin.lock().await = bin;
        self.service
            .start(command, || async { self.ok(&["version"]).await.map(drop) })
            .await
    }

    /// Kills containerd with SIGKILL, without its shims.
    pub(crate) async fn kill(&self) -> Result {
        self.service.kill().await
    }

    /// Returns the path of the socket of containerd's services and CRI.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    /// Returns the process of containerd.
    pub(crate) fn service(&self) -> &Service {
        &self.service
    }

    /// Returns the path of the log.
    pub(crate) fn log(&self) -> PathBuf {
        self.service.log().to_owned()
    }

    /// Returns a `ctr` command that has not been started.
    pub(crate) async fn ctr(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.bin.lock().await.join("ctr"));
        command
            .arg("--address")
            .arg(self.socket())
            .args(args)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    /// Runs `ctr` to completion.
    pub(crate) async fn output(&self, args: &[&str]) -> Result<Output> {
        let mut command = self.ctr(args).await;
        let done = tokio::time::timeout(CTR_TIMEOUT, command.output()).await;
        done.during(format!("ctr {}", args.join(" ")))?
            .during(format!("ctr {}", args.join(" ")))
    }

    /// Runs `ctr`, fails unless it succeeds, and returns its standard output.
    pub(crate) async fn ok(&self, args: &[&str]) -> Result<String> {
        let output = self.output(args).await?;
        ensure!(
            output.status.success(),
            "ctr {}: {}: {}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs `ctr run` of the imported image with the shim.
    pub(crate) async fn run(&self, flags: &[&str], id: &str, argv: &[&str]) -> Result<Output> {
        self.output(&run_args(flags, id, argv)).await
    }

    /// Starts a detached task that sleeps.
    pub(crate) async fn sleeper(&self, id: &str) -> Result {
        self.ok(&run_args(&["-d"], id, &["sleep", "600"]))
            .await
            .map(drop)
    }

    /// Kills the task and deletes task and container.
    pub(crate) async fn remove(&self, id: &str) -> Result {
        self.ok(&["task", "kill", "-s", "SIGKILL", id]).await?;
        self.stopped(id).await?;
        self.output(&["task", "delete", id]).await?;
        self.ok(&["container", "delete", id]).await.map(drop)
    }

    /// Waits until the task is STOPPED.
    pub(crate) async fn stopped(&self, id: &str) -> Result {
        self.state(id, "STOPPED").await
    }

    /// Waits until `ctr task ls` reports a state of the task.
    pub(crate) async fn state(&self, id: &str, wanted: &str) -> Result {
        poll::until(&format!("{id} is {wanted}"), STATE_TIMEOUT, || async {
            let list = self.ok(&["task", "ls"]).await?;
            let line = list
                .lines()
                .find(|line| line.split_whitespace().next() == Some(id));
            ensure!(line.is_some_and(|line| line.contains(wanted)), "{line:?}");
            Ok(())
        })
        .await
    }

    /// Returns the task's pid as reported by `ctr task ls`.
    pub(crate) async fn pid(&self, id: &str) -> Result<String> {
        let list = self.ok(&["task", "ls"]).await?;
        let mut lines = list.lines().map(|line| line.split_whitespace());
        let found = lines.find_map(|mut words| {
            (words.next() == Some(id)).then(|| words.next().unwrap_or_default().to_owned())
        });
        found.ok_or_else(|| Failure(format!("task {id} not found in {list}")))
    }

    /// Imports an archive for ctr and CRI.
    pub(crate) async fn import(&self, archive: &Path) -> Result {
        let path = archive.display().to_string();
        for namespace in ["default", "k8s.io"] {
            self.ok(&["-n", namespace, "image", "import", &path])
                .await?;
        }
        Ok(())
    }

    /// Removes every task and container, ignoring errors.
    pub(crate) async fn clear(&self) -> Result {
        for namespace in ["default", "k8s.io"] {
            for id in self
                .ok(&["-n", namespace, "container", "ls", "-q"])
                .await?
                .lines()
            {
                self.output(&["-n", namespace, "task", "delete", "-f", id])
                    .await?;
                self.output(&["-n", namespace, "container", "delete", id])
                    .await?;
            }
        }
        Ok(())
    }

    /// Returns the version that containerd reports.
    pub(crate) async fn version_text(&self) -> Result<String> {
        let text = self.ok(&["version"]).await?;
        let line = text
            .lines()
            .rfind(|line| line.trim_start().starts_with("Version:"));
        let version = line
            .and_then(|line| line.split_whitespace().nth(1))
            .unwrap_or("?");
        Ok(version.split(['~', '+']).next().unwrap_or("?").to_owned())
    }

    /// Returns the bundle directory of a task.
    pub(crate) fn bundle(&self, namespace: &str, id: &str) -> PathBuf {
        let kind = "state/io.containerd.runtime.v2.task";
        self.dir.join(kind).join(namespace).join(id)
    }
}

/// Returns the arguments of `ctr run`.
pub(crate) fn run_args<'a>(flags: &[&'a str], id: &'a str, argv: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["run", "--runtime", RUNTIME];
    args.extend(flags);
    args.extend([super::IMAGE, id]);
    args.extend(argv);
    args
}

fn shim_config(dir: &Path, install: &Install, options: &Options) -> String {
    format!(
        "vmm = \"{}\"\n{}\n[paths]\nguest = \"{}\"\nlibkrunfw = \"{}\"\nqemu = \"{}\"\nvirtiofsd = \"{}\"\n\
         vhost_device_vsock = \"{}\"\npasst = \"{}\"\ncache = \"{}\"\n",
        options.vmm,
        options.shim,
        install.guest.display(),
        install.libkrunfw.display(),
        install.qemu.display(),
        install.virtiofsd.display(),
        install.vhost_device_vsock.display(),
        install.passt.display(),
        dir.parent().unwrap_or(dir).join("shim-cache").display(),
    )
}

fn conflist(dir: &Path) -> String {
    serde_json::json!({"cniVersion": "1.0.0", "name": "ctd", "plugins": [
        {"type": "bridge", "bridge": "bxctd", "isGateway": true, "ipMasq": true, "hairpinMode": true,
         "ipam": {"type": "host-local", "dataDir": dir.join("ipam"), "ranges": [[{"subnet": "10.87.0.0/24"}]],
                  "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}
    ]})
    .to_string()
}

fn config(dir: &Path, install: &Install, options: &Options, version: Version) -> String {
    let at = dir.display();
    let cni = install.cni.display();
    let (image, snapshotter, sandboxer) = (super::IMAGE, options.snapshotter, options.sandboxer);
    // containerd 2.1 parses the options of a sandboxer's handler as runc's and rejects others.
    let handler = match sandboxer {
        "shim" => String::new(),
        _ => format!(
            "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.boxlite.options]\nConfigPath = \"{at}/shim.toml\""
        ),
    };
    let head = format!(
        "root = \"{at}/root\"\nstate = \"{at}/state\"\n[grpc]\naddress = \"{at}/c.sock\"\n[debug]\nlevel = \"info\"\n"
    );
    match version {
        Version::V1 | Version::V17 => format!(
            r#"version = 2
{head}
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
default_runtime_name = "boxlite"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.boxlite]
runtime_type = "io.containerd.boxlite.v2"
pod_annotations = ["io.boxlite.*"]
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.boxlite.options]
ConfigPath = "{at}/shim.toml"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{cni}"
conf_dir = "{at}/cni"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{at}/certs.d"
"#
        ),
        Version::V2 | Version::V23 => format!(
            r#"version = 3
{head}
[plugins."io.containerd.cri.v1.images"]
snapshotter = "{snapshotter}"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{image}"
[plugins."io.containerd.cri.v1.images".registry]
config_path = "{at}/certs.d"
[plugins."io.containerd.nri.v1.nri"]
disable = false
socket_path = "{at}/nri.sock"
plugin_path = "{at}/nri/plugins"
plugin_config_path = "{at}/nri/conf.d"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "boxlite"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.boxlite]
runtime_type = "io.containerd.boxlite.v2"
sandboxer = "{sandboxer}"
snapshotter = "{snapshotter}"
pod_annotations = ["io.boxlite.*"]
{handler}
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{cni}"]
conf_dir = "{at}/cni"
[plugins."io.containerd.service.v1.diff-service"]
default = ["walking"]
"#
        ),
    }
}
