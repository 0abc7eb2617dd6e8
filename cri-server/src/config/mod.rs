//! [`Config`]: everything an operator may set for boxlite-cri. Defaults, the TOML file, and the effective configuration.
//!
//! boxlite-config has the sections that the shim shares (`[paths]`, `[pod]`, the VMM) and the TOML reader; this module has the
//! daemon's own. `default.toml` is the commented form printed by `boxlite-cri config default`; a test keeps both equal.
//! Reads no file but the configuration.
//!
//! Flow: cli → `Config::load` → serve, check.

mod dump;
mod host_pods;
mod log_filter;
mod pool;
#[cfg(test)]
mod tests;

pub(crate) use boxlite_config::network::{NetworkSettings, WithoutCni};
pub(crate) use boxlite_config::paths::Paths;
pub(crate) use boxlite_config::pod::PodDefaults;
pub(crate) use boxlite_config::section::{ConfigError, Mistake};
pub(crate) use boxlite_config::value::socket_path;
pub(crate) use host_pods::HostPodsConfig;
pub(crate) use log_filter::check as check_log_filter;
pub(crate) use pool::PoolConfig;

use crate::layout;
use boxlite_config::paths::{DEFAULT_STATE_DIR, installed_shim, prefix};
use boxlite_config::section::{self, Section};
use boxlite_config::value;
use boxlite_config::vmm::VmmSettings;
use boxlite_runtime::filesystem_layout::FilesystemLayout;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The commented default file; `@PREFIX@` is the installation prefix, `@KERNEL@` the guest kernel, and `@PASST@` passt.
const DEFAULT_TOML: &str = include_str!("default.toml");

/// Returns the commented default file for an installation below `prefix`, with this guest kernel.
pub(crate) fn default_toml(prefix: &Path, kernel: &Path) -> String {
    DEFAULT_TOML
        .replace("@PREFIX@", &prefix.display().to_string())
        .replace("@KERNEL@", &kernel.display().to_string())
        .replace("@PASST@", &Paths::below(prefix).passt.display().to_string())
}

/// Everything an operator may set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Config {
    /// Persistent files (images, database, CNI results). Default /var/lib/boxlite, the FHS directory of state that
    /// survives a boot.
    pub root: PathBuf,
    /// Files that end with the boot (bundles, sockets, namespaces). Default /run/boxlite: a tmpfs.
    pub state: PathBuf,
    /// Scratch disks of the pods, `scratch_dir`; `None` is `<root>/scratch`, so that it follows `root`.
    pub scratch_dir: Option<PathBuf>,
    /// Unix socket of the CRI. Default /run/boxlite/cri.sock.
    pub listen: PathBuf,
    /// tracing filter, such as `info` or `boxlite_cri=debug,info`. Default info: one line per call that changes something.
    pub log_level: String,
    /// VMM and acceleration. Default auto.
    pub vmm: VmmSettings,
    /// Programs and files of a VM.
    pub paths: Paths,
    /// The shim, `paths.shim`. Default `<prefix>/bin/containerd-shim-boxlite-v2`.
    pub shim: PathBuf,
    /// Defaults of a pod's VM.
    pub pod: PodDefaults,
    /// Warm VMs.
    pub pool: PoolConfig,
    /// Network plugins.
    pub cni: CniConfig,
    /// Network of pods without plugins.
    pub network: NetworkSettings,
    /// Image registries.
    pub registry: RegistryConfig,
    /// Prometheus endpoint.
    pub metrics: MetricsConfig,
    /// Server of exec, attach and port-forward.
    pub streaming: StreamingConfig,
    /// NRI plugins.
    pub nri: NriConfig,
    /// Pods that the node's containerd runs.
    pub host_pods: HostPodsConfig,
    /// RuntimeClass handlers of pods in VMs. Default "" (no RuntimeClass) and "boxlite".
    pub runtime_handlers: Vec<String>,
    /// Timeouts.
    pub timeouts: Timeouts,
}

/// Network plugins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CniConfig {
    /// Directory of network configurations; the lexically first valid one is used. Default /etc/cni/net.d.
    pub conf_dir: PathBuf,
    /// Directories of plugins, in order. Default /opt/cni/bin (where most installers put them), /usr/lib/cni (Debian).
    pub bin_dirs: Vec<PathBuf>,
    /// Timeout of one plugin run. Default 60 s: an IPAM service may have to scale up, and the kubelet gives up after 240 s.
    pub timeout: Duration,
}

/// Image registries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RegistryConfig {
    /// Mirrors and certificates in containerd's layout `<dir>/<host>/hosts.toml`. Default /etc/boxlite/certs.d.
    pub config_path: PathBuf,
    /// Lowest rate of a layer download over a minute; 0 accepts any. Default 1024, slower than a modem.
    pub min_bytes_per_second: u64,
    /// Timeout of a pull. Default 4 h, the time of 64 GiB at 5 MB/s; the kubelet has none.
    pub pull_timeout: Duration,
    /// Size of the partial downloads that are kept for a retry. Default 512 MiB: one large layer.
    pub max_partial_bytes: u64,
}

/// Prometheus endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MetricsConfig {
    /// Listen address; `None` disables the page. Default 127.0.0.1:9640, which the network cannot reach.
    pub listen: Option<SocketAddr>,
}

/// Server of exec, attach and port-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StreamingConfig {
    /// Listen address, also the host in its URLs. Default 127.0.0.1: the kubelet is on this machine, and the streams
    /// are not encrypted.
    pub address: IpAddr,
    /// Listen port; 0 is any free one. Default 0: every session gets its own URL.
    pub port: u16,
    /// Idle time after which a connection is closed. Default 4 h, as in the kubelet.
    pub idle_timeout: Duration,
    /// Time for a client to open its streams. Default 30 s, as in other runtimes.
    pub creation_timeout: Duration,
}

/// NRI plugins. The names are containerd's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NriConfig {
    /// Enables NRI. Default false: any connected plugin may change every container, and on a node with containerd the
    /// socket belongs to containerd.
    pub enable: bool,
    /// Socket to which plugins connect. Default /var/run/nri/nri.sock, where published plugins look for it.
    pub socket_path: PathBuf,
    /// Directory of pre-installed plugins. Default /opt/nri/plugins.
    pub plugin_path: PathBuf,
    /// Directory of their configuration. Default /etc/nri/conf.d.
    pub plugin_config_path: PathBuf,
    /// Time for a plugin to register and to synchronize existing pods. Default 5 s.
    pub registration_timeout: Duration,
    /// Time for a plugin to answer an event. Default 2 s.
    pub request_timeout: Duration,
    /// Allows pre-installed plugins only. Default false.
    pub disable_connections: bool,
}

/// Timeouts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Timeouts {
    /// RunPodSandbox as a whole. Default 230 s, just under the kubelet's 240 s, so that its retry finds a result.
    pub run_pod: Duration,
    /// Time to drain calls after SIGTERM. Default 10 s: systemd kills after 90.
    pub drain: Duration,
    /// Time for a guest to answer a stats call. Default 2 s: the kubelet collects every 10 s.
    pub stats: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/boxlite".into(),
            state: DEFAULT_STATE_DIR.into(),
            scratch_dir: None,
            listen: layout::default_socket(),
            log_level: "info".into(),
            vmm: VmmSettings::default(),
            paths: Paths::default(),
            shim: installed_shim(&prefix()),
            pod: PodDefaults::default(),
            pool: PoolConfig::default(),
            cni: CniConfig {
                conf_dir: "/etc/cni/net.d".into(),
                bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
                timeout: Duration::from_secs(60),
            },
            network: NetworkSettings::default(),
            registry: RegistryConfig {
                config_path: "/etc/boxlite/certs.d".into(),
                min_bytes_per_second: 1024,
                pull_timeout: Duration::from_secs(4 * 3600),
                max_partial_bytes: 512 << 20,
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
            host_pods: HostPodsConfig::default(),
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
    /// Returns the directory of the scratch disks.
    pub(crate) fn scratch_dir(&self) -> PathBuf {
        let default = || FilesystemLayout::default_scratch_dir(&self.root);
        self.scratch_dir.clone().unwrap_or_else(default)
    }

    /// Reads `path`. A missing file is an error.
    pub(crate) fn load(path: &Path) -> Result<Self, ConfigError> {
        section::load(path, Self::read)
    }

    /// Parses TOML; `path` appears in messages only. The error has every mistake.
    #[cfg(test)]
    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        section::parse(text, path, Self::read)
    }

    fn read(mut top: Section, mistakes: &mut Vec<Mistake>) -> Self {
        let default = Self::default();
        let mut files = top.section("paths");
        let paths = Paths::read(&mut files);
        let shim = files.take("shim", default.shim, value::absolute);
        files.finish(mistakes);
        let config = Self {
            paths,
            shim,
            pod: PodDefaults::read(top.section("pod"), mistakes),
            pool: PoolConfig::read(top.section("pool"), mistakes),
            host_pods: HostPodsConfig::read(top.section("host_pods"), mistakes),
            cni: CniConfig::read(top.section("cni"), default.cni, mistakes),
            network: NetworkSettings::read(top.section("network"), mistakes),
            registry: RegistryConfig::read(top.section("registry"), default.registry, mistakes),
            nri: NriConfig::read(top.section("nri"), default.nri, mistakes),
            metrics: MetricsConfig::read(top.section("metrics"), default.metrics, mistakes),
            streaming: StreamingConfig::read(top.section("streaming"), default.streaming, mistakes),
            timeouts: Timeouts::read(top.section("timeouts"), default.timeouts, mistakes),
            root: top.take("root", default.root, value::absolute),
            state: top.take("state", default.state, value::absolute),
            scratch_dir: top.take("scratch_dir", default.scratch_dir, |v| {
                value::absolute(v).map(Some)
            }),
            listen: top.take("listen", default.listen, value::socket),
            log_level: top.take("log_level", default.log_level, log_filter::read),
            vmm: VmmSettings::read(&mut top),
            runtime_handlers: top.take(
                "runtime_handlers",
                default.runtime_handlers,
                value::handlers,
            ),
        };
        top.finish(mistakes);
        let host_pods = &config.host_pods;
        mistakes.extend(host_pods.conflicts(&config.runtime_handlers, &config.listen));
        if config.root == config.state {
            mistakes.push(Mistake {
                key: "state".into(),
                value: format!("{:?}", config.state),
                reason: "must differ from root".into(),
            });
        }
        config
    }
}

impl CniConfig {
    fn read(mut section: Section, default: Self, mistakes: &mut Vec<Mistake>) -> Self {
        let cni = Self {
            conf_dir: section.take("conf_dir", default.conf_dir, value::absolute),
            bin_dirs: section.take("bin_dirs", default.bin_dirs, value::directories),
            timeout: section.take("timeout_seconds", default.timeout, value::seconds),
        };
        section.finish(mistakes);
        cni
    }
}

impl RegistryConfig {
    fn read(mut section: Section, default: Self, mistakes: &mut Vec<Mistake>) -> Self {
        let registry = Self {
            config_path: section.take("config_path", default.config_path, value::absolute),
            min_bytes_per_second: section.take(
                "min_bytes_per_second",
                default.min_bytes_per_second,
                |v| value::number(v, 0, i64::MAX),
            ),
            pull_timeout: section.take(
                "pull_timeout_seconds",
                default.pull_timeout,
                value::seconds,
            ),
            max_partial_bytes: section.take("max_partial_bytes", default.max_partial_bytes, |v| {
                value::number(v, 0, i64::MAX)
            }),
        };
        section.finish(mistakes);
        registry
    }
}

impl MetricsConfig {
    fn read(mut section: Section, default: Self, mistakes: &mut Vec<Mistake>) -> Self {
        let metrics = Self {
            listen: section.take("listen", default.listen, value::address_or_off),
        };
        section.finish(mistakes);
        metrics
    }
}

impl StreamingConfig {
    fn read(mut section: Section, default: Self, mistakes: &mut Vec<Mistake>) -> Self {
        let streaming = Self {
            address: section.take("address", default.address, value::local_address),
            port: section.take("port", default.port, |v| value::number(v, 0, 65_535)),
            idle_timeout: section.take(
                "idle_timeout_seconds",
                default.idle_timeout,
                value::seconds,
            ),
            creation_timeout: section.take(
                "creation_timeout_seconds",
                default.creation_timeout,
                value::seconds,
            ),
        };
        section.finish(mistakes);
        streaming
    }
}

impl NriConfig {
    fn read(mut section: Section, default: Self, mistakes: &mut Vec<Mistake>) -> Self {
        let nri = Self {
            enable: section.take("enable", default.enable, value::boolean),
            socket_path: section.take("socket_path", default.socket_path, value::socket),
            plugin_path: section.take("plugin_path", default.plugin_path, value::absolute),
            plugin_config_path: section.take(
                "plugin_config_path",
                default.plugin_config_path,
                value::absolute,
            ),
            registration_timeout: section.take(
                "plugin_registration_timeout_seconds",
                default.registration_timeout,
                value::seconds,
            ),
            request_timeout: section.take(
                "plugin_request_timeout_seconds",
                default.request_timeout,
                value::seconds,
            ),
            disable_connections: section.take(
                "disable_connections",
                default.disable_connections,
                value::boolean,
            ),
        };
        section.finish(mistakes);
        nri
    }
}

impl Timeouts {
    fn read(mut section: Section, default: Self, mistakes: &mut Vec<Mistake>) -> Self {
        let timeouts = Self {
            run_pod: section.take("run_pod_seconds", default.run_pod, value::seconds),
            drain: section.take("drain_seconds", default.drain, value::seconds),
            stats: section.take("stats_seconds", default.stats, value::seconds),
        };
        section.finish(mistakes);
        timeouts
    }
}
