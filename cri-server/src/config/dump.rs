//! The effective configuration as TOML, for `boxlite-cri config dump`. Loading the dump gives the same configuration.

use super::Config;
use std::path::Path;
use std::time::Duration;
use toml::{Table, Value};

impl Config {
    /// Returns every key with its effective value.
    pub(crate) fn to_toml(&self) -> String {
        let acceleration = self
            .vmm
            .acceleration
            .map(|how| format!("{how:?}").to_lowercase());
        let listen = self.metrics.listen.map(|address| address.to_string());
        let top = table([
            ("root", path(&self.root)),
            ("state", path(&self.state)),
            ("scratch_dir", path(&self.scratch_dir())),
            ("listen", format!("unix://{}", self.listen.display()).into()),
            ("log_level", self.log_level.clone().into()),
            (
                "vmm",
                or(self.vmm.kind.as_ref().map(ToString::to_string), "auto"),
            ),
            ("acceleration", or(acceleration, "auto")),
            ("runtime_handlers", self.runtime_handlers.clone().into()),
            ("paths", self.paths_table()),
            ("pod", self.pod_table()),
            ("pool", self.pool_table()),
            ("host_pods", self.host_pods_table()),
            (
                "cni",
                table([
                    ("conf_dir", path(&self.cni.conf_dir)),
                    (
                        "bin_dirs",
                        Value::Array(self.cni.bin_dirs.iter().map(|dir| path(dir)).collect()),
                    ),
                    ("timeout_seconds", seconds(self.cni.timeout)),
                ]),
            ),
            (
                "network",
                table([("without_cni", self.network.without_cni.name().into())]),
            ),
            ("registry", self.registry_table()),
            ("nri", self.nri_table()),
            ("metrics", table([("listen", or(listen, "off"))])),
            (
                "streaming",
                table([
                    ("address", self.streaming.address.to_string().into()),
                    ("port", i64::from(self.streaming.port).into()),
                    ("idle_timeout_seconds", seconds(self.streaming.idle_timeout)),
                    (
                        "creation_timeout_seconds",
                        seconds(self.streaming.creation_timeout),
                    ),
                ]),
            ),
            (
                "timeouts",
                table([
                    ("run_pod_seconds", seconds(self.timeouts.run_pod)),
                    ("drain_seconds", seconds(self.timeouts.drain)),
                    ("stats_seconds", seconds(self.timeouts.stats)),
                ]),
            ),
        ]);
        top.as_table().map(Table::to_string).unwrap_or_default()
    }

    fn paths_table(&self) -> Value {
        let paths = &self.paths;
        table([
            ("guest", path(&paths.guest)),
            ("shim", path(&self.shim)),
            ("libkrunfw", path(&paths.libkrunfw)),
            ("qemu", path(&paths.qemu)),
            ("virtiofsd", path(&paths.virtiofsd)),
            ("vhost_device_vsock", path(&paths.vhost_device_vsock)),
            ("passt", path(&paths.passt)),
        ])
    }

    fn pod_table(&self) -> Value {
        let pod = &self.pod;
        table([
            (
                "vcpus",
                pod.vcpus
                    .map_or("auto".into(), |vcpus| i64::from(vcpus).into()),
            ),
            ("memory_mib", i64::from(pod.memory_mib).into()),
            ("overhead_mib", i64::from(pod.overhead_mib).into()),
            ("scratch_mib", i64::from(pod.scratch_mib).into()),
            ("debug_console", pod.debug_console.into()),
            (
                "shared_volume_writers",
                pod.shared_volume_writers.name().into(),
            ),
            (
                "vmm_ids",
                pod.vmm_ids.map_or("none".into(), |ids| {
                    format!("{}:{}", ids.first, ids.count).into()
                }),
            ),
        ])
    }

    fn pool_table(&self) -> Value {
        let pool = &self.pool;
        let shapes = pool.shapes.iter().map(|shape| shape.to_string().into());
        table([
            ("size", number(pool.size as u64)),
            ("memory_mib", number(pool.memory_mib)),
            ("min_available_mib", number(pool.min_available_mib)),
            ("idle_seconds", seconds(pool.idle)),
            ("shapes", Value::Array(shapes.collect())),
        ])
    }

    fn host_pods_table(&self) -> Value {
        let host_pods = &self.host_pods;
        let endpoint = host_pods.endpoint.as_ref();
        let endpoint = endpoint.map(|socket| format!("unix://{}", socket.display()));
        table([
            ("endpoint", or(endpoint, "off")),
            ("handlers", host_pods.handlers.clone().into()),
            ("namespaces", host_pods.namespaces.clone().into()),
        ])
    }

    fn registry_table(&self) -> Value {
        let registry = &self.registry;
        table([
            ("config_path", path(&registry.config_path)),
            (
                "min_bytes_per_second",
                number(registry.min_bytes_per_second),
            ),
            ("pull_timeout_seconds", seconds(registry.pull_timeout)),
            ("max_partial_bytes", number(registry.max_partial_bytes)),
        ])
    }

    fn nri_table(&self) -> Value {
        let nri = &self.nri;
        table([
            ("enable", nri.enable.into()),
            ("socket_path", path(&nri.socket_path)),
            ("plugin_path", path(&nri.plugin_path)),
            ("plugin_config_path", path(&nri.plugin_config_path)),
            (
                "plugin_registration_timeout_seconds",
                seconds(nri.registration_timeout),
            ),
            (
                "plugin_request_timeout_seconds",
                seconds(nri.request_timeout),
            ),
            ("disable_connections", nri.disable_connections.into()),
        ])
    }
}

fn table<const N: usize>(entries: [(&str, Value); N]) -> Value {
    let entries = entries.map(|(key, value)| (key.to_owned(), value));
    Value::Table(entries.into_iter().collect())
}

fn path(path: &Path) -> Value {
    path.display().to_string().into()
}

fn or(value: Option<String>, default: &str) -> Value {
    value.unwrap_or_else(|| default.to_owned()).into()
}

fn seconds(duration: Duration) -> Value {
    number(duration.as_secs())
}

fn number(value: u64) -> Value {
    i64::try_from(value).unwrap_or(i64::MAX).into()
}
