//! The streaming server: where the URLs of Exec, Attach and PortForward lead.
//!
//! A call of the CRI is checked in `service/` and becomes a [`Ticket`] here, good for one connection. The client (the
//! kubelet, crictl) then connects to `http`, which upgrades to SPDY (`spdy`) or WebSocket (`websocket`); `remote` and
//! `forward` make sessions of their streams, `process` joins them with the guest. CRI forwards_stdin stay out of this folder, and so do VMs: it calls `LiteBox`.
//!
//! ```text
//!  Exec ─▶ tokens ─▶ URL ─▶ client ─▶ http ─┬▶ spdy ─────┬▶ remote ─▶ process ─▶ LiteBox::exec_session
//!                                            └▶ websocket ┴▶ forward ────────────▶ LiteBox::port_forward
//! ```

mod forward;
mod http;
mod outcome;
mod pipe;
mod process;
mod remote;
mod spdy;
mod tokens;
mod websocket;

pub use forward::Forward;
pub use http::serve;
pub use process::{Attach, Exec};
pub use remote::RequestedStreams;
pub use tokens::TooManyPending;

use crate::config::StreamingConfig;
use std::net::SocketAddr;
use std::sync::Arc;
use tokens::Tokens;

/// What a call allowed its client.
#[derive(Debug, Clone)]
pub enum Ticket {
    Exec(Exec),
    Attach(Attach),
    Forward(Forward),
}

impl Ticket {
    /// First part of its URL's path.
    fn verb(&self) -> &'static str {
        match self {
            Self::Exec(_) => "exec",
            Self::Attach(_) => "attach",
            Self::Forward(_) => "portforward",
        }
    }
}

/// Issues URLs. Cheap to clone; clones share the tokens.
#[derive(Debug, Clone)]
pub struct Streaming(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    tokens: Tokens<Ticket>,
    address: SocketAddr,
    limits: StreamingConfig,
}

impl Streaming {
    /// For a server that listens on `address`.
    pub fn new(limits: StreamingConfig, address: SocketAddr) -> Self {
        Self(Arc::new(Inner {
            tokens: Tokens::default(),
            address,
            limits,
        }))
    }

    /// The URL under which a client may use `ticket` once.
    ///
    /// # Errors
    /// Too many wait for their clients.
    pub fn url(&self, ticket: Ticket) -> Result<String, TooManyPending> {
        let verb = ticket.verb();
        let token = self.0.tokens.issue(ticket)?;
        Ok(format!("http://{}/{verb}/{token}", self.0.address))
    }

    fn tokens(&self) -> &Tokens<Ticket> {
        &self.0.tokens
    }

    fn limits(&self) -> &StreamingConfig {
        &self.0.limits
    }
}
