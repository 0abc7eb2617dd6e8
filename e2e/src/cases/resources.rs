//! Memory limits of pods whose host cgroup is exactly as large as the containers' limits, as a kubelet without RuntimeClass
//! overhead makes it. The guest's limit must act first: a container is OOM-killed, its neighbor and the VM survive.

use crate::failure::Result;
use crate::pod::{Pod, container_spec, pod_spec};
use crate::runner::{Case, Context};
use crate::{case, ensure, same};
use k8s_cri::v1::*;
use std::path::{Path, PathBuf};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(limit_of_32_mib_acts_in_the_guest, 90),
        case!(limit_of_64_mib_acts_in_the_guest, 90),
        case!(limit_of_256_mib_acts_in_the_guest, 120),
        case!(limit_of_1_gib_acts_in_the_guest, 180),
        case!(pod_without_limit_has_2_gib, 90),
    ]
}

/// Limit of the container that must survive.
const NEIGHBOR_MIB: i64 = 8;

/// Most data written to the scratch disk.
const MAX_WRITTEN_MIB: i64 = 128;

/// Cgroup of a QoS class with one pod, removed at the end.
struct HostCgroup {
    /// Directory of the class in the hierarchy that accounts memory.
    class: PathBuf,
    /// Name of the pod's cgroup, as a kubelet passes it.
    name: String,
}

impl HostCgroup {
    fn create(name: &str, limit_mib: i64) -> Result<Self> {
        let v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let (mount, file) = match v2 {
            true => ("/sys/fs/cgroup", "memory.max"),
            false => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        };
        let class = format!("boxlite-e2e-{}-{name}", std::process::id());
        let cgroup = Self {
            class: Path::new(mount).join(&class),
            name: format!("/{class}/podx"),
        };
        let pod = cgroup.class.join("podx");
        std::fs::create_dir_all(&pod)?;
        if v2 {
            for parent in [Path::new(mount), &cgroup.class] {
                std::fs::write(parent.join("cgroup.subtree_control"), "+memory")?;
            }
        }
        std::fs::write(pod.join(file), (limit_mib << 20).to_string())?;
        Ok(cgroup)
    }

    /// Returns the names of the cgroups beside the pod's.
    fn beside(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.class)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_dir() && name != "podx" {
                names.push(name);
            }
        }
        Ok(names)
    }
}

impl Drop for HostCgroup {
    fn drop(&mut self) {
        // The shim may have created the class in the other hierarchies of v1; it removes those itself.
        let _ = std::fs::remove_dir(self.class.join("podx"));
        let _ = std::fs::remove_dir(&self.class);
    }
}

fn limit(mib: i64) -> Option<LinuxContainerResources> {
    Some(LinuxContainerResources {
        memory_limit_in_bytes: mib << 20,
        ..Default::default()
    })
}

async fn limit_of_32_mib_acts_in_the_guest(ctx: Context) -> Result {
    limit_acts_in_the_guest(ctx, 32).await
}

async fn limit_of_64_mib_acts_in_the_guest(ctx: Context) -> Result {
    limit_acts_in_the_guest(ctx, 64).await
}

async fn limit_of_256_mib_acts_in_the_guest(ctx: Context) -> Result {
    limit_acts_in_the_guest(ctx, 256).await
}

async fn limit_of_1_gib_acts_in_the_guest(ctx: Context) -> Result {
    limit_acts_in_the_guest(ctx, 1024).await
}

async fn limit_acts_in_the_guest(ctx: Context, mib: i64) -> Result {
    let name = format!("limit{mib}");
    let host = HostCgroup::create(&name, mib)?;
    let mut config = pod_spec(&ctx.node, &name);
    let linux = config.linux.get_or_insert_default();
    linux.cgroup_parent.clone_from(&host.name);
    linux.resources = limit(mib);
    linux.security_context = Some(LinuxSandboxSecurityContext {
        privileged: true,
        ..Default::default()
    });
    let pod = Pod::run_with(&ctx.node, config).await?;
    let beside = host.beside()?;
    ensure!(
        beside.len() == 1 && beside[0].starts_with("boxlite-"),
        "cgroups beside the pod's: {beside:?}"
    );
    // As with a kubelet, the containers' limits add up to the pod's.
    let mut calm = container_spec("calm", &ctx.images.base, &["sleep", "1000"]);
    calm.linux.get_or_insert_default().resources = limit(NEIGHBOR_MIB);
    let neighbor = pod.start_with(calm).await?;
    let mib = mib - NEIGHBOR_MIB;

    // Page cache is reclaimed: twice a small limit is written without a kill. Not more: the suite's scratch disks are on tmpfs,
    // whose pages, unlike those of a disk, count to the VM's cgroup until the file is removed.
    let script = format!(
        "dd if=/dev/zero of=/file bs=1M count={} && rm /file",
        (2 * mib).min(MAX_WRITTEN_MIB)
    );
    let mut writer = container_spec("writer", &ctx.images.base, &["sh", "-c", &script]);
    writer.linux.get_or_insert_default().resources = limit(mib);
    let status = pod.start_with(writer).await?;
    let status = status.exited(ctx.patience(90)).await?;
    same!(
        (status.exit_code, status.reason.as_str()),
        (0, "Completed"),
        "writer"
    );

    // Anonymous memory and tmpfs are not.
    let tmpfs = format!(
        "mkdir /m && mount -t tmpfs -o size={}m t /m && cat /dev/zero > /m/file",
        2 * mib
    );
    for (name, script) in [("anonymous", "tail /dev/zero"), ("tmpfs", tmpfs.as_str())] {
        let mut greedy = container_spec(name, &ctx.images.base, &["sh", "-c", script]);
        let linux = greedy.linux.get_or_insert_default();
        linux.resources = limit(mib);
        linux.security_context = Some(LinuxContainerSecurityContext {
            privileged: name == "tmpfs",
            ..Default::default()
        });
        let status = pod.start_with(greedy).await?;
        let status = status.exited(ctx.patience(120)).await?;
        same!(status.reason.as_str(), "OOMKilled", "{name}");
        same!(status.exit_code, 137, "{name}");
    }
    same!(
        neighbor.status().await?.state(),
        ContainerState::ContainerRunning,
        "the neighbor"
    );
    same!(neighbor.out(&["echo", "alive"]).await?, "alive\n", "the VM");
    pod.end().await?;
    same!(host.beside()?, Vec::<String>::new(), "cgroups left beside");
    Ok(())
}

async fn pod_without_limit_has_2_gib(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "unlimited").await?;
    let script =
        "dd if=/dev/zero of=/dev/null bs=1500M count=1 2>&1 | tail -n 1 | cut -d \" \" -f 1";
    let text = pod.sh(&ctx.images.base, script).await?;
    same!(text.trim(), "1+0", "blocks of 1500 MiB held in memory");
    pod.end().await
}
