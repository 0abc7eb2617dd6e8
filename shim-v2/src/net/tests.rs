//! Tests against the kernel, in a network namespace with a veth as CNI leaves it. They need root.

use super::*;
use std::process::Command;

/// A network namespace held by a sleeping process; the machine's own is never touched.
struct Namespace(std::process::Child);

impl Namespace {
    fn new() -> Self {
        let child = Command::new("unshare")
            .args(["-n", "sleep", "60"])
            .spawn()
            .expect("unshare");
        let own = std::fs::read_link("/proc/self/ns/net").expect("own namespace");
        let namespace = Self(child);
        for _ in 0..200 {
            if std::fs::read_link(namespace.path()).is_ok_and(|link| link != own) {
                return namespace;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("no namespace within 2 s");
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.0.id()))
    }

    fn run(&self, line: &str) -> String {
        let mut args = vec!["-n".to_owned(), "-t".to_owned(), self.0.id().to_string()];
        args.extend(line.split(' ').map(str::to_owned));
        let output = Command::new("nsenter")
            .args(&args)
            .output()
            .expect("nsenter");
        assert!(
            output.status.success(),
            "{line}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn cni_like() -> Namespace {
    let namespace = Namespace::new();
    for line in [
        "ip link set lo up",
        "ip link add eth0 mtu 1400 address 02:00:00:00:00:07 type veth peer name host0",
        "ip link set host0 up",
        "ip link set eth0 up",
        "ip addr add 10.9.0.5/24 dev eth0",
        "ip -6 addr add fd00::5/64 dev eth0 nodad",
        "ip route add default via 10.9.0.1",
        "ip route add 169.254.1.1/32 dev eth0 scope link",
        "ip -6 route add default via fd00::1",
    ] {
        namespace.run(line);
    }
    // The peer represents the host's end; while down it does not count as an interface of the pod.
    namespace.run("ip link set host0 down");
    namespace.run("ip link set eth0 up");
    namespace
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn attach_joins_cni_interfaces_and_detach_undoes_it() {
    let namespace = cni_like();
    let network = attach(&namespace.path()).expect("attach");
    assert_eq!(network.interfaces.len(), 1, "{network:?}");
    let eth0 = &network.interfaces[0];
    assert_eq!(
        (eth0.name.as_str(), eth0.mac.as_str(), eth0.mtu),
        ("eth0", "02:00:00:00:00:07", 1400)
    );
    assert_eq!(eth0.addresses, ["10.9.0.5/24", "fd00::5/64"]);
    assert_eq!(network.nics()[0].tap, "tap0");
    let links: Vec<&str> = network
        .routes
        .iter()
        .filter(|r| r.gateway.is_empty())
        .map(|r| r.destination.as_str())
        .collect();
    assert!(links.contains(&"169.254.1.1/32"), "{links:?}");

    for device in ["eth0", "tap0"] {
        let filters = namespace.run(&format!("tc filter show dev {device} ingress"));
        assert!(
            filters.contains("mirred (Egress Redirect"),
            "{device}: {filters}"
        );
    }
    let tap = namespace.run("ip link show tap0");
    assert!(tap.contains("mtu 1400") && tap.contains("UP"), "{tap}");

    assert_eq!(attach(&namespace.path()).expect("again"), network);
    detach(&namespace.path()).expect("detach");
    assert!(!namespace.run("ip link").contains("tap0"));
    assert!(!namespace.run("tc qdisc show dev eth0").contains("ingress"));
    detach(&namespace.path()).expect("detach twice");
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn attach_empty_namespace_returns_no_interfaces() {
    let namespace = Namespace::new();
    assert_eq!(
        attach(&namespace.path()).expect("attach"),
        PodNetwork::default()
    );
}

#[test]
fn attach_invalid_namespace_names_the_path() {
    let error = attach(Path::new("/dev/null")).expect_err("not a namespace");
    assert!(error.to_string().contains("/dev/null"), "{error}");
    detach(Path::new("/nonexistent/netns")).expect("gone is fine");
}
