//! [`Uplink`]: a network beyond the node, with servers of HTTP and DNS, for pods that reach it through the node only.
//!
//! The node gets a default route to a network namespace that has no name. Servers are tasks of this program on sockets that
//! were made there. The node's resolv.conf is replaced in this program's mount namespace.

use crate::failure::{During, Result};
use crate::namespaces::{run, scratch};
use nix::mount::{MsFlags, umount};
use nix::sched::{CloneFlags, unshare};
use sha2::{Digest, Sha256};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

/// The node's address on the network.
pub(crate) const NODE: &str = "203.0.113.1";
/// The server's addresses.
const SERVER: [u8; 4] = [203, 0, 113, 2];
pub(crate) const SERVER_V6: &str = "fd00:113::2";
/// Name of the server, which its DNS knows.
pub(crate) const NAME: &str = "files.e2e.test";
/// The node's interface.
const DEVICE: &str = "up0";
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Size of the served file.
const FILE_BYTES: usize = 4 << 20;

/// The network. Removed by [`Uplink::close`], which reports failures, or on drop.
pub(crate) struct Uplink {
    /// SHA-256 of the served file in hex.
    pub sha256: String,
    servers: JoinSet<()>,
    /// Removes the network of an unfinished case.
    removal: Removal,
}

/// Removes the network on drop and ignores failures.
struct Removal {
    needed: bool,
}

impl Drop for Removal {
    fn drop(&mut self) {
        if self.needed {
            let _ = umount(RESOLV_CONF);
            let _ = run("ip", &["link", "del", DEVICE]);
        }
    }
}

impl Uplink {
    /// Creates the network and starts the servers.
    pub(crate) fn open() -> Result<Self> {
        let removal = Removal { needed: true };
        let (web, dns) = std::thread::spawn(outside)
            .join()
            .map_err(|_| crate::failure::Failure("the network's thread panicked".to_owned()))??;
        let file = scratch().join("resolv.conf");
        std::fs::write(&file, "nameserver 203.0.113.2\n")?;
        let none = None::<&str>;
        nix::mount::mount(Some(&file), RESOLV_CONF, none, MsFlags::MS_BIND, none)?;
        let content: Vec<u8> = (0..FILE_BYTES).map(|at| ((at * 31) >> 3) as u8).collect();
        let sha256 = hex::encode(Sha256::digest(&content));
        let mut servers = JoinSet::new();
        servers.spawn(serve_file(tokio::net::TcpListener::from_std(web)?, content));
        servers.spawn(serve_name(tokio::net::UdpSocket::from_std(dns)?));
        Ok(Self {
            sha256,
            servers,
            removal,
        })
    }

    /// Removes the network.
    pub(crate) fn close(mut self) -> Result {
        self.removal.needed = false;
        self.servers.abort_all();
        umount(RESOLV_CONF)?;
        run("ip", &["link", "del", DEVICE]).map(drop)
    }
}

/// Joins a new network namespace with the node's and returns sockets in it. Its thread must end afterwards.
fn outside() -> Result<(TcpListener, UdpSocket)> {
    let link = ["link", "add", DEVICE, "type", "veth", "peer", "name", "up1"];
    run("ip", &link)?;
    for address in ["203.0.113.1/24", "fd00:113::1/64"] {
        run("ip", &["addr", "add", address, "dev", DEVICE, "nodad"])?;
    }
    run("ip", &["link", "set", DEVICE, "up"])?;
    let node = std::fs::File::open("/proc/thread-self/ns/net")?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    let own = std::fs::File::open("/proc/thread-self/ns/net")?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), own.as_raw_fd());
    nix::sched::setns(&node, CloneFlags::CLONE_NEWNET)?;
    run("ip", &["link", "set", "up1", "netns", &path])?;
    nix::sched::setns(&own, CloneFlags::CLONE_NEWNET)?;
    for address in ["203.0.113.2/24", "fd00:113::2/64"] {
        run("ip", &["addr", "add", address, "dev", "up1", "nodad"])?;
    }
    run("ip", &["link", "set", "up1", "up"])?;
    nix::sched::setns(&node, CloneFlags::CLONE_NEWNET)?;
    run("ip", &["route", "add", "default", "via", "203.0.113.2"])?;
    run("ip", &["-6", "route", "add", "default", "via", SERVER_V6])?;
    nix::sched::setns(&own, CloneFlags::CLONE_NEWNET)?;
    let web = TcpListener::bind("[::]:80").during("a server beyond the node")?;
    web.set_nonblocking(true)?;
    let dns = UdpSocket::bind("203.0.113.2:53").during("a name server beyond the node")?;
    dns.set_nonblocking(true)?;
    Ok((web, dns))
}

/// Answers every request with the file.
async fn serve_file(listener: tokio::net::TcpListener, content: Vec<u8>) {
    let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {FILE_BYTES}\r\n\r\n");
    while let Ok((mut stream, _)) = listener.accept().await {
        let mut request = [0; 1024];
        if stream.read(&mut request).await.is_ok()
            && stream.write_all(head.as_bytes()).await.is_ok()
        {
            let _ = stream.write_all(&content).await;
        }
    }
}

/// Answers questions for the IPv4 address of [`NAME`], and others with nothing.
async fn serve_name(socket: tokio::net::UdpSocket) {
    const HEADER_BYTES: usize = 12;
    let mut query = [0; 512];
    while let Ok((length, client)) = socket.recv_from(&mut query).await {
        let question = query.get(HEADER_BYTES..length).unwrap_or_default();
        let mut name = Vec::new();
        for label in NAME.split('.') {
            name.push(label.len() as u8);
            name.extend(label.bytes());
        }
        name.push(0);
        let question = &question[..question.len().min(name.len() + 4)];
        let address = question == [name.as_slice(), &[0, 1, 0, 1]].concat();
        // Response, recursion available; one question.
        let mut answer = query[..2].to_vec();
        answer.extend([0x81, 0x80, 0, 1, 0, u8::from(address), 0, 0, 0, 0]);
        answer.extend(question);
        if address {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(SERVER);
        }
        let _ = socket.send_to(&answer, client).await;
    }
}
