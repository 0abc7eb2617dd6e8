//! DHCP client for a NIC that passt serves: one exchange when the pod is initialized.
//!
//! A lease is not renewed: it belongs to the pod as long as its passt runs, which ends with the VM. Answers are parsed as
//! untrusted ([`message`]). Sockets are ordinary ones, because passt answers by broadcast.
//!
//! Flow: `network` sets the NIC up → [`lease`] → `network` sets address, MTU and route.

mod message;

pub(crate) use message::Lease;

use message::{Answer, Exchange};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;
use tokio::net::UdpSocket;

const CLIENT_PORT: u16 = 68;
const SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::BROADCAST, 67);
/// Maximum size of an answer in bytes.
const MAX_ANSWER_BYTES: usize = 1500;
/// Time to wait for an answer before the message is sent again. passt answers at once; a busy host may take longer.
const RETRY_TIMEOUTS: [Duration; 6] = [
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
];

/// An error in getting an address.
#[derive(Debug, thiserror::Error)]
pub enum DhcpError {
    /// A system call failed.
    #[error("failed to {step} for DHCP on {interface}")]
    Socket {
        step: &'static str,
        interface: String,
        #[source]
        source: io::Error,
    },
    /// No usable answer came.
    #[error(
        "DHCP {message} on {interface} is not answered: passt has ended, or the node has no IPv4 route"
    )]
    NoAnswer {
        message: &'static str,
        interface: String,
    },
    /// The server refused its own offer.
    #[error("DHCP server refused the address that it offered on {interface}")]
    Refused { interface: String },
}

/// Gets a lease on `interface`, which is up and has the address `mac`.
pub(crate) async fn lease(interface: &str, mac: [u8; 6]) -> Result<Lease, DhcpError> {
    let failed = |step| {
        move |source| DhcpError::Socket {
            step,
            interface: interface.to_owned(),
            source,
        }
    };
    let mut xid = [0; 4];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| io::Read::read_exact(&mut file, &mut xid))
        .map_err(failed("read random bytes"))?;
    let exchange = Exchange { xid, mac };
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, CLIENT_PORT)).await;
    let socket = socket.map_err(failed("bind a socket"))?;
    // Without an address and a route, the device decides.
    socket
        .bind_device(Some(interface.as_bytes()))
        .map_err(failed("bind a socket to the device"))?;
    socket
        .set_broadcast(true)
        .map_err(failed("allow broadcasts"))?;

    let no_answer = |message| DhcpError::NoAnswer {
        message,
        interface: interface.to_owned(),
    };
    let refused = || DhcpError::Refused {
        interface: interface.to_owned(),
    };
    let exchanged = ask(&socket, &exchange, None).await;
    let offered = match exchanged.map_err(failed("exchange messages"))? {
        Some(Answer::Offer(lease)) => lease,
        Some(Answer::Nak) => return Err(refused()),
        Some(Answer::Ack(_)) | None => return Err(no_answer("DISCOVER")),
    };
    let exchanged = ask(&socket, &exchange, Some(&offered)).await;
    match exchanged.map_err(failed("exchange messages"))? {
        Some(Answer::Ack(lease)) => Ok(lease),
        Some(Answer::Nak) => Err(refused()),
        Some(Answer::Offer(_)) | None => Err(no_answer("REQUEST")),
    }
}

/// Sends a message until it is answered. Returns None after the last timeout.
async fn ask(
    socket: &UdpSocket,
    exchange: &Exchange,
    offered: Option<&Lease>,
) -> io::Result<Option<Answer>> {
    let message = exchange.message(offered);
    for timeout in RETRY_TIMEOUTS {
        socket.send_to(&message, SERVER).await?;
        let answered = receive(socket, exchange, offered.is_some());
        if let Ok(answer) = tokio::time::timeout(timeout, answered).await {
            return answer.map(Some);
        }
    }
    Ok(None)
}

/// Waits for the answer to a DISCOVER, or to a REQUEST: a late offer is ignored.
async fn receive(socket: &UdpSocket, exchange: &Exchange, requested: bool) -> io::Result<Answer> {
    let mut bytes = [0; MAX_ANSWER_BYTES];
    loop {
        let length = socket.recv(&mut bytes).await?;
        match exchange.answer(&bytes[..length]) {
            Some(Answer::Offer(_)) if requested => {}
            Some(Answer::Ack(_)) if !requested => {}
            Some(answer) => return Ok(answer),
            None => {}
        }
    }
}
