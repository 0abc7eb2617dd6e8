//! [`Pool`]: TCP sockets outside TSI, created before any container runs.
//!
//! With `tsi_hijack` (libkrunfw's kernel, patch 0010) every TCP socket created by a process is also a socket of the
//! host, so listening on a port in use there fails. The parameter can be changed at run time, but only for all
//! processes; therefore a fixed number of sockets is created while the agent is the only process. Each serves one
//! listener and is not reused.

use boxlite_sys::sync::Mutex;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, socket,
};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;

/// The kernel parameter, "Y" or "N".
const TSI_PARAMETER: &str = "/sys/module/kernel/parameters/tsi_hijack";
/// Address of the listeners. TSI tries the guest's own sockets first on a connect, so this is an address that no
/// client uses; a process that listens on all addresses still finds the port in use, as on the host.
const LISTEN_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 255, 255, 254);
/// Number of sockets, about 2 MiB of the guest's memory; limits the host ports that can be listed during the life of
/// a pod.
const POOL_SOCKETS: usize = 512;

/// Sockets that have not been used.
pub(crate) struct Pool(Mutex<Vec<OwnedFd>>);

static POOL: OnceLock<Pool> = OnceLock::new();

/// Returns the VM's pool, created by the first call; the host makes it after boot, before containers run. If the
/// kernel does not allow it, the pool is empty and a warning is logged: the pod works without seeing the ports.
pub(crate) fn pool() -> &'static Pool {
    POOL.get_or_init(|| {
        let made = make().inspect_err(|error| {
            tracing::warn!(%error, "failed to create sockets outside TSI; host ports are not listed");
        });
        Pool(Mutex::new(made.unwrap_or_default()))
    })
}

fn make() -> io::Result<Vec<OwnedFd>> {
    let before = std::fs::read_to_string(TSI_PARAMETER)?;
    std::fs::write(TSI_PARAMETER, "N")?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let made: nix::Result<Vec<_>> = (0..POOL_SOCKETS)
        .map(|_| socket(AddressFamily::Inet, SockType::Stream, flags, None))
        .collect();
    std::fs::write(TSI_PARAMETER, before.trim())?;
    Ok(made?)
}

impl Pool {
    /// Returns a listener on the port that receives no connections.
    ///
    /// # Errors
    /// AddrInUse if the pod uses the port; other errors if all sockets are used up.
    pub(crate) fn listen(&self, port: u16) -> io::Result<TcpListener> {
        let taken = self.0.lock().pop();
        let socket = taken.ok_or_else(|| io::Error::other("all sockets are used up"))?;
        let address = SockaddrIn::from(SocketAddrV4::new(LISTEN_ADDRESS, port));
        if let Err(error) = bind(socket.as_raw_fd(), &address) {
            // A socket that was not bound can be reused.
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
    fn listen_keeps_the_socket_if_bind_fails() {
        let pool = stock(2);
        let first = pool.listen(0).unwrap();
        let port = first.local_addr().unwrap().port();
        assert_eq!(first.local_addr().unwrap().ip(), LISTEN_ADDRESS);
        let again = pool.listen(port).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
        assert!(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_err());
        assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok());
        assert!(pool.listen(0).is_ok());
        assert!(pool.listen(0).is_err(), "there were two");
    }
}
