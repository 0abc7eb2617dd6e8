//! [`Containerd`]: one stock containerd with root, state, sockets and configuration of its own, and `ctr` against it.
//!
//! The programs are Debian's, or built from source, by `e2e/scripts/containerd`; nothing of them is installed. Judges nothing.

use crate::install::Install;
use crate::node::{Mirror, write_mirrors};
use crate::outcome::{During, Failure, Result};
use crate::service::Service;
use crate::{ensure, wait};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;
use tokio::process::Command;
use tokio::sync::Mutex;

/// Name of the runtime, as a user writes it.
pub const RUNTIME: &str = "io.containerd.boxlite.v2";
/// Longest wait for a task's state.
pub const STATE: Duration = Duration::from_secs(60);
/// Longest run of `ctr`; one may boot a VM.
const CTR: Duration = Duration::from_secs(240);

/// Which containerd. All of them in the order in which they came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Version {
    /// Debian 12's: 1.6.
    #[value(name = "1.6")]
    V1,
    /// The last of 1.x. Built from source, as Debian does not have it: only when asked for.
    #[value(name = "1.7")]
    V17,
    /// 2.1 of Debian's unstable suite.
    #[value(name = "2")]
    V2,
    /// 2.3, whose start of a shim speaks protobuf. Built from source, only when asked for.
    #[value(name = "2.3")]
    V23,
}

impl Version {
    /// Debian's, which are run when none is asked for.
    pub const USUAL: [Self; 2] = [Self::V1, Self::V2];
    const ALL: [Self; 4] = [Self::V1, Self::V17, Self::V2, Self::V23];

    /// Short, for directories.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "1.6",
            Self::V17 => "1.7",
            Self::V2 => "2",
            Self::V23 => "2.3",
        }
    }

    /// Flag of `ctr run` that makes an annotation: ctr 1.6 makes annotations of labels.
    pub fn annotation_flag(self) -> &'static str {
        match self {
            Self::V1 => "--label",
            Self::V17 | Self::V2 | Self::V23 => "--annotation",
        }
    }
}

/// What differs between containerds.
#[derive(Debug, Clone)]
pub struct Options {
    /// Short: its files lie below `<scratch>/<name>`.
    pub name: String,
    /// Which one.
    pub version: Version,
    /// The shim's `vmm`.
    pub vmm: String,
    /// Who represents a pod with 2.x: `podsandbox` or `shim`.
    pub sandboxer: &'static str,
    /// `overlayfs` or `erofs`, for CRI.
    pub snapshotter: &'static str,
    /// More lines of the shim's configuration, in front.
    pub shim: String,
    /// Where CRI's images come from.
    pub registries: Vec<Mirror>,
}

impl Options {
    /// The usual.
    pub fn new(name: &str, version: Version, vmm: &str) -> Self {
        Self {
            name: name.to_owned(),
            version,
            vmm: vmm.to_owned(),
            sandboxer: "podsandbox",
            snapshotter: "overlayfs",
            shim: String::new(),
            registries: Vec::new(),
        }
    }
}

/// See the module.
pub struct Containerd {
    /// All its files.
    pub dir: PathBuf,
    bin: Mutex<PathBuf>,
    path: String,
    service: Service,
}

fn programs(version: Version) -> PathBuf {
    let home = std::env::var_os("HOME").map_or_else(|| "/root".into(), PathBuf::from);
    let cache = std::env::var_os("BOXLITE_CACHE")
        .map_or_else(|| home.join(".cache/boxlite-cri"), PathBuf::from);
    cache.join(format!("containerd-{}/usr/bin", version.name()))
}

impl Containerd {
    /// Writes the configuration and starts it.
    pub async fn start(scratch: &Path, install: &Install, options: Options) -> Result<Self> {
        let dir = scratch.join(&options.name);
        std::fs::create_dir_all(dir.join("cni"))?;
        // The shim's name is how containerd finds it, in PATH.
        let shims = install.shim.parent().unwrap_or(Path::new("/"));
        let bin = programs(options.version);
        ensure!(
            bin.join("containerd").exists(),
            "{} is missing: `make test-containerd VERSION={}` brings it",
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
            service: Service::new("containerd", dir.join("containerd.log")),
            dir,
        };
        daemon.serve(options.version).await?;
        Ok(daemon)
    }

    /// Runs a version of containerd on these files and waits until it answers: a restart, or an upgrade.
    pub async fn serve(&self, version: Version) -> Result {
        let bin = programs(version);
        let mut command = Command::new(bin.join("containerd"));
        command
            .arg("--config")
            .arg(self.dir.join(format!("config-{}.toml", version.name())))
            .env("PATH", format!("{}:{}", bin.display(), self.path))
            .env("BOXLITE_SHIM_CONFIG", self.dir.join("shim.toml"));
        *self.bin.lock().await = bin;
        self.service
            .start(command, || async { self.ok(&["version"]).await.map(drop) })
            .await
    }

    /// kill -9 of containerd alone.
    pub async fn kill(&self) -> Result {
        self.service.kill().await
    }

    /// Its socket, of containerd's own services and of CRI.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    /// Its process.
    pub fn service(&self) -> &Service {
        &self.service
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.service.log().to_owned()
    }

    /// `ctr` with these arguments, not yet run.
    pub async fn ctr(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.bin.lock().await.join("ctr"));
        command
            .arg("--address")
            .arg(self.socket())
            .args(args)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    /// Runs `ctr` to its end.
    pub async fn output(&self, args: &[&str]) -> Result<Output> {
        let mut command = self.ctr(args).await;
        let done = tokio::time::timeout(CTR, command.output()).await;
        done.during(format!("ctr {}", args.join(" ")))?
            .during(format!("ctr {}", args.join(" ")))
    }

    /// Runs `ctr`, which must succeed; gives its standard output.
    pub async fn ok(&self, args: &[&str]) -> Result<String> {
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

    /// `ctr run` of the imported image with our runtime: flags, id, command.
    pub async fn run(&self, flags: &[&str], id: &str, argv: &[&str]) -> Result<Output> {
        self.output(&run_args(flags, id, argv)).await
    }

    /// A task that sleeps, detached.
    pub async fn sleeper(&self, id: &str) -> Result {
        self.ok(&run_args(&["-d"], id, &["sleep", "600"]))
            .await
            .map(drop)
    }

    /// SIGKILL, wait, delete task and container.
    pub async fn remove(&self, id: &str) -> Result {
        self.ok(&["task", "kill", "-s", "SIGKILL", id]).await?;
        self.stopped(id).await?;
        self.output(&["task", "delete", id]).await?;
        self.ok(&["container", "delete", id]).await.map(drop)
    }

    /// Waits until the task is STOPPED.
    pub async fn stopped(&self, id: &str) -> Result {
        self.state(id, "STOPPED").await
    }

    /// Waits for a state of the task as `ctr task ls` says it.
    pub async fn state(&self, id: &str, wanted: &str) -> Result {
        wait::until(&format!("{id} is {wanted}"), STATE, || async {
            let list = self.ok(&["task", "ls"]).await?;
            let line = list
                .lines()
                .find(|line| line.split_whitespace().next() == Some(id));
            ensure!(line.is_some_and(|line| line.contains(wanted)), "{line:?}");
            Ok(())
        })
        .await
    }

    /// The pid that `ctr task ls` has for a task.
    pub async fn pid(&self, id: &str) -> Result<String> {
        let list = self.ok(&["task", "ls"]).await?;
        let mut lines = list.lines().map(|line| line.split_whitespace());
        let found = lines.find_map(|mut words| {
            (words.next() == Some(id)).then(|| words.next().unwrap_or_default().to_owned())
        });
        found.ok_or_else(|| Failure(format!("no task {id} in {list}")))
    }

    /// Imports an archive for ctr and for CRI.
    pub async fn import(&self, archive: &Path) -> Result {
        let path = archive.display().to_string();
        for namespace in ["default", "k8s.io"] {
            self.ok(&["-n", namespace, "image", "import", &path])
                .await?;
        }
        Ok(())
    }

    /// Removes every task and container, as far as it goes.
    pub async fn clear(&self) -> Result {
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

    /// As it tells itself.
    pub async fn version_text(&self) -> Result<String> {
        let text = self.ok(&["version"]).await?;
        let line = text
            .lines()
            .rfind(|line| line.trim_start().starts_with("Version:"));
        let version = line
            .and_then(|line| line.split_whitespace().nth(1))
            .unwrap_or("?");
        Ok(version.split(['~', '+']).next().unwrap_or("?").to_owned())
    }

    /// The bundle of a task.
    pub fn bundle(&self, namespace: &str, id: &str) -> PathBuf {
        let kind = "state/io.containerd.runtime.v2.task";
        self.dir.join(kind).join(namespace).join(id)
    }
}

/// Arguments of `ctr run`.
pub fn run_args<'a>(flags: &[&'a str], id: &'a str, argv: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["run", "--runtime", RUNTIME];
    args.extend(flags);
    args.extend([super::IMAGE, id]);
    args.extend(argv);
    args
}

fn shim_config(dir: &Path, install: &Install, options: &Options) -> String {
    format!(
        "vmm = \"{}\"\n{}\n[paths]\nguest = \"{}\"\nlibkrunfw = \"{}\"\nqemu = \"{}\"\nvirtiofsd = \"{}\"\n\
         vhost_device_vsock = \"{}\"\ncache = \"{}\"\n",
        options.vmm,
        options.shim,
        install.guest.display(),
        install.libkrunfw.display(),
        install.qemu.display(),
        install.virtiofsd.display(),
        install.vhost_device_vsock.display(),
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
    // containerd 2.1 takes the options of a sandboxer's handler for runc's, and refuses others.
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
