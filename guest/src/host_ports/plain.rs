//! [`Pool`]: TCP sockets that TSI has no part in, made before any container runs.
//!
//! With `tsi_hijack` (libkrunfw's kernel, patch 0010) every TCP socket that a process makes is the host's as well, so listening
//! on a port that somebody has there fails. The parameter can be changed while the kernel runs, but for all processes: hence a
//! stock of sockets made once, when the VM has none but the agent. A socket serves one listener and is not used again.

use boxlite_sys::sync::Mutex;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, socket,
};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;

/// The kernel's switch, "Y" or "N".
const SWITCH: &str = "/sys/module/kernel/parameters/tsi_hijack";
/// Where the listeners stand. TSI tries the guest's own sockets first when a process connects, so this is an address that
/// nobody means; whoever listens on all addresses still finds the port taken, as on the host.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 255, 255, 254);
/// Sockets of the stock, about 2 MiB of the guest's memory: ports of the host that can be shown during the life of a pod.
const STOCK: usize = 512;

/// See the module.
pub struct Pool(Mutex<Vec<OwnedFd>>);

static POOL: OnceLock<Pool> = OnceLock::new();

/// The VM's pool, made at the first call: that is before containers run, since the host calls when the VM has booted. Empty,
/// with words in the log, where the kernel does not give it: a pod does not fail for what it cannot see.
pub fn pool() -> &'static Pool {
    POOL.get_or_init(|| {
        let made = make().inspect_err(|error| {
            tracing::warn!(%error, "no sockets beside TSI: the host's ports are not shown");
        });
        Pool(Mutex::new(made.unwrap_or_default()))
    })
}

fn make() -> io::Result<Vec<OwnedFd>> {
    let before = std::fs::read_to_string(SWITCH)?;
    std::fs::write(SWITCH, "N")?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let made: nix::Result<Vec<_>> = (0..STOCK)
        .map(|_| socket(AddressFamily::Inet, SockType::Stream, flags, None))
        .collect();
    std::fs::write(SWITCH, before.trim())?;
    Ok(made?)
}

impl Pool {
    /// A listener on the port that nobody's connection reaches.
    ///
    /// # Errors
    /// AddrInUse: the pod has the port. Other: all sockets are used up.
    pub fn listen(&self, port: u16) -> io::Result<TcpListener> {
        let taken = self.0.lock().pop();
        let socket = taken.ok_or_else(|| io::Error::other("all sockets are used up"))?;
        let address = SockaddrIn::from(SocketAddrV4::new(ADDRESS, port));
        if let Err(error) = bind(socket.as_raw_fd(), &address) {
            // A socket that is not bound can be used again.
            let mut free = self.0.lock();
            free.push(socket);
            return Err(error.into());
        }
        listen(&socket, Backlog::new(1)?)?;
        Ok(TcpListener::from(socket))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stock(count: usize) -> Pool {
        let one = |_| {
            let flags = SockFlag::SOCK_CLOEXEC;
            socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap()
        };
        Pool(Mutex::new((0..count).map(one).collect()))
    }

    #[test]
    fn a_port_is_taken_and_a_socket_that_was_refused_is_kept() {
        let pool = stock(2);
        let first = pool.listen(0).unwrap();
        let port = first.local_addr().unwrap().port();
        assert_eq!(first.local_addr().unwrap().ip(), ADDRESS);
        let again = pool.listen(port).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
        assert!(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_err());
        assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok());
        assert!(pool.listen(0).is_ok());
        assert!(pool.listen(0).is_err(), "there were two");
    }
}
