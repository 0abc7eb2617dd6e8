//! The streaming server: serves the URLs of Exec, Attach and PortForward.
//!
//! A CRI call is validated in `service/` and becomes a [`Ticket`], valid for one connection. The client (the kubelet,
//! crictl) connects to `http`, which upgrades to SPDY (`spdy`) or WebSocket (`websocket`); `remote` and `forward`
//! create sessions from the streams, and `process` connects them with the guest. This module uses neither CRI types
//! nor VMs, only `LiteBox`.
//!
//! ```text
//!  Exec ─▶ tokens ─▶ URL ─▶ client ─▶ http ─┬▶ spdy ─────┬▶ remote ─▶ process ─▶ LiteBox::exec_session
//!                                            └▶ websocket ┴▶ forward ────────────▶ LiteBox::port_forward
//! ```

mod forward;
mod http;
mod input;
mod outcome;
mod output;
mod process;
mod protocol;
mod remote;
mod sessions;
mod spdy;
mod tokens;
mod websocket;

pub(crate) use forward::Forward;
pub(crate) use http::serve;
pub(crate) use process::{Attach, Exec};
pub(crate) use protocol::RequestedStreams;
pub(crate) use tokens::TooManyPending;

use crate::config::StreamingConfig;
use sessions::Sessions;
use std::net::SocketAddr;
use std::sync::Arc;
use tokens::Tokens;

/// Request behind a one-time URL.
#[derive(Debug, Clone)]
pub(crate) enum Ticket {
    Exec(Exec),
    Attach(Attach),
    Forward(Forward),
}

impl Ticket {
    /// Returns the id of its pod sandbox.
    fn pod(&self) -> &str {
        match self {
            Self::Exec(exec) => exec.pod.id(),
            Self::Attach(attach) => attach.pod.id(),
            Self::Forward(forward) => forward.pod.id(),
        }
    }

    /// Returns the first segment of the URL's path.
    fn endpoint(&self) -> &'static str {
        match self {
            Self::Exec(_) => "exec",
            Self::Attach(_) => "attach",
            Self::Forward(_) => "portforward",
        }
    }
}

/// Issues URLs. Cheap to clone; clones share the tokens.
#[derive(Debug, Clone)]
pub(crate) struct Streaming(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    tokens: Tokens<Ticket>,
    sessions: Sessions,
    address: SocketAddr,
    limits: StreamingConfig,
}

impl Streaming {
    /// Creates the state of a server that listens on `address`.
    pub(crate) fn new(limits: StreamingConfig, address: SocketAddr) -> Self {
        Self(Arc::new(Inner {
            tokens: Tokens::default(),
            sessions: Sessions::default(),
            address,
            limits,
        }))
    }

    /// Returns the one-time URL of `ticket`.
    ///
    /// # Errors
    /// Too many sessions are pending.
    pub(crate) fn url(&self, ticket: Ticket) -> Result<String, TooManyPending> {
        let endpoint = ticket.endpoint();
        let token = self.0.tokens.issue(ticket)?;
        Ok(format!("http://{}/{endpoint}/{token}", self.0.address))
    }

    fn sessions(&self) -> &Sessions {
        &self.0.sessions
    }

    fn tokens(&self) -> &Tokens<Ticket> {
        &self.0.tokens
    }

    fn limits(&self) -> &StreamingConfig {
        &self.0.limits
    }
}
