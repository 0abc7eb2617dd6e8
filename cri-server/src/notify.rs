//! systemd's readiness protocol, sd_notify(3): datagrams to the socket named by NOTIFY_SOCKET.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Environment variable with the socket's address.
const SOCKET_VARIABLE: &str = "NOTIFY_SOCKET";

/// Reports that the daemon serves; `status` appears in `systemctl status`.
pub(crate) fn ready(status: &str) {
    let status = status.replace('\n', " ");
    send(&format!("READY=1\nSTATUS={status}\n"));
}

/// Reports that the daemon is shutting down.
pub(crate) fn stopping() {
    send("STOPPING=1\nSTATUS=draining calls\n");
}

/// Sends to the service manager, if there is one. A manager that does not listen must not stop the daemon.
fn send(message: &str) {
    let Some(address) = std::env::var_os(SOCKET_VARIABLE).filter(|name| !name.is_empty()) else {
        return;
    };
    if let Err(error) = send_to(&address, message) {
        tracing::warn!(?address, %error, "failed to notify systemd");
    }
}

/// `address` is a path, or `@name` for the abstract namespace.
fn send_to(address: &OsStr, message: &str) -> io::Result<()> {
    let bytes = address.as_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(OsStr::from_bytes(bytes))?,
    };
    UnixDatagram::unbound()?
        .send_to_addr(message.as_bytes(), &address)
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        let count = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..count]).into_owned()
    }

    #[test]
    fn send_reaches_path_and_abstract_sockets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        send_to(path.as_os_str(), "READY=1\n").unwrap();
        assert_eq!(receive(&socket), "READY=1\n");

        let name = format!("boxlite-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        send_to(OsStr::new(&format!("@{name}")), "STOPPING=1\n").unwrap();
        assert_eq!(receive(&socket), "STOPPING=1\n");
    }

    #[test]
    fn send_to_missing_socket_fails() {
        assert!(send_to(OsStr::new("/nonexistent/notify"), "READY=1\n").is_err());
    }
}
