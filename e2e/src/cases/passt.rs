//! Pods on a node without CNI whose network passt serves.

use super::security_context;
use crate::case;
use crate::failure::Result;
use crate::leak::LeakSnapshot;
use crate::pod::{Pod, container_spec, pod_spec, pull};
use crate::process::{family, kill};
use crate::runner::{Case, Context};
use crate::uplink::{NAME, NODE, SERVER_V6, Uplink};
use crate::{ensure, poll, same};
use k8s_cri::v1::*;
use std::os::unix::fs::PermissionsExt;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(passt_gives_a_pod_outgoing_connections, 90),
        case!(unusable_passt_fails_the_pod_by_name, 60),
    ]
}

/// Takes 127.0.0.1 from the guest's loopback and routes it to passt, as a hostile guest would.
const TO_NODE_LOOPBACK: &str = "echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet; ip addr del 127.0.0.1/8 dev lo; \
     ip route add 127.0.0.1/32 via 198.18.254.2 dev eth0 src 198.18.254.15 && echo routed";

async fn passt_gives_a_pod_outgoing_connections(ctx: Context) -> Result {
    let uplink = Uplink::open()?;
    outgoing(&ctx, &uplink).await?;
    uplink.close()
}

async fn outgoing(ctx: &Context, uplink: &Uplink) -> Result {
    let change = |options: &mut crate::node::NodeOptions| {
        options.network = false;
        options.without_cni = Some("passt");
    };
    let node = ctx.dedicated_node("passt", change).await?;
    let image = &ctx.images.base;
    pull(&node, image).await?;
    let clean = LeakSnapshot::take(&node)?;
    let mut config = pod_spec(&node, "out");
    config.dns_config = None;
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let pod = Pod::run_with(&node, config).await?;
    same!(pod.ip().await?, "", "address of a pod with passt");
    let mut config = container_spec("c", image, &["sleep", "1000"]);
    security_context(&mut config).privileged = true;
    let c = pod.start_with(config).await?;
    let sh = async |script: &str| c.exec(&["sh", "-c", script]).await;

    let text = String::from_utf8_lossy(&sh("cat /etc/resolv.conf").await?.stdout).into_owned();
    same!(text, "nameserver 203.0.113.2\n", "resolv.conf");
    for host in [NAME.to_owned(), format!("[{SERVER_V6}]")] {
        let fetch = format!("wget -qO- http://{host}/ | sha256sum");
        // The IPv6 address comes by a router advertisement.
        poll::until(
            &format!("a download from {host}"),
            ctx.patience(10),
            || async {
                let sum = sh(&fetch).await?.stdout;
                let sum = String::from_utf8_lossy(&sum).into_owned();
                ensure!(sum.starts_with(&uplink.sha256), "{sum}");
                Ok(())
            },
        )
        .await?;
    }
    passt_is_confined(&pod.id)?;

    // The node's address answers, its loopback does not.
    let listener = tokio::net::TcpListener::bind("0.0.0.0:8096").await?;
    let dial = async |address: &str, seconds: u32| {
        let script = format!("nc -w {seconds} {address} 8096 < /dev/null");
        tokio::select! {
            biased;
            accepted = listener.accept() => Ok(accepted.is_ok()),
            dialed = sh(&script) => dialed.map(|_| false),
        }
    };
    ensure!(dial(NODE, 10).await?, "the node's address is unreachable");
    ensure!(!dial("198.18.254.2", 1).await?, "the gateway is the node");
    let routed = String::from_utf8_lossy(&sh(TO_NODE_LOOPBACK).await?.stdout).into_owned();
    same!(routed, "routed\n", "the route of the loopback");
    ensure!(
        !dial("127.0.0.1", 1).await?,
        "the node's loopback is reachable"
    );

    kill(passt_of(&pod.id)?)?;
    poll::until("the VM ends with passt", ctx.patience(5), || async {
        let state = pod.status().await?.state();
        same!(state, PodSandboxState::SandboxNotready, "state");
        Ok(())
    })
    .await?;
    pod.end().await?;
    clean
        .restored_within(&node, ctx.patience(10))
        .await
        .map(drop)
}

/// Returns the pid of the pod's passt.
fn passt_of(pod: &str) -> Result<i32> {
    let named = |pid: &i32| {
        std::fs::read_to_string(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.contains("--map-host-loopback"))
    };
    match family(pod)?.1.into_iter().find(named) {
        Some(pid) => Ok(pid),
        None => crate::bail!("no passt below the shim"),
    }
}

fn passt_is_confined(pod: &str) -> Result {
    let pid = passt_of(pod)?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default()
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    ensure!(field("Uid:").parse::<u32>()? >= 1_879_048_192, "{status}");
    same!(field("CapEff:"), "0000000000000000", "capabilities");
    same!(field("NoNewPrivs:"), "1", "no_new_privs");
    same!(field("Seccomp:"), "2", "seccomp");
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    ensure!(
        files.is_some_and(|line| line.contains(" 8192 ")),
        "{limits}"
    );
    Ok(())
}

async fn unusable_passt_fails_the_pod_by_name(ctx: Context) -> Result {
    let old = ctx.scratch.join("old-passt");
    std::fs::write(&old, "#!/bin/sh\nexit 1\n")?;
    std::fs::set_permissions(&old, std::fs::Permissions::from_mode(0o755))?;
    for (name, program, reason) in [
        ("nopasst", "/no/such/passt".into(), "/no/such/passt"),
        ("oldpasst", old, "--map-host-loopback"),
    ] {
        let change = |options: &mut crate::node::NodeOptions| {
            options.network = false;
            options.without_cni = Some("passt");
            options.passt = Some(program);
        };
        let node = ctx.dedicated_node(name, change).await?;
        let Err(error) = Pod::run(&node, "p").await else {
            crate::bail!("{name}: the pod runs");
        };
        ensure!(
            error.0.contains("passt") && error.0.contains(reason),
            "{error}"
        );
    }
    Ok(())
}
