//! Security context in a real VM: seccomp, groups, node namespaces, user namespaces, devices, refusals.

use super::security_context;
use crate::case;
use crate::ext4::Ext4;
use crate::failure::{Failure, Result};
use crate::image::build::Image;
use crate::pod::{Container, Pod, container_spec, pod_spec, pull};
use crate::runner::{Case, Context};
use crate::{bail, ensure, poll, same};
use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::*;
use serde_json::json;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(seccomp_profiles_apply, 90),
        case!(unsupported_settings_are_refused_by_name, 60),
        case!(groups_policy_is_reported_in_status, 60),
        case!(privileged_container_has_the_vm_devices, 60),
        case!(node_pid_and_ipc_namespaces_are_the_vms, 60),
        case!(user_namespace_maps_ids, 90),
        case!(volume_in_user_namespace_is_id_mapped, 60),
    ]
}

fn profile(kind: ProfileType, path: &str) -> Option<SecurityProfile> {
    Some(SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: path.into(),
    })
}

/// Starts a container that sleeps.
async fn sleeper(
    ctx: &Context,
    pod: &Pod,
    name: &str,
    change: impl FnOnce(&mut LinuxContainerSecurityContext),
) -> Result<Container> {
    let mut config = container_spec(name, &ctx.images.base, &["sleep", "1000"]);
    change(security_context(&mut config));
    pod.start_with(config).await
}

/// Returns the error of a container that must not be created.
async fn refusal(
    ctx: &Context,
    pod: &Pod,
    name: &str,
    change: impl FnOnce(&mut ContainerConfig),
) -> Result<String> {
    let mut config = container_spec(name, &ctx.images.base, &["sleep", "1000"]);
    change(&mut config);
    match pod.create_with(config).await {
        Ok(_) => Err(Failure(format!("container {name} was created"))),
        Err(error) => Ok(error.0),
    }
}

/// Returns the value of a field of /proc/<pid>/status for init and for an exec'd process.
async fn seccomp_modes(container: &Container) -> Result<String> {
    let script = "grep -h ^Seccomp: /proc/1/status /proc/self/status | tr -dc '0-9'";
    container.out(&["sh", "-c", script]).await
}

async fn seccomp_profiles_apply(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let file = ctx.node.dir.join("no-chmod.json");
    let rules = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
        {"names":["chmod","fchmodat","fchmodat2"],"action":"SCMP_ACT_ERRNO","errnoRet":75},
        {"names":["socket"],"action":"SCMP_ACT_KILL_PROCESS","args":[{"index":0,"value":16,"op":"SCMP_CMP_EQ"}]}]}"#;
    std::fs::write(&file, rules)?;
    let path = file.display().to_string();

    let free = sleeper(&ctx, &pod, "free", |_| {}).await?;
    same!(seccomp_modes(&free).await?, "00", "no profile");
    let namespace = ["unshare", "-U", "true"];
    same!(
        free.exec(&namespace).await?.exit_code,
        0,
        "unshare without a profile"
    );

    // A user other than root, without and with no_new_privs: the two ways in which a filter is installed.
    for (name, no_new_privs) in [("default", false), ("nnp", true)] {
        let c = sleeper(&ctx, &pod, name, |s| {
            s.seccomp = profile(ProfileType::RuntimeDefault, "");
            s.run_as_user = Some(Int64Value { value: 1000 });
            s.no_new_privs = no_new_privs;
        })
        .await?;
        same!(seccomp_modes(&c).await?, "22", "{name}: RuntimeDefault");
        let capabilities = c
            .out(&[
                "grep",
                "-hE",
                "Cap(Prm|Eff)",
                "/proc/1/status",
                "/proc/self/status",
            ])
            .await?;
        ensure!(
            capabilities.lines().count() == 4
                && capabilities
                    .lines()
                    .all(|l| l.ends_with("0000000000000000")),
            "{name}: capabilities remain:\n{capabilities}"
        );
        ensure!(
            c.exec(&namespace).await?.exit_code != 0,
            "{name}: unshare under RuntimeDefault"
        );
        same!(
            c.out(&["sh", "-c", "ls / > /dev/null && id -u"]).await?,
            "1000\n",
            "{name}"
        );
    }

    let c = sleeper(&ctx, &pod, "localhost", |s| {
        s.seccomp = profile(ProfileType::Localhost, &path);
    })
    .await?;
    let denied = c.exec(&["chmod", "400", "/tmp"]).await?;
    ensure!(
        denied.exit_code != 0
            && String::from_utf8_lossy(&denied.stderr).contains("Value too large"),
        "the profile's own error: {denied:?}"
    );
    // A netlink socket, matched by a condition on an argument; SIGSYS is signal 31.
    let killed = c.exec(&["ip", "link"]).await?;
    same!(
        killed.exit_code,
        128 + 31,
        "kill by a condition: {killed:?}"
    );
    same!(
        c.exec(&["ifconfig", "lo"]).await?.exit_code,
        0,
        "another family"
    );

    let c = sleeper(&ctx, &pod, "privileged", |s| {
        s.seccomp = profile(ProfileType::Localhost, &path);
        s.privileged = true;
    })
    .await?;
    same!(seccomp_modes(&c).await?, "00", "a privileged container");
    pod.end().await
}

async fn unsupported_settings_are_refused_by_name(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let missing = "/no/such/profile.json";
    let text = refusal(&ctx, &pod, "seccomp", |c| {
        security_context(c).seccomp = profile(ProfileType::Localhost, missing);
    })
    .await?;
    ensure!(
        text.contains("localhost_ref") && text.contains(missing),
        "{text}"
    );
    let text = refusal(&ctx, &pod, "apparmor", |c| {
        security_context(c).apparmor = profile(ProfileType::Localhost, "k8s-nginx");
    })
    .await?;
    ensure!(
        text.contains("apparmor") && text.contains("k8s-nginx"),
        "{text}"
    );
    let device = |host: &str| Device {
        host_path: host.into(),
        container_path: "/dev/of-mine".into(),
        permissions: "rw".into(),
    };
    let text = refusal(&ctx, &pod, "device", |c| {
        c.devices = vec![device("/dev/nvidia0")];
    })
    .await?;
    ensure!(
        text.contains("config.devices") && text.contains("/dev/nvidia0"),
        "{text}"
    );
    // Devices that the VM has can be requested.
    let mut config = container_spec("tun", &ctx.images.base, &["sleep", "1000"]);
    config.devices = vec![device("/dev/net/tun")];
    let c = pod.start_with(config).await?;
    same!(
        c.out(&["stat", "-c", "%t:%T", "/dev/of-mine"]).await?,
        "a:c8\n",
        "the VM's /dev/net/tun under another name"
    );
    // A node can be created for any device, but only the container's devices can be opened.
    let disk =
        "set -- $(grep -w vda /proc/partitions); mknod /tmp/disk b $1 $2 && head -c 1 /tmp/disk";
    let answer = c.exec(&["sh", "-c", disk]).await?;
    ensure!(
        answer.exit_code != 0
            && String::from_utf8_lossy(&answer.stderr).contains("Operation not permitted"),
        "a disk of the VM is open to a container: {answer:?}"
    );
    pod.end().await
}

async fn groups_policy_is_reported_in_status(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    for (name, policy, wanted) in [
        (
            "merge",
            SupplementalGroupsPolicy::Merge,
            vec![1000, 1234, 50000, 50001],
        ),
        ("strict", SupplementalGroupsPolicy::Strict, vec![1000, 1234]),
    ] {
        let c = sleeper(&ctx, &pod, name, |s| {
            s.run_as_user = Some(Int64Value { value: 1000 });
            s.supplemental_groups = vec![1234];
            s.supplemental_groups_policy = policy.into();
        })
        .await?;
        let text: Vec<_> = wanted.iter().map(i64::to_string).collect();
        same!(
            c.out(&["id", "-G"]).await?,
            text.join(" ") + "\n",
            "{name}: exec"
        );
        let user = c.status().await?.user.and_then(|user| user.linux);
        let Some(user) = user else {
            bail!("{name}: status without user");
        };
        same!(
            (user.uid, user.gid, user.supplemental_groups),
            (1000, 1000, wanted),
            "{name}: status"
        );
    }
    pod.end().await
}

async fn privileged_container_has_the_vm_devices(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let c = sleeper(&ctx, &pod, "c", |s| {
        s.privileged = true;
        s.masked_paths = vec!["/proc/version".into()];
        s.readonly_paths = vec!["/proc/sys".into()];
    })
    .await?;
    let script = "test -c /dev/kmsg && test -c /dev/net/tun && ls /dev/vd* | head -1; head -c 1 /dev/vda | wc -c; \
        echo 1 > /proc/sys/net/ipv4/ip_forward && cat /proc/sys/net/ipv4/ip_forward; \
        mkdir /sys/fs/cgroup/mine && rmdir /sys/fs/cgroup/mine && echo cgroup; \
        mount -t tmpfs none /tmp && echo mounted";
    same!(
        c.out(&["sh", "-c", script]).await?,
        "/dev/vda\n1\n1\ncgroup\nmounted\n",
        "access of a privileged container"
    );
    pod.end().await
}

async fn node_pid_and_ipc_namespaces_are_the_vms(ctx: Context) -> Result {
    let options = NamespaceOption {
        pid: NamespaceMode::Node.into(),
        ipc: NamespaceMode::Node.into(),
        ..Default::default()
    };
    let mut config = pod_spec(&ctx.node, "node");
    config.linux.get_or_insert_default().security_context = Some(LinuxSandboxSecurityContext {
        namespace_options: Some(options.clone()),
        ..Default::default()
    });
    let pod = Pod::run_with(&ctx.node, config).await?;
    let mut config = container_spec("a", &ctx.images.base, &["sleep", "7654"]);
    security_context(&mut config).namespace_options = Some(options.clone());
    let a = pod.start_with(config).await?;
    let b = sleeper(&ctx, &pod, "b", |s| s.namespace_options = Some(options)).await?;
    let seen = b.out(&["ps"]).await?;
    ensure!(
        seen.contains("sleep 7654") && seen.contains("kthreadd"),
        "the VM's processes are not seen:\n{seen}"
    );
    same!(
        a.out(&["readlink", "/proc/self/ns/pid"]).await?,
        b.out(&["readlink", "/proc/self/ns/pid"]).await?,
        "PID namespace of two containers"
    );
    let made = run("ipcmk", &["-M", "4096"])?;
    let id = made
        .trim()
        .rsplit(' ')
        .next()
        .unwrap_or_default()
        .to_owned();
    let (b, id) = (&b, id.as_str());
    let listed = poll::until(
        "the segment in the container",
        ctx.patience(20),
        || async move {
            let text = b.out(&["cat", "/proc/sysvipc/shm"]).await?;
            let mut ids = text
                .lines()
                .filter_map(|line| line.split_whitespace().nth(1));
            ensure!(ids.any(|have| have == id), "{text}");
            Ok(())
        },
    )
    .await;
    run("ipcrm", &["-m", id])?;
    listed?;
    // A container that exits leaves the VM's other processes running.
    a.stop(0).await?;
    same!(b.out(&["echo", "alive"]).await?, "alive\n", "the neighbor");
    pod.end().await
}

fn run(program: &str, args: &[&str]) -> Result<String> {
    let output = std::process::Command::new(program).args(args).output()?;
    ensure!(output.status.success(), "{program} {args:?}: {output:?}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Returns one mapping, from id 1000 of the VM.
fn ids(container_id: u32, length: u32) -> IdMapping {
    IdMapping {
        host_id: 1000,
        container_id,
        length,
    }
}

fn mapped(mapping: IdMapping) -> NamespaceOption {
    NamespaceOption {
        pid: NamespaceMode::Container.into(),
        userns_options: Some(UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: vec![mapping],
            gids: vec![mapping],
        }),
        ..Default::default()
    }
}

/// Runs a pod with a user namespace.
async fn mapped_pod(ctx: &Context, mapping: IdMapping) -> Result<Pod> {
    let mut config = pod_spec(&ctx.node, "userns");
    config.linux.get_or_insert_default().security_context = Some(LinuxSandboxSecurityContext {
        namespace_options: Some(mapped(mapping)),
        ..Default::default()
    });
    Pod::run_with(&ctx.node, config).await
}

async fn user_namespace_maps_ids(ctx: Context) -> Result {
    let refused = mapped_pod(&ctx, ids(1, 10)).await;
    let text = refused.err().map(|error| error.0).unwrap_or_default();
    ensure!(
        text.contains("userns_options") && text.contains("ID 0"),
        "{text}"
    );

    let pod = mapped_pod(&ctx, ids(0, 100_000)).await?;
    let script = "awk '{print $1, $2, $3}' /proc/self/uid_map /proc/self/gid_map; id -u; stat -c %u:%g / /etc/passwd; \
        touch /made && stat -c %u /made; echo more >> /etc/passwd && echo copied up; \
        echo again > /dev/stdout; test -w /dev/null && echo dev; ls /sys/class/net | grep -c lo; httpd -p 81 && echo bound";
    let mut config = container_spec(
        "c",
        &ctx.images.base,
        &["sh", "-c", &format!("{script}; sleep 1000")],
    );
    security_context(&mut config).namespace_options = Some(mapped(ids(0, 100_000)));
    let c = pod.start_with(config).await?;
    c.printed("bound", ctx.patience(20)).await?;
    same!(
        c.output()?,
        "0 1000 100000\n0 1000 100000\n0\n0:0\n0:0\n0\ncopied up\nagain\ndev\n1\nbound\n",
        "init in a user namespace"
    );
    same!(
        c.out(&["sh", "-c", "awk '{print $2}' /proc/self/uid_map; id -u; cat /proc/1/comm; echo x > /dev/stderr; chown 5 /made; stat -c %u /made"])
            .await?,
        "1000\n0\nsleep\n5\n",
        "an exec'd process in it"
    );
    // So are the owners in an image volume.
    let mut image = container_spec(
        "image",
        &ctx.images.base,
        &["stat", "-c", "%u:%g", "/image/etc/passwd"],
    );
    security_context(&mut image).namespace_options = Some(mapped(ids(0, 100_000)));
    image.mounts = vec![Mount {
        container_path: "/image".into(),
        readonly: true,
        image: Some(ImageSpec {
            image: ctx.images.base.clone(),
            ..Default::default()
        }),
        uid_mappings: vec![ids(0, 100_000)],
        gid_mappings: vec![ids(0, 100_000)],
        ..Default::default()
    }];
    let image = pod.start_with(image).await?;
    image.exited(ctx.patience(20)).await?;
    same!(image.output()?, "0:0\n", "owners in an image volume");
    // The pod's PID namespace is owned by its user namespace.
    let mut shares = container_spec("p", &ctx.images.base, &["cat", "/proc/1/comm"]);
    security_context(&mut shares).namespace_options = Some(NamespaceOption {
        pid: NamespaceMode::Pod.into(),
        ..mapped(ids(0, 100_000))
    });
    let shares = pod.start_with(shares).await?;
    shares.exited(ctx.patience(20)).await?;
    same!(shares.output()?, "pause\n", "PID 1 of the pod");
    // The container's root is an unprivileged user in the VM.
    ensure!(
        c.exec(&["mount", "-o", "remount,rw", "/sys"])
            .await?
            .exit_code
            != 0
            && c.exec(&["hostname", "other"]).await?.exit_code != 0,
        "root of the user namespace changed the VM"
    );
    pod.end().await
}

async fn volume_in_user_namespace_is_id_mapped(ctx: Context) -> Result {
    // The kernel of the emulated host (6.1) has no ID-mapped mounts of tmpfs.
    let volume = ctx.node.dir.join("userns-volume");
    let disk = Ext4::mount(&ctx.scratch.join("userns.img"), 16 << 20, &volume)?;
    std::fs::write(volume.join("there"), "x")?;
    std::fs::create_dir_all(volume.join("map/..v0"))?;
    std::fs::write(volume.join("map/..v0/key"), "content\n")?;
    std::os::unix::fs::symlink("..v0", volume.join("map/..data"))?;
    std::os::unix::fs::symlink("..data/key", volume.join("map/key"))?;
    // The image's own volume, which is missing in its layers.
    let image = Image::new(
        vec![ctx.images.busybox.clone()],
        json!({"Env": ["PATH=/bin"], "Volumes": {"/own": {}}}),
    );
    ctx.registry.push("userns-volume", "1", &image).await?;
    let reference = format!("{}/userns-volume:1", ctx.registry.host);
    pull(&ctx.node, &reference).await?;
    let pod = mapped_pod(&ctx, ids(0, 100_000)).await?;
    let script = "stat -c %u:%g /volume/there; touch /volume/mine && echo in volume; \
        cat /map/key; stat -L -c %u:%g /map/key; touch /own/mine && stat -c %u:%g /own";
    let mut config = container_spec("c", &reference, &["sh", "-c", script]);
    security_context(&mut config).namespace_options = Some(mapped(ids(0, 100_000)));
    let mapped_mount = |path: &std::path::Path, at: &str, readonly| Mount {
        container_path: at.into(),
        host_path: path.display().to_string(),
        readonly,
        uid_mappings: vec![ids(0, 100_000)],
        gid_mappings: vec![ids(0, 100_000)],
        ..Default::default()
    };
    config.mounts = vec![
        mapped_mount(&volume, "/volume", false),
        mapped_mount(&volume.join("map"), "/map", true),
    ];
    let c = pod.start_with(config).await?;
    c.exited(ctx.patience(20)).await?;
    same!(
        c.output()?,
        "0:0\nin volume\ncontent\n0:0\n0:0\n",
        "mapped volumes"
    );
    use std::os::unix::fs::MetadataExt;
    same!(
        std::fs::metadata(volume.join("mine"))?.uid(),
        0,
        "owner on the host of a file of the container's root"
    );
    pod.end().await?;
    drop(disk);
    Ok(())
}
