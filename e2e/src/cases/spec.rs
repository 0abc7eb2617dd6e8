//! Container configuration as seen by the container: shared and private namespaces, identity, capabilities, mounts,
//! devices, limits.

use super::security_context;
use crate::case;
use crate::client::answer;
use crate::failure::Result;
use crate::pod::{Pod, container_spec, pod_spec, pull};
use crate::runner::{Case, Context};
use crate::{ensure, poll, same};
use k8s_cri::v1::*;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(namespaces_are_shared_or_private, 60),
        case!(pod_pid_namespace_is_shared, 60),
        case!(arguments_environment_and_directory_apply, 60),
        case!(image_defaults_apply, 60),
        case!(user_and_groups_apply, 90),
        case!(capabilities_are_added_and_dropped, 60),
        case!(read_only_rootfs_refuses_writes, 60),
        case!(masked_and_read_only_paths_apply, 60),
        case!(directories_and_files_are_mounted, 60),
        case!(volume_is_shared_by_two_containers, 60),
        case!(termination_log_reaches_the_host, 60),
        case!(default_devices_exist, 60),
        case!(limits_are_set_in_cgroup_v2, 60),
        case!(oom_killed_container_is_reported, 90),
        case!(oom_of_a_child_process_is_reported, 90),
        case!(vm_size_follows_the_pod, 90),
        case!(stdin_is_at_eof_unless_requested, 60),
        case!(sysctls_apply, 60),
    ]
}

async fn namespaces_are_shared_or_private(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let a = pod.start("a", &ctx.images.base, &["sleep", "1000"]).await?;
    let b = pod.start("b", &ctx.images.base, &["sleep", "1000"]).await?;
    for kind in ["net", "ipc", "uts"] {
        let link = format!("/proc/self/ns/{kind}");
        same!(
            a.out(&["readlink", &link]).await?,
            b.out(&["readlink", &link]).await?,
            "{kind} namespace of two containers"
        );
    }
    for kind in ["pid", "mnt"] {
        let link = format!("/proc/self/ns/{kind}");
        ensure!(
            a.out(&["readlink", &link]).await? != b.out(&["readlink", &link]).await?,
            "{kind} namespace is shared"
        );
    }
    let processes = a
        .out(&["sh", "-c", "ls /proc | grep -c '^[0-9]*$'"])
        .await?;
    ensure!(
        processes.trim().parse::<u32>().is_ok_and(|n| n <= 5),
        "{} processes seen in an own PID namespace",
        processes.trim()
    );
    a.out(&["sh", "-c", "echo shared > /dev/shm/x"]).await?;
    same!(
        b.out(&["cat", "/dev/shm/x"]).await?,
        "shared\n",
        "/dev/shm of the pod"
    );
    pod.end().await
}

async fn pod_pid_namespace_is_shared(ctx: Context) -> Result {
    let mut config = pod_spec(&ctx.node, "pid");
    let options = NamespaceOption {
        pid: NamespaceMode::Pod.into(),
        ..Default::default()
    };
    config.linux.get_or_insert_default().security_context = Some(LinuxSandboxSecurityContext {
        namespace_options: Some(options.clone()),
        ..Default::default()
    });
    let pod = Pod::run_with(&ctx.node, config).await?;
    let spec = |name: &str, argv: &[&str]| {
        let mut config = container_spec(name, &ctx.images.base, argv);
        security_context(&mut config).namespace_options = Some(options.clone());
        config
    };
    pod.start_with(spec("a", &["sleep", "7654"])).await?;
    let b = pod.start_with(spec("b", &["sleep", "1000"])).await?;
    let seen = b.out(&["ps"]).await?;
    ensure!(
        seen.contains("sleep 7654"),
        "the neighbor's process is not seen:\n{seen}"
    );
    pod.end().await
}

async fn arguments_environment_and_directory_apply(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let mut config = container_spec("c", &ctx.images.base, &["sh", "-c"]);
    config.args = vec![
        "echo \"$0\" \"$1\"; pwd; echo $A; echo \"$B\"; echo $FROM_IMAGE".into(),
        "x y".into(),
        "z'".into(),
    ];
    config.working_dir = "/made/for/it".into();
    let pair = |key: &str, value: &str| KeyValue {
        key: key.into(),
        value: value.into(),
    };
    config.envs = vec![
        pair("A", "1"),
        pair("B", "two words = \u{e9}"),
        pair("FROM_IMAGE", "overridden"),
    ];
    let c = pod.start_with(config).await?;
    c.exited(ctx.patience(20)).await?;
    same!(
        c.output()?,
        "x y z'\n/made/for/it\n1\ntwo words = \u{e9}\noverridden\n",
        "output"
    );
    pod.end().await
}

async fn image_defaults_apply(ctx: Context) -> Result {
    pull(&ctx.node, &ctx.images.user).await?;
    let pod = ctx.shared_pod().await;
    let c = pod.start("c", &ctx.images.user, &[]).await?;
    c.exited(ctx.patience(20)).await?;
    same!(c.output()?, "entry and cmd\n", "ENTRYPOINT and CMD");
    let mut config = container_spec("d", &ctx.images.user, &[]);
    config.args = vec!["only".into(), "args".into()];
    let d = pod.start_with(config).await?;
    d.exited(ctx.patience(20)).await?;
    same!(d.output()?, "entry only args\n", "args replace CMD");
    same!(
        pod.sh(&ctx.images.user, "id -un; pwd").await?,
        "app\n/home/app\n",
        "USER and WORKDIR"
    );
    pod.end().await
}

async fn user_and_groups_apply(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let run = |name: &'static str, change: fn(&mut LinuxContainerSecurityContext)| {
        let pod = pod.clone();
        let mut config =
            container_spec(name, &ctx.images.base, &["sh", "-c", "id -u; id -g; id -G"]);
        change(security_context(&mut config));
        let limit = ctx.patience(20);
        async move {
            let c = pod.start_with(config).await?;
            c.exited(limit).await?;
            Ok::<_, crate::failure::Failure>(c.output()?.replace('\n', " "))
        }
    };
    same!(run("root", |_| {}).await?, "0 0 0 ", "no user requested");
    same!(
        run("uid", |s| s.run_as_user = Some(Int64Value { value: 1000 })).await?,
        "1000 1000 1000 50000 50001 ",
        "by number, groups from the image"
    );
    same!(
        run("name", |s| s.run_as_username = "www-data".into()).await?,
        "33 33 33 50001 ",
        "by name"
    );
    let both = run("gid", |s| {
        s.run_as_user = Some(Int64Value { value: 4321 });
        s.run_as_group = Some(Int64Value { value: 1234 });
        s.supplemental_groups = vec![77, 88];
    });
    same!(
        both.await?,
        "4321 1234 1234 77 88 ",
        "unknown user with group and supplemental groups"
    );
    let mut config = container_spec("nobody", &ctx.images.base, &["true"]);
    security_context(&mut config).run_as_username = "no-such-user".into();
    let outcome = async { pod.start_with(config).await.map(drop) }.await;
    ensure!(
        outcome
            .as_ref()
            .is_err_and(|e| e.0.contains("no-such-user")),
        "an unknown user: {outcome:?}"
    );
    pod.end().await
}

async fn capabilities_are_added_and_dropped(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let effective = |name: &'static str, change: fn(&mut LinuxContainerSecurityContext)| {
        let pod = pod.clone();
        let mut config = container_spec(
            name,
            &ctx.images.base,
            &["grep", "-E", "CapEff|NoNewPrivs", "/proc/self/status"],
        );
        change(security_context(&mut config));
        let limit = ctx.patience(20);
        async move {
            let c = pod.start_with(config).await?;
            c.exited(limit).await?;
            let words: Vec<_> = c.output()?.split_whitespace().map(str::to_owned).collect();
            let caps = u64::from_str_radix(words.get(1).map_or("", String::as_str), 16)?;
            Ok::<_, crate::failure::Failure>((caps, words.get(3).cloned().unwrap_or_default()))
        }
    };
    // The 14 default capabilities of Docker and containerd, by the numbers of linux/capability.h.
    let default = [0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31]
        .iter()
        .fold(0_u64, |set, bit| set | 1 << bit);
    same!(
        effective("default", |_| {}).await?,
        (default, "0".into()),
        "default set"
    );
    let none = effective("none", |s| {
        s.capabilities = Some(Capability {
            drop_capabilities: vec!["ALL".into()],
            ..Default::default()
        });
        s.no_new_privs = true;
    });
    same!(none.await?, (0, "1".into()), "ALL dropped, no_new_privs");
    let one = effective("one", |s| {
        s.capabilities = Some(Capability {
            drop_capabilities: vec!["ALL".into()],
            add_capabilities: vec!["NET_ADMIN".into()],
            ..Default::default()
        });
    });
    same!(one.await?.0, 1 << 12, "NET_ADMIN alone");
    let privileged = effective("privileged", |s| s.privileged = true).await?.0;
    ensure!(
        privileged & 1 << 21 != 0,
        "privileged has no SYS_ADMIN: {privileged:x}"
    );
    pod.end().await
}

async fn read_only_rootfs_refuses_writes(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let script = "echo x > /file && echo wrote; echo x > /tmp/file && echo wrote; echo x > /dev/shm/file && echo shm; echo end";
    let mut config = container_spec("ro", &ctx.images.base, &["sh", "-c", script]);
    security_context(&mut config).readonly_rootfs = true;
    let c = pod.start_with(config).await?;
    c.exited(ctx.patience(20)).await?;
    let output = c.output()?;
    ensure!(
        output.contains("Read-only file system")
            && !output.contains("wrote")
            && output.contains("shm\nend"),
        "{output}"
    );
    pod.end().await
}

async fn masked_and_read_only_paths_apply(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let mut config = container_spec("c", &ctx.images.base, &["sleep", "1000"]);
    security_context(&mut config).masked_paths =
        vec!["/bin/cal".into(), "/var/www".into(), "/not/there".into()];
    security_context(&mut config).readonly_paths = vec!["/etc".into()];
    let c = pod.start_with(config).await?;
    same!(
        c.out(&[
            "sh",
            "-c",
            "wc -c < /bin/cal; ls /var/www | wc -l; wc -c < /bin/cat | grep -c '^0'; true"
        ])
        .await?,
        "0\n0\n0\n",
        "masked"
    );
    ensure!(
        c.exec(&["touch", "/etc/x"]).await?.exit_code != 0,
        "a read-only path takes a file"
    );
    pod.end().await
}

async fn directories_and_files_are_mounted(ctx: Context) -> Result {
    let dir = ctx.node.dir.join("volumes");
    std::fs::create_dir_all(dir.join("rw/sub"))?;
    std::fs::write(dir.join("rw/there"), "from the host\n")?;
    std::fs::write(dir.join("single"), "one file\n")?;
    let at = |name: &str| dir.join(name).display().to_string();
    let mount = |host: &str, container: &str, readonly: bool| Mount {
        host_path: at(host),
        container_path: container.into(),
        readonly,
        ..Default::default()
    };
    let pod = ctx.shared_pod().await;
    let mut config = container_spec("c", &ctx.images.base, &["sleep", "1000"]);
    config.mounts = vec![
        mount("rw", "/rw", false),
        mount("rw", "/ro", true),
        mount("single", "/etc/single", false),
        mount("single", "/ro-single", true),
    ];
    let c = pod.start_with(config).await?;
    same!(
        c.out(&["cat", "/rw/there", "/ro/there", "/etc/single", "/ro-single"])
            .await?,
        "from the host\nfrom the host\none file\none file\n",
        "content"
    );
    c.out(&[
        "sh",
        "-c",
        "echo back > /rw/sub/new && echo more >> /etc/single",
    ])
    .await?;
    same!(
        std::fs::read_to_string(dir.join("rw/sub/new"))?,
        "back\n",
        "written in the pod, read on the host"
    );
    same!(
        std::fs::read_to_string(dir.join("single"))?,
        "one file\nmore\n",
        "the single file"
    );
    for path in ["/ro/x", "/ro-single"] {
        let response = c.exec(&["sh", "-c", &format!("echo x > {path}")]).await?;
        ensure!(response.exit_code != 0, "{path} took a write");
    }
    std::fs::write(dir.join("rw/later"), "written while it runs\n")?;
    same!(
        c.out(&["cat", "/rw/later"]).await?,
        "written while it runs\n",
        "a file the host makes later"
    );
    pod.end().await?;
    same!(
        std::fs::read_to_string(dir.join("rw/there"))?,
        "from the host\n",
        "the volume after the pod"
    );
    Ok(())
}

async fn volume_is_shared_by_two_containers(ctx: Context) -> Result {
    let dir = ctx.node.dir.join("shared");
    std::fs::create_dir_all(&dir)?;
    let pod = ctx.shared_pod().await;
    let spec = |name: &str| {
        let mut config = container_spec(name, &ctx.images.base, &["sleep", "1000"]);
        config.mounts = vec![Mount {
            host_path: dir.display().to_string(),
            container_path: "/shared".into(),
            ..Default::default()
        }];
        config
    };
    let a = pod.start_with(spec("a")).await?;
    let b = pod.start_with(spec("b")).await?;
    a.out(&["sh", "-c", "mkdir /shared/d && echo hello > /shared/d/f && mkfifo /shared/pipe && ln /shared/d/f /shared/hard"]).await?;
    same!(
        b.out(&["cat", "/shared/d/f", "/shared/hard"]).await?,
        "hello\nhello\n",
        "a neighbor's file"
    );
    b.out(&["rm", "-r", "/shared/d"]).await?;
    ensure!(
        a.exec(&["cat", "/shared/d/f"]).await?.exit_code != 0,
        "a removed file is still there"
    );
    pod.end().await
}

async fn termination_log_reaches_the_host(ctx: Context) -> Result {
    // As the kubelet does: a host file mounted on the termination message path.
    let file = ctx.node.dir.join("termination");
    std::fs::write(&file, "")?;
    let pod = ctx.shared_pod().await;
    let mut config = container_spec(
        "c",
        &ctx.images.base,
        &["sh", "-c", "echo because > /dev/termination-log; exit 9"],
    );
    config.mounts = vec![Mount {
        host_path: file.display().to_string(),
        container_path: "/dev/termination-log".into(),
        ..Default::default()
    }];
    let c = pod.start_with(config).await?;
    same!(c.exited(ctx.patience(20)).await?.exit_code, 9, "exit code");
    same!(
        std::fs::read_to_string(&file)?,
        "because\n",
        "termination log"
    );
    pod.end().await
}

async fn default_devices_exist(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let script = "for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; \
        for l in fd stdin stdout stderr ptmx; do test -e /dev/$l || test -L /dev/$l || echo no $l; done; \
        test -d /dev/pts || echo no pts; ls /dev | grep -E 'vd|mem$|kmsg|hvc' ; head -c 3 /dev/zero | wc -c; echo x > /dev/null";
    same!(pod.sh(&ctx.images.base, script).await?, "3\n", "devices");
    pod.end().await
}

async fn limits_are_set_in_cgroup_v2(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "limits").await?;
    let mut config = container_spec("c", &ctx.images.base, &["sleep", "1000"]);
    config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 << 20,
        ..Default::default()
    });
    let c = pod.start_with(config).await?;
    let read = |file: &'static str| {
        let c = c.clone();
        async move {
            c.out(&["sh", "-c", &format!("cat /sys/fs/cgroup/{file}")])
                .await
        }
    };
    same!(
        read("memory.max").await?,
        format!("{}\n", 64 << 20),
        "memory.max"
    );
    same!(read("cpu.max").await?, "50000 100000\n", "cpu.max");
    let weight: u32 = read("cpu.weight").await?.trim().parse()?;
    ensure!(
        (15..=60).contains(&weight),
        "cpu.weight of 512 shares is {weight}"
    );
    let request = UpdateContainerResourcesRequest {
        container_id: c.id.clone(),
        linux: Some(LinuxContainerResources {
            memory_limit_in_bytes: 96 << 20,
            cpu_period: 100_000,
            cpu_quota: 20_000,
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut client = ctx.node.cri.runtime();
    let updated = client.update_container_resources(request).await;
    answer("UpdateContainerResources", updated)?;
    same!(
        read("memory.max").await?,
        format!("{}\n", 96 << 20),
        "memory.max after the update"
    );
    same!(
        read("cpu.max").await?,
        "20000 100000\n",
        "cpu.max after the update"
    );
    pod.end().await
}

async fn oom_killed_container_is_reported(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "oom").await?;
    let mut config = container_spec(
        "greedy",
        &ctx.images.base,
        &["sh", "-c", "tail -c 200000000 /dev/zero"],
    );
    config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: 32 << 20,
        ..Default::default()
    });
    let neighbor = pod
        .start("calm", &ctx.images.base, &["sleep", "1000"])
        .await?;
    let status = pod
        .start_with(config)
        .await?
        .exited(ctx.patience(60))
        .await?;
    same!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled"),
        "exit"
    );
    same!(
        neighbor.status().await?.state(),
        ContainerState::ContainerRunning,
        "the neighbor"
    );
    pod.end().await
}

/// Kills a child instead of the first process: a container that exits normally still had an OOM kill.
async fn oom_of_a_child_process_is_reported(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "oomchild").await?;
    let mut config = container_spec(
        "parent",
        &ctx.images.base,
        &[
            "sh",
            "-c",
            "tail -c 200000000 /dev/zero; echo child $?; exit 0",
        ],
    );
    config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: 32 << 20,
        ..Default::default()
    });
    let container = pod.start_with(config).await?;
    let status = container.exited(ctx.patience(60)).await?;
    let output = container.output()?;
    ensure!(output.ends_with("child 137\n"), "the child: {output:?}");
    same!(
        (status.exit_code, status.reason.as_str()),
        (0, "OOMKilled"),
        "exit"
    );
    pod.end().await
}

async fn vm_size_follows_the_pod(ctx: Context) -> Result {
    let total = |text: &str| -> u64 {
        text.split_whitespace()
            .nth(1)
            .and_then(|n| n.parse().ok())
            .unwrap_or_default()
    };
    let mut config = pod_spec(&ctx.node, "size");
    config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: 400 << 20,
        cpu_period: 100_000,
        cpu_quota: 150_000,
        ..Default::default()
    });
    let pod = Pod::run_with(&ctx.node, config).await?;
    let text = pod
        .sh(&ctx.images.base, "grep MemTotal /proc/meminfo; nproc")
        .await?;
    let kib = total(&text);
    ensure!(
        (400 << 10..640 << 10).contains(&kib),
        "a pod of 400 MiB sees {kib} KiB"
    );
    ensure!(text.trim().ends_with('2'), "a pod of 1.5 CPUs has: {text}");
    pod.end().await
}

async fn stdin_is_at_eof_unless_requested(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let c = pod
        .start(
            "c",
            &ctx.images.base,
            &["sh", "-c", "cat; echo end of input"],
        )
        .await?;
    same!(
        c.exited(ctx.patience(20)).await?.exit_code,
        0,
        "cat without an input ends"
    );
    same!(c.output()?, "end of input\n", "output");
    pod.end().await
}

async fn sysctls_apply(ctx: Context) -> Result {
    let mut config = pod_spec(&ctx.node, "sysctl");
    config.linux.get_or_insert_default().sysctls = [
        ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
        (
            "net.ipv4.ip_local_port_range".to_owned(),
            "1024 65000".to_owned(),
        ),
    ]
    .into();
    let pod = Pod::run_with(&ctx.node, config).await?;
    let text = poll::until("sysctls", ctx.patience(20), || async {
        pod.sh(
            &ctx.images.base,
            "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_local_port_range",
        )
        .await
    })
    .await?;
    same!(
        text.split_whitespace().collect::<Vec<_>>(),
        ["1", "1024", "65000"],
        "sysctls"
    );
    pod.end().await
}
