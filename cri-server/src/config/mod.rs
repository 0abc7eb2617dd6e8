//! What an operator may set, as one `Config`: defaults, reading of the TOML file, and every mistake in it at once.
//!
//! It reads no file system beyond the one file and touches no tool: `check` does that. `default.toml` beside this file is
//! the commented form that `boxlite-cri config default` prints; a test keeps the two equal.
//!
//! Flow: cli → `Config::load` → serve, check.

mod reader;
#[cfg(test)]
mod tests;

use boxlite_proto::vmm::{Acceleration, VmmKind};
use reader::Section;
pub use reader::socket_path;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The commented default file.
pub const DEFAULT_TOML: &str = include_str!("default.toml");
/// Largest configuration file that is read, in bytes. A real one has less than 8 KiB; this only bounds an accident.
const FILE_LIMIT: u64 = 1 << 20;

/// One wrong entry of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Dotted key, such as `cni.timeout_seconds`.
    pub key: String,
    /// Value as the file has it; empty where there is none to show.
    pub value: String,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.value.is_empty() {
            write!(f, "{}: {}", self.key, self.reason)
        } else {
            write!(f, "{} = {}: {}", self.key, self.value, self.reason)
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{} is not valid TOML", path.display())]
    Syntax {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    /// All wrong entries.
    #[error("{} has {} mistake(s):\n{}", path.display(), mistakes.len(),
        mistakes.iter().map(|m| format!("  {m}")).collect::<Vec<_>>().join("\n"))]
    Mistakes {
        path: PathBuf,
        mistakes: Vec<Mistake>,
    },
}

/// Everything an operator may set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Persistent files (images, database, CNI results). Default /var/lib/boxlite, as the FHS wants for state that
    /// survives a boot.
    pub root: PathBuf,
    /// Files that end with the boot (bundles, sockets, namespaces). Default /run/boxlite: a tmpfs.
    pub state: PathBuf,
    /// Unix socket of the CRI. Default /run/boxlite/cri.sock.
    pub listen: PathBuf,
    /// tracing filter, such as `info` or `boxlite_cri=debug,info`. Default info: one line per call that changes something.
    pub log_level: String,
    /// `None`: ask the hardware. Default auto, since /dev/kvm may exist and yet run no guest.
    pub vmm: Option<VmmKind>,
    /// `None`: what the probe found. Default auto.
    pub acceleration: Option<Acceleration>,
    /// Where programs are.
    pub paths: Paths,
    /// Sizes of a pod's VM.
    pub pod: PodDefaults,
    /// Network plugins.
    pub cni: CniConfig,
    /// Image registries.
    pub registry: RegistryConfig,
    /// Prometheus page.
    pub metrics: MetricsConfig,
    /// Server of exec, attach and port-forward.
    pub streaming: StreamingConfig,
    /// NRI plugins.
    pub nri: NriConfig,
    /// RuntimeClass handlers this runtime answers to. Default "" (no RuntimeClass) and "boxlite".
    pub runtime_handlers: Vec<String>,
    /// Limits of waiting.
    pub timeouts: Timeouts,
}

/// Programs and files of the installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// The static agent.
    pub guest: PathBuf,
    /// The shim.
    pub shim: PathBuf,
    /// Guest kernel.
    pub libkrunfw: PathBuf,
    /// QEMU.
    pub qemu: PathBuf,
    /// Share server for QEMU.
    pub virtiofsd: PathBuf,
    /// vsock device for QEMU.
    pub vhost_device_vsock: PathBuf,
}

/// Sizes of a pod's VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodDefaults {
    /// Virtual CPUs of a pod without CPU limit. Default 1: more cost boot time under TCG.
    pub vcpus: u8,
    /// Memory in MiB for the containers of a pod without memory limit. Default 256.
    pub memory_mib: u32,
    /// MiB added for guest kernel and agent. Default 64: both idle take less than 50.
    pub overhead_mib: u32,
    /// Scratch disk in MiB, sparse: it holds the writable layers. Default 10240.
    pub scratch_mib: u32,
    /// Kernel messages on the console log. Default false: they cost boot time.
    pub debug_console: bool,
}

/// Network plugins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniConfig {
    /// Directory of network configurations; the lexically first valid one is taken. Default /etc/cni/net.d.
    pub conf_dir: PathBuf,
    /// Directories of plugins, in order. Default /opt/cni/bin (where most installers put them), /usr/lib/cni (Debian).
    pub bin_dirs: Vec<PathBuf>,
    /// Limit of one plugin's run. Default 60 s: an IPAM service may have to scale up, a kubelet gives up after 240 s.
    pub timeout: Duration,
}

/// Image registries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryConfig {
    /// containerd's layout `<dir>/<host>/hosts.toml`. Default /etc/boxlite/certs.d.
    pub config_path: PathBuf,
}

/// Prometheus page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricsConfig {
    /// `None`: off. Default 127.0.0.1:9640: not reachable from the network unless asked for.
    pub listen: Option<SocketAddr>,
}

/// Server of exec, attach and port-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamingConfig {
    /// Where it listens, and what its URLs name. Default 127.0.0.1: the kubelet is on this machine, and the streams are
    /// not encrypted.
    pub address: IpAddr,
    /// 0: any free one. Default 0: its URLs are made for each session.
    pub port: u16,
    /// A connection without a byte either way for this long is closed. Default 4 h, the kubelet's own.
    pub idle_timeout: Duration,
    /// What a client may take to open the streams it asked for. Default 30 s, as other runtimes.
    pub creation_timeout: Duration,
}

/// NRI plugins. The names are containerd's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NriConfig {
    /// Whether there are any. Default false: who may connect may change every container, and on a node with containerd the
    /// socket is containerd's.
    pub enable: bool,
    /// Socket to which plugins connect. Default /var/run/nri/nri.sock, where published plugins look for it.
    pub socket_path: PathBuf,
    /// Directory of pre-installed plugins. Default /opt/nri/plugins.
    pub plugin_path: PathBuf,
    /// Directory of their configuration. Default /etc/nri/conf.d.
    pub plugin_config_path: PathBuf,
    /// For a plugin to register, and to take in what is there. Default 5 s.
    pub registration_timeout: Duration,
    /// For a plugin's answer to an event. Default 2 s.
    pub request_timeout: Duration,
    /// Only pre-installed plugins. Default false.
    pub disable_connections: bool,
}

/// Limits of waiting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeouts {
    /// RunPodSandbox in all. Default 230 s: just under the kubelet's 240 s, so that its retry finds a result.
    pub run_pod: Duration,
    /// How long SIGTERM waits for calls under way. Default 10 s: systemd kills after 90.
    pub drain: Duration,
    /// One guest's answer to a stats call. Default 2 s: the kubelet's housekeeping runs every 10 s.
    pub stats: Duration,
}

impl Default for Config {
    fn default() -> Self {
        let programs = Path::new("/usr/local/libexec/boxlite");
        Self {
            root: "/var/lib/boxlite".into(),
            state: "/run/boxlite".into(),
            listen: "/run/boxlite/cri.sock".into(),
            log_level: "info".into(),
            vmm: None,
            acceleration: None,
            paths: Paths {
                guest: programs.join("boxlite-guest"),
                shim: "/usr/local/bin/containerd-shim-boxlite-v2".into(),
                libkrunfw: "/usr/lib/x86_64-linux-gnu/libkrunfw.so.5".into(),
                qemu: "/usr/bin/qemu-system-x86_64".into(),
                virtiofsd: programs.join("virtiofsd"),
                vhost_device_vsock: programs.join("vhost-device-vsock"),
            },
            pod: PodDefaults {
                vcpus: 1,
                memory_mib: 256,
                overhead_mib: 64,
                scratch_mib: 10240,
                debug_console: false,
            },
            cni: CniConfig {
                conf_dir: "/etc/cni/net.d".into(),
                bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
                timeout: Duration::from_secs(60),
            },
            registry: RegistryConfig {
                config_path: "/etc/boxlite/certs.d".into(),
            },
            metrics: MetricsConfig {
                listen: Some(SocketAddr::from(([127, 0, 0, 1], 9640))),
            },
            streaming: StreamingConfig {
                address: IpAddr::from([127, 0, 0, 1]),
                port: 0,
                idle_timeout: Duration::from_secs(4 * 3600),
                creation_timeout: Duration::from_secs(30),
            },
            nri: NriConfig {
                enable: false,
                socket_path: "/var/run/nri/nri.sock".into(),
                plugin_path: "/opt/nri/plugins".into(),
                plugin_config_path: "/etc/nri/conf.d".into(),
                registration_timeout: Duration::from_secs(5),
                request_timeout: Duration::from_secs(2),
                disable_connections: false,
            },
            runtime_handlers: vec![String::new(), "boxlite".into()],
            timeouts: Timeouts {
                run_pod: Duration::from_secs(230),
                drain: Duration::from_secs(10),
                stats: Duration::from_secs(2),
            },
        }
    }
}

impl Config {
    /// Reads `path`. A missing file is an error: who names a file wants it read.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let size = std::fs::metadata(path).map_err(read)?.len();
        if size > FILE_LIMIT {
            return Err(read(std::io::Error::other(format!(
                "{size} bytes are more than the {FILE_LIMIT} that are read"
            ))));
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        Self::parse(&text, path)
    }

    /// Reads TOML; `path` is for messages only. Every mistake is in the one error.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let table: toml::Table = toml::from_str(text).map_err(|source| ConfigError::Syntax {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let mut mistakes = Vec::new();
        let config = Self::read(table, &mut mistakes);
        if mistakes.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError::Mistakes {
                path: path.to_owned(),
                mistakes,
            })
        }
    }

    fn read(table: toml::Table, mistakes: &mut Vec<Mistake>) -> Self {
        let default = Self::default();
        let mut top = Section::top(table);
        let config = Self {
            paths: Paths::read(top.section("paths"), default.paths, mistakes),
            pod: PodDefaults::read(top.section("pod"), default.pod, mistakes),
            cni: CniConfig::read(top.section("cni"), default.cni, mistakes),
            registry: RegistryConfig::read(top.section("registry"), default.registry, mistakes),
            nri: NriConfig::read(top.section("nri"), default.nri, mistakes),
            metrics: MetricsConfig::read(top.section("metrics"), default.metrics, mistakes),
            streaming: StreamingConfig::read(top.section("streaming"), default.streaming, mistakes),
            timeouts: Timeouts::read(top.section("timeouts"), default.timeouts, mistakes),
            root: top.take("root", default.root, reader::absolute),
            state: top.take("state", default.state, reader::absolute),
            listen: top.take("listen", default.listen, reader::socket),
            log_level: top.take("log_level", default.log_level, reader::log_filter),
            vmm: top.take("vmm", default.vmm, reader::vmm),
            acceleration: top.take("acceleration", default.acceleration, reader::acceleration),
            runtime_handlers: top.take(
                "runtime_handlers",
                default.runtime_handlers,
                reader::handlers,
            ),
        };
        top.finish(mistakes);
        if config.root == config.state {
            mistakes.push(Mistake {
                key: "state".into(),
                value: format!("{:?}", config.state),
                reason: "is the same directory as root".into(),
            });
        }
        config
    }
}

impl Paths {
    fn read(mut section: Section, default: Self, mistakes: &mut Vec<Mistake>) -> Self {
        let paths = Self {
            guest: section.take("guest", default.guest, reader::absolute),
            shim: section.take("shim", default.shim, reader::absolute),
            libkrunfw: section.take("libkrunfw", default.libkrunfw, reader::absolute),
            qemu: section.take("qemu", default.qemu, reader::absolute),
            virtiofsd: section.take("virtiofsd", default.virtiofsd, reader::absolute),
            vhost_device_vsock: section.take(
                "vhost_device_vsock",
                default.vhost_device_vsock,
                reader::absolute,
            ),
        };
        section.finish(mistakes);
        paths
    }
}

impl PodDefaults {
    fn read(mut section: Section, default: Self, mistakes: &mut Vec<Mistake>) -> Self {
        let pod = Self {
            vcpus: section.take("vcpus", default.vcpus, |v| reader::number(v, 1, 64)),
            memory_mib: section.take("memory_mib", default.memory_mib, |v| {
                reader::number(v, 64, 1 << 20)
            }),
            overhead_mib: section.take("overhead_mib", default.overhead_mib, |v| {
                reader::number(v, 0, 1 << 16)
            }),
            scratch_mib: section.take("scratch_mib", default.scratch_mib, |v| {
                reader::number(v, 16, 1 << 24)
            }),
            debug_console: section.take("debug_console", default.debug_console, reader::boolean),
        };
        section.finish(mistakes);
        pod
    }
}

impl CniConfig {
    fn read(mut section: Section, default: Self, mistakes: &mut Vec<Mistake>) -> Self {
        let cni = Self {
            conf_dir: section.take("conf_dir", default.conf_dir, reader::absolute),
            bin_dirs: section.take("bin_dirs", default.bin_dirs, reader::directories),
            timeout: section.take("timeout_seconds", default.timeout, reader::seconds),
        };
        section.finish(mistakes);
        cni
    }
}

impl RegistryConfig {
    fn read(mut section: Section, default: Self, mistakes: &mut Vec<Mistake>) -> Self {
        let registry = Self {
            config_path: section.take("config_path", default.config_path, reader::absolute),
        };
        section.finish(mistakes);
        registry
    }
}

impl MetricsConfig {
    fn read(mut section: Section, default: Self, mistakes: &mut Vec<Mistake>) -> Self {
        let metrics = Self {
            listen: section.take("listen", default.listen, reader::address_or_off),
        };
        section.finish(mistakes);
        metrics
    }
}

impl StreamingConfig {
    fn read(mut section: Section, default: Self, mistakes: &mut Vec<Mistake>) -> Self {
        let streaming = Self {
            address: section.take("address", default.address, reader::local_address),
            port: section.take("port", default.port, |v| reader::number(v, 0, 65_535)),
            idle_timeout: section.take(
                "idle_timeout_seconds",
                default.idle_timeout,
                reader::seconds,
            ),
            creation_timeout: section.take(
                "creation_timeout_seconds",
                default.creation_timeout,
                reader::seconds,
            ),
        };
        section.finish(mistakes);
        streaming
    }
}

impl NriConfig {
    fn read(mut section: Section, default: Self, mistakes: &mut Vec<Mistake>) -> Self {
        let nri = Self {
            enable: section.take("enable", default.enable, reader::boolean),
            socket_path: section.take("socket_path", default.socket_path, reader::socket),
            plugin_path: section.take("plugin_path", default.plugin_path, reader::absolute),
            plugin_config_path: section.take(
                "plugin_config_path",
                default.plugin_config_path,
                reader::absolute,
            ),
            registration_timeout: section.take(
                "plugin_registration_timeout_seconds",
                default.registration_timeout,
                reader::seconds,
            ),
            request_timeout: section.take(
                "plugin_request_timeout_seconds",
                default.request_timeout,
                reader::seconds,
            ),
            disable_connections: section.take(
                "disable_connections",
                default.disable_connections,
                reader::boolean,
            ),
        };
        section.finish(mistakes);
        nri
    }
}

impl Timeouts {
    fn read(mut section: Section, default: Self, mistakes: &mut Vec<Mistake>) -> Self {
        let timeouts = Self {
            run_pod: section.take("run_pod_seconds", default.run_pod, reader::seconds),
            drain: section.take("drain_seconds", default.drain, reader::seconds),
            stats: section.take("stats_seconds", default.stats, reader::seconds),
        };
        section.finish(mistakes);
        timeouts
    }
}
