//! Pod network: CNI addresses, HTTP from the host, between pods and through hostPort, IPv6, DNS and hosts files, and
//! removal.

use crate::case;
use crate::context::Backend;
use crate::failure::{During, Result};
use crate::namespaces::run;
use crate::pod::{Pod, container_spec, pod_spec};
use crate::probe;
use crate::runner::{Case, Context};
use crate::{ensure, poll, same};
use k8s_cri::v1::*;
use std::net::Ipv4Addr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(host_reaches_the_pod_over_http, 60),
        case!(host_port_reaches_the_pod, 60),
        case!(pods_reach_each_other_and_the_host, 90),
        case!(guest_has_the_cni_addresses, 60),
        case!(dns_hostname_and_hosts_are_written, 60),
        case!(bulk_transfer_is_complete, 120),
        case!(host_network_pod_shares_the_host_ports, 90),
        case!(host_network_pod_reaches_host_ports, 90).not_on(
            Backend::Krun,
            "takes a minute under nested emulation; TSI reaches hostPorts without the agent, and \
             host_network_pod_shares_the_host_ports binds the node's address",
        ),
    ]
}

/// Sends a GET request over HTTP/1.0 and returns the whole response.
pub(crate) async fn get(address: &str, path: &str) -> Result<String> {
    let work = async {
        let mut stream = TcpStream::connect(address).await.during(address)?;
        stream
            .write_all(format!("GET {path} HTTP/1.0\r\nHost: pod\r\n\r\n").as_bytes())
            .await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    };
    tokio::time::timeout(Duration::from_secs(10), work)
        .await
        .during(format!("GET {address}{path}"))?
}

/// Repeats a GET request until the test page is returned.
pub(crate) async fn served(address: &str, limit: Duration) -> Result {
    poll::until(&format!("HTTP from {address}"), limit, || async {
        let text = get(address, "/index.html").await?;
        ensure!(text.contains("hello from the pod"), "{text:?}");
        Ok(())
    })
    .await
}

const HTTPD: [&str; 6] = ["httpd", "-f", "-p", "80", "-h", "/var/www"];

async fn host_reaches_the_pod_over_http(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "web").await?;
    pod.start("web", &ctx.images.base, &HTTPD).await?;
    served(&format!("{}:80", pod.ip().await?), ctx.patience(10)).await?;
    let more = pod
        .status()
        .await?
        .network
        .unwrap_or_default()
        .additional_ips;
    let v6 = more.iter().find(|ip| ip.ip.contains(':'));
    ensure!(v6.is_some(), "no IPv6 address in the status: {more:?}");
    served(
        &format!("[{}]:80", v6.map(|v| v.ip.as_str()).unwrap_or_default()),
        ctx.patience(10),
    )
    .await?;
    pod.end().await
}

async fn host_port_reaches_the_pod(ctx: Context) -> Result {
    let node = ctx.dedicated_node("port", |o| o.iptables = true).await?;
    let mut config = pod_spec(&node, "port");
    config.port_mappings = vec![PortMapping {
        protocol: Protocol::Tcp.into(),
        container_port: 80,
        host_port: 8081,
        host_ip: String::new(),
    }];
    let pod = Pod::run_with(&node, config).await?;
    crate::pod::pull(&node, &ctx.images.base).await?;
    pod.start("web", &ctx.images.base, &HTTPD).await?;
    // Through a host address other than loopback, as a client of the node connects.
    let gateway = pod
        .ip()
        .await?
        .rsplit_once('.')
        .map(|(net, _)| format!("{net}.1"))
        .unwrap_or_default();
    let status = pod.status().await?.network.unwrap_or_default();
    let six = status.additional_ips.into_iter().map(|ip| ip.ip);
    let six: Vec<_> = six.filter(|ip| ip.contains(':')).collect();
    same!(six.len(), 1, "IPv6 addresses of the pod");
    let addresses = [
        format!("{gateway}:8081"),
        format!(
            "[{}::1]:8081",
            six[0].split("::").next().unwrap_or_default()
        ),
    ];
    for address in &addresses {
        served(address, ctx.patience(10)).await?;
    }
    pod.end().await?;
    for address in &addresses {
        ensure!(
            get(address, "/").await.is_err(),
            "the host port answers at {address} after the pod is gone"
        );
    }
    Ok(())
}

async fn pods_reach_each_other_and_the_host(ctx: Context) -> Result {
    let server = Pod::run(&ctx.node, "server").await?;
    server.start("web", &ctx.images.base, &HTTPD).await?;
    let ip = server.ip().await?;
    served(&format!("{ip}:80"), ctx.patience(10)).await?;
    let client = Pod::run(&ctx.node, "client").await?;
    let text = client
        .sh(
            &ctx.images.base,
            &format!("wget -qO- http://{ip}/index.html"),
        )
        .await?;
    same!(text, "hello from the pod\n", "pod to pod");
    let own = client.ip().await?;
    ensure!(own != ip, "two pods with one address {ip}");
    // A listener on the host, reached through the bridge's address, sees the pod's own address as the source.
    let gateway = ip
        .rsplit_once('.')
        .map(|(net, _)| format!("{net}.1"))
        .unwrap_or_default();
    let listener = tokio::net::TcpListener::bind((gateway.as_str(), 8099)).await?;
    let caller = tokio::spawn(async move {
        let (mut stream, from) = listener.accept().await?;
        stream.write_all(b"from the host\n").await?;
        Ok::<_, std::io::Error>(from.ip().to_string())
    });
    let text = client
        .sh(&ctx.images.base, &format!("nc {gateway} 8099 < /dev/null"))
        .await?;
    same!(text, "from the host\n", "pod to host");
    same!(caller.await??, own, "source address at the host");
    server.end().await?;
    client.end().await
}

async fn guest_has_the_cni_addresses(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "addr").await?;
    let text = pod
        .sh(&ctx.images.base, "ip addr; ip route; ip -6 route")
        .await?;
    let ip = pod.ip().await?;
    ensure!(
        text.contains(&format!("inet {ip}/24")),
        "no {ip}/24 in the guest:\n{text}"
    );
    ensure!(
        text.contains("inet 127.0.0.1/8"),
        "loopback is down:\n{text}"
    );
    ensure!(
        text.contains("default via 10.88."),
        "no IPv4 default route:\n{text}"
    );
    ensure!(text.contains("inet6 fd88:"), "no IPv6 address:\n{text}");
    ensure!(
        text.contains("default via fd88:"),
        "no IPv6 default route:\n{text}"
    );
    pod.end().await
}

async fn dns_hostname_and_hosts_are_written(ctx: Context) -> Result {
    let mut config = pod_spec(&ctx.node, "named");
    config.hostname = "a-host-name".into();
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.96.0.10".into()],
        searches: vec!["e2e.svc.cluster.local".into(), "svc.cluster.local".into()],
        options: vec!["ndots:5".into()],
    });
    let pod = Pod::run_with(&ctx.node, config).await?;
    let text = pod
        .sh(
            &ctx.images.base,
            "hostname; cat /etc/hostname; cat /etc/resolv.conf; cat /etc/hosts",
        )
        .await?;
    ensure!(
        text.starts_with("a-host-name\na-host-name\n"),
        "hostname: {text}"
    );
    for wanted in [
        "nameserver 10.96.0.10",
        "search e2e.svc.cluster.local svc.cluster.local",
        "options ndots:5",
        "localhost",
    ] {
        ensure!(
            text.contains(wanted),
            "no {wanted:?} in resolv.conf or hosts:\n{text}"
        );
    }
    pod.end().await
}

/// Puts a pod in the host network.
fn host_network(mut config: PodSandboxConfig) -> PodSandboxConfig {
    config.linux.get_or_insert_default().security_context = Some(LinuxSandboxSecurityContext {
        namespace_options: Some(NamespaceOption {
            network: NamespaceMode::Node.into(),
            ..Default::default()
        }),
        ..Default::default()
    });
    config
}

/// Runs a pod in the host network: it reaches the host's loopback and other addresses, and the host reaches its ports.
async fn host_network_pod_shares_the_host_ports(ctx: Context) -> Result {
    const PORT: u16 = 12003;
    let pod = Pod::run_with(&ctx.node, host_network(pod_spec(&ctx.node, "hostnet"))).await?;
    same!(pod.ip().await?, "", "address of a host network pod");
    // The registry on the host's loopback, as the first action of the first container.
    let image = &ctx.images.base;
    let text = pod
        .sh(image, "netstat -ltn; wget -qO- http://127.0.0.1:5000/v2/")
        .await?;
    ensure!(text.ends_with("{}"), "the host's loopback: {text:?}");
    ensure!(text.contains(":5000 "), "no host port in {text}");
    run("ip", &["addr", "add", "192.0.2.7/32", "dev", "lo"])?;
    let listener = tokio::net::TcpListener::bind("192.0.2.7:8098").await?;
    let caller = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await?;
        stream.write_all(b"from the host\n").await
    });
    let checked = uses_host_address(&ctx, &pod).await;
    run("ip", &["addr", "del", "192.0.2.7/32", "dev", "lo"])?;
    checked?;
    caller.await??;

    let port = PORT.to_string();
    let web = pod
        .start(
            "web",
            image,
            &["httpd", "-f", "-p", &port, "-h", "/var/www"],
        )
        .await?;
    for address in ["127.0.0.1", "127.0.0.5"] {
        served(&format!("{address}:{PORT}"), ctx.patience(10)).await?;
    }
    web.stop(0).await?;
    // The pod can bind again a port that it holds on the host.
    let argv = ["httpd", "-f", "-p", &port, "-h", "/var/www"];
    let again = pod.start("again", image, &argv).await?;
    served(&format!("127.0.0.1:{PORT}"), ctx.patience(10)).await?;
    again.stop(0).await?;
    let free = || {
        poll::until("the port is free again", ctx.patience(10), || async {
            let socket = tokio::net::TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            // libkrun's connections in TIME_WAIT allow only sockets with SO_REUSEPORT.
            socket.set_reuseport(ctx.backend == Backend::Krun)?;
            socket.bind((Ipv4Addr::UNSPECIFIED, PORT).into())?;
            socket.listen(1)?;
            Ok(())
        })
    };
    // On libkrun the pod keeps a port on which a server listened until the pod ends (docs/networking.md).
    if ctx.backend == Backend::Qemu {
        free().await?;
    }
    pod.end().await?;
    ensure!(
        get(&format!("127.0.0.1:{PORT}"), "/").await.is_err(),
        "the port answers after the pod is gone"
    );
    free().await
}

/// A client reaches the node's address 192.0.2.7, and can bind it before it connects to another.
async fn uses_host_address(ctx: &Context, pod: &Pod) -> Result {
    let mut config = container_spec("client", &ctx.images.base, &["sleep", "1000"]);
    config.mounts = probe::mounts("/probe")?;
    let client = pod.start_with(config).await?;
    let text = client
        .out(&["sh", "-c", "nc 192.0.2.7 8098 < /dev/null"])
        .await?;
    same!(text, "from the host\n", "an address of the host");
    // The shim reports new addresses within a second.
    let argv = ["/probe", "get-from", "192.0.2.7", "127.0.0.1:5000"];
    let text = poll::until("the address can be bound", ctx.patience(10), || {
        client.out(&argv)
    })
    .await?;
    ensure!(
        text.starts_with("127.0.0.1:5000 ") && text.contains("\nHTTP/"),
        "from 192.0.2.7: {text:?}"
    );
    client.stop(0).await
}

/// A pod in the host network binds an address of the node and reaches a hostPort on the node's loopback, which has no listener.
async fn host_network_pod_reaches_host_ports(ctx: Context) -> Result {
    const ADDRESS: &str = "192.0.2.8";
    const PORT: u16 = 8082;
    let node = ctx
        .dedicated_node("hostnetport", |o| o.iptables = true)
        .await?;
    crate::pod::pull(&node, &ctx.images.base).await?;
    let mut config = pod_spec(&node, "server");
    config.port_mappings = vec![PortMapping {
        protocol: Protocol::Tcp.into(),
        container_port: 80,
        host_port: PORT.into(),
        host_ip: Ipv4Addr::LOCALHOST.to_string(),
    }];
    let server = Pod::run_with(&node, config).await?;
    server.start("web", &ctx.images.base, &HTTPD).await?;
    served(&format!("127.0.0.1:{PORT}"), ctx.patience(10)).await?;

    run(
        "ip",
        &["addr", "add", &format!("{ADDRESS}/32"), "dev", "lo"],
    )?;
    let client = Pod::run_with(&node, host_network(pod_spec(&node, "client"))).await;
    let checked = match &client {
        Ok(client) => reaches_host_port(&ctx, client, ADDRESS, PORT).await,
        Err(_) => Ok(()),
    };
    run(
        "ip",
        &["addr", "del", &format!("{ADDRESS}/32"), "dev", "lo"],
    )?;
    checked?;
    client?.end().await?;
    server.end().await
}

async fn reaches_host_port(ctx: &Context, client: &Pod, address: &str, port: u16) -> Result {
    let mut config = container_spec("client", &ctx.images.base, &["sleep", "1000"]);
    config.mounts = probe::mounts("/probe")?;
    let container = client.start_with(config).await?;
    for (source, target) in [
        ("0.0.0.0".to_owned(), format!("127.0.0.1:{port}")),
        (address.to_owned(), format!("127.0.0.1:{port}")),
        (
            format!("::ffff:{address}"),
            format!("[::ffff:127.0.0.1]:{port}"),
        ),
    ] {
        let text = container
            .out(&["/probe", "get-from", &source, &target])
            .await?;
        ensure!(
            text.starts_with(&format!("{target} ")) && text.contains("hello from the pod"),
            "from {source}: {text:?}"
        );
    }
    // Neither an address that the node lacks nor a port that nothing serves.
    for (source, target, refusal) in [
        ("192.0.2.9", "127.0.0.1:80", "os error 99"),
        (address, "127.0.0.1:9", "os error 111"),
    ] {
        let answer = container
            .exec(&["/probe", "get-from", source, target])
            .await?;
        let text = String::from_utf8_lossy(&answer.stderr);
        ensure!(
            answer.exit_code != 0 && text.contains(refusal),
            "from {source} to {target}: {answer:?}"
        );
    }
    Ok(())
}

/// Lines of a part of the file, and parts: 28 MB. Numbering all lines would take longer than sending them.
const PART_LINES: usize = 250_000;
const PARTS: usize = 16;

async fn bulk_transfer_is_complete(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "bulk").await?;
    pod.start(
        "web",
        &ctx.images.base,
        &[
            "sh",
            "-c",
            &format!(
                "seq 1 {PART_LINES} > /part; for i in $(seq {PARTS}); do echo part $i; cat /part; done > /var/www/big; \
                 exec httpd -f -p 80 -h /var/www"
            ),
        ],
    )
    .await?;
    let address = format!("{}:80", pod.ip().await?);
    served(&address, ctx.patience(60)).await?;
    let mut stream = TcpStream::connect(&address).await?;
    stream.write_all(b"GET /big HTTP/1.0\r\n\r\n").await?;
    let mut bytes = Vec::new();
    tokio::time::timeout(ctx.patience(60), stream.read_to_end(&mut bytes))
        .await
        .during("28 MB by HTTP")??;
    let body = bytes
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .map(|at| &bytes[at + 4..])
        .unwrap_or_default();
    let part: String = (1..=PART_LINES).map(|i| format!("{i}\n")).collect();
    let wanted: String = (1..=PARTS).map(|i| format!("part {i}\n{part}")).collect();
    ensure!(
        body == wanted.as_bytes(),
        "{} bytes of {} arrived, or others",
        body.len(),
        wanted.len()
    );
    pod.end().await
}
