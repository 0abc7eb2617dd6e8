//! Requests with the fields that a stock kubelet sets, including those that other clients leave empty.

use super::volumes::{create_with_sub_path, mount, volume_dir};
use crate::failure::Result;
use crate::pod::{Container, Pod, container_spec, pod_spec};
use crate::runner::{Case, Context};
use crate::{case, ensure, same};
use k8s_cri::v1::*;
use std::collections::HashMap;
use std::path::Path;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(pod_with_every_kubelet_field_runs, 90),
        case!(restarted_container_has_a_log_per_attempt, 60),
        case!(sub_path_of_an_ordinary_volume_is_ignored, 60),
    ]
}

/// Paths that a kubelet masks by default.
const MASKED_PATHS: [&str; 9] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/scsi",
    "/sys/firmware",
];
/// Paths that a kubelet makes read-only by default.
const READ_ONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let owned = pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned()));
    owned.collect()
}

/// Returns SELinux options as a kubelet passes them on from the pod, also on nodes without SELinux.
fn selinux() -> Option<SeLinuxOption> {
    Some(SeLinuxOption {
        level: "s0:c123,c456".into(),
        ..Default::default()
    })
}

fn runtime_default() -> Option<SecurityProfile> {
    Some(SecurityProfile {
        profile_type: security_profile::ProfileType::RuntimeDefault.into(),
        localhost_ref: String::new(),
    })
}

fn namespaces() -> Option<NamespaceOption> {
    Some(NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..Default::default()
    })
}

/// Returns the sandbox configuration of a burstable pod with fsGroup, seccomp and SELinux options.
fn sandbox(ctx: &Context, name: &str) -> PodSandboxConfig {
    let mut config = pod_spec(&ctx.node, name);
    let metadata = config.metadata.clone().unwrap_or_default();
    config.labels = map(&[
        ("app", "web"),
        ("io.kubernetes.pod.name", &metadata.name),
        ("io.kubernetes.pod.namespace", &metadata.namespace),
        ("io.kubernetes.pod.uid", &metadata.uid),
    ]);
    config.annotations = map(&[
        (
            "kubernetes.io/config.seen",
            "2026-01-02T03:04:05.678901234Z",
        ),
        ("kubernetes.io/config.source", "api"),
    ]);
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.96.0.10".into()],
        searches: [
            "default.svc.cluster.local",
            "svc.cluster.local",
            "cluster.local",
        ]
        .map(str::to_owned)
        .into(),
        options: vec!["ndots:5".into()],
    });
    let linux = config.linux.get_or_insert_default();
    linux.security_context = Some(LinuxSandboxSecurityContext {
        namespace_options: namespaces(),
        selinux_options: selinux(),
        supplemental_groups: vec![2000],
        seccomp: runtime_default(),
        ..Default::default()
    });
    linux.overhead = Some(LinuxContainerResources::default());
    linux.resources = Some(LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 102,
        memory_limit_in_bytes: 128 << 20,
        ..Default::default()
    });
    config
}

/// Runs the pod and creates the container's log directory, as a kubelet does.
async fn run_pod(ctx: &Context, name: &str) -> Result<Pod> {
    let pod = Pod::run_with(&ctx.node, sandbox(ctx, name)).await?;
    std::fs::create_dir_all(Path::new(&pod.config.log_directory).join("app"))?;
    Ok(pod)
}

/// Returns the configuration of the pod's container, with the mounts that every kubelet adds below `dir`.
fn container(ctx: &Context, dir: &Path, attempt: u32, script: &str) -> Result<ContainerConfig> {
    std::fs::write(
        dir.join("etc-hosts"),
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n",
    )?;
    std::fs::write(dir.join(format!("termination-{attempt}")), "")?;
    let token = dir.join("token");
    std::fs::create_dir_all(&token)?;
    std::fs::write(token.join("namespace"), "default")?;
    let mut config = container_spec("app", &ctx.images.base, &["sh", "-c", script]);
    config.metadata = Some(ContainerMetadata {
        name: "app".into(),
        attempt,
    });
    config.log_path = format!("app/{attempt}.log");
    config.envs = [
        ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
        ("KUBERNETES_SERVICE_PORT", "443"),
        ("KUBERNETES_PORT_443_TCP_ADDR", "10.96.0.1"),
    ]
    .map(|(key, value)| KeyValue {
        key: key.into(),
        value: value.into(),
    })
    .into();
    config.labels = map(&[
        ("io.kubernetes.container.name", "app"),
        ("io.kubernetes.pod.namespace", "e2e"),
    ]);
    config.annotations = map(&[
        ("io.kubernetes.container.hash", "bc2ad3b5"),
        ("io.kubernetes.container.restartCount", &attempt.to_string()),
        (
            "io.kubernetes.container.terminationMessagePath",
            "/dev/termination-log",
        ),
        ("io.kubernetes.container.terminationMessagePolicy", "File"),
        ("io.kubernetes.pod.terminationGracePeriod", "30"),
    ]);
    let mut account = mount(&token, "/var/run/secrets/kubernetes.io/serviceaccount");
    account.readonly = true;
    account.selinux_relabel = true;
    let mut hosts = mount(&dir.join("etc-hosts"), "/etc/hosts");
    hosts.selinux_relabel = true;
    let termination = dir.join(format!("termination-{attempt}"));
    let mut termination = mount(&termination, "/dev/termination-log");
    termination.selinux_relabel = true;
    config.mounts = vec![account, hosts, termination];
    config.linux = Some(LinuxContainerConfig {
        resources: Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 102,
            memory_limit_in_bytes: 128 << 20,
            oom_score_adj: 990,
            hugepage_limits: vec![HugepageLimit {
                page_size: "2MB".into(),
                limit: 0,
            }],
            unified: map(&[("memory.oom.group", "1")]),
            ..Default::default()
        }),
        security_context: Some(LinuxContainerSecurityContext {
            namespace_options: namespaces(),
            selinux_options: selinux(),
            run_as_user: Some(Int64Value { value: 1000 }),
            run_as_group: Some(Int64Value { value: 1000 }),
            supplemental_groups: vec![2000],
            no_new_privs: true,
            capabilities: Some(Capability {
                drop_capabilities: vec!["ALL".into()],
                ..Default::default()
            }),
            seccomp: runtime_default(),
            masked_paths: MASKED_PATHS.map(str::to_owned).into(),
            readonly_paths: READ_ONLY_PATHS.map(str::to_owned).into(),
            ..Default::default()
        }),
    });
    Ok(config)
}

async fn pod_with_every_kubelet_field_runs(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "kubelet")?;
    let pod = run_pod(&ctx, "kubelet").await?;
    let script = "id -u; id -g; id -G; cat /var/run/secrets/kubernetes.io/serviceaccount/namespace; echo; \
        echo $KUBERNETES_SERVICE_HOST; head -n 1 /etc/hosts; grep ndots /etc/resolv.conf; \
        grep -h Seccomp: /proc/self/status; trap 'exit 7' TERM; while :; do sleep 0.1; done";
    let c = pod.start_with(container(&ctx, &dir, 0, script)?).await?;
    c.printed("Seccomp:\t2", ctx.patience(20)).await?;
    // Groups 50000 and 50001 come from the image, as the default policy Merge requires.
    same!(
        c.output()?,
        "1000\n1000\n1000 2000 50000 50001\ndefault\n10.96.0.1\n# Kubernetes-managed hosts file.\noptions ndots:5\nSeccomp:\t2\n",
        "view of the container"
    );
    same!(
        c.out(&["cat", "/sys/fs/cgroup/memory.max"]).await?,
        "134217728\n",
        "memory limit"
    );
    let status = c.status().await?;
    same!(
        status.annotations.get("io.kubernetes.container.hash"),
        Some(&"bc2ad3b5".to_owned()),
        "annotation in the status"
    );
    ensure!(
        status.log_path.ends_with("/app/0.log"),
        "log path {}",
        status.log_path
    );
    c.stop(30).await?;
    same!(
        c.status().await?.exit_code,
        7,
        "exit code of the TERM handler"
    );
    pod.end().await
}

async fn restarted_container_has_a_log_per_attempt(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "kubelet-restart")?;
    let pod = run_pod(&ctx, "kubelet-restart").await?;
    let mut previous: Option<Container> = None;
    for attempt in 0..3 {
        let termination = dir.join(format!("termination-{attempt}"));
        let script = format!("echo attempt {attempt}; exit {}", attempt + 1);
        let c = pod
            .start_with(container(&ctx, &dir, attempt, &script)?)
            .await?;
        let status = c.exited(ctx.patience(20)).await?;
        same!(
            status.exit_code,
            i32::try_from(attempt)? + 1,
            "exit code of attempt {attempt}"
        );
        same!(c.output()?, format!("attempt {attempt}\n"), "log");
        ensure!(
            termination.exists(),
            "the termination message file was removed"
        );
        // The kubelet keeps the last dead container of each name.
        if let Some(dead) = previous.replace(c) {
            dead.remove().await?;
        }
    }
    pod.end().await
}

async fn sub_path_of_an_ordinary_volume_is_ignored(ctx: Context) -> Result {
    let dir = volume_dir(&ctx, "kubelet-subpath")?;
    std::fs::write(dir.join("file"), "content\n")?;
    let pod = ctx.shared_pod().await;
    let config = container_spec("c", &ctx.images.base, &["sleep", "1000"]);
    let volume = mount(&dir, "/volume");
    let c = create_with_sub_path(&pod, config, &volume, "part/of/an/image").await?;
    c.start().await?;
    same!(
        c.out(&["cat", "/volume/file"]).await?,
        "content\n",
        "volume"
    );
    pod.end().await
}
