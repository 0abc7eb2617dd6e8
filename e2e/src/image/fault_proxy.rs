//! [`FaultProxy`]: a proxy in front of the registry that injects faults: cuts connections, truncates, corrupts, requires
//! credentials, hangs. It also counts requests.
//!
//! HTTP/1.1 with one request per connection, so that a fault occurs at an exact byte. It connects only to the registry.

use crate::bail;
use crate::failure::{During, Result};
use boxlite_sys::sync::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Fault for requests whose path contains a given text.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// The body ends after `after` bytes and the connection closes, for the first `times` requests.
    Cut { after: usize, times: usize },
    /// The last byte of the body is changed.
    Corrupt,
    /// Responds with this status and no body.
    Status(u16),
    /// Never responds; the connection remains open.
    Hang,
}

/// Required authentication.
#[derive(Debug, Clone)]
pub(crate) enum Auth {
    /// None.
    Open,
    /// HTTP Basic with this Base64 of `user:password`.
    Basic(String),
    /// A bearer token from this server's `/token`, which requires HTTP Basic with this Base64 of `user:password`, or
    /// nothing if empty.
    Bearer(String),
}

/// Token issued for [`Auth::Bearer`].
const TOKEN: &str = "e2e-token-of-the-proxy";
/// Maximum size of a request or response head in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;

struct Rules {
    upstream: String,
    host: String,
    guard: Auth,
    faults: Vec<(String, Fault)>,
    seen: BTreeMap<String, usize>,
}

/// A listening proxy; stops when dropped.
pub(crate) struct FaultProxy {
    /// `127.0.0.1:<port>`.
    pub host: String,
    rules: Arc<Mutex<Rules>>,
    task: JoinHandle<()>,
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FaultProxy {
    /// Listens on a free port in front of `upstream` (`host:port`, plain HTTP).
    pub(crate) async fn start(
        upstream: &str,
        guard: Auth,
        faults: Vec<(&str, Fault)>,
    ) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let host = listener.local_addr()?.to_string();
        let rules = Arc::new(Mutex::new(Rules {
            upstream: upstream.to_owned(),
            host: host.clone(),
            guard,
            faults: faults
                .into_iter()
                .map(|(path, fault)| (path.to_owned(), fault))
                .collect(),
            seen: BTreeMap::new(),
        }));
        let shared = rules.clone();
        let task = tokio::spawn(async move {
            // Dropped with the task, which closes every connection.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let rules = shared.clone();
                connections.spawn(async move { drop(serve(stream, rules).await) });
            }
        });
        Ok(Self { host, rules, task })
    }

    /// Returns the number of GET requests that reached the registry and whose path contains `part`.
    pub(crate) fn count(&self, part: &str) -> usize {
        let rules = self.rules.lock();
        rules
            .seen
            .iter()
            .filter(|(path, _)| path.contains(part))
            .map(|(_, n)| n)
            .sum()
    }

    /// Replaces the faults.
    pub(crate) fn set_faults(&self, faults: Vec<(&str, Fault)>) {
        let mut rules = self.rules.lock();
        rules.faults = faults
            .into_iter()
            .map(|(path, fault)| (path.to_owned(), fault))
            .collect();
    }
}

/// Decision of [`Rules::judge`].
enum Verdict {
    Answer(String),
    Hang,
    Pass(Option<Fault>),
}

impl Rules {
    fn judge(&mut self, method: &str, path: &str, head: &str) -> Verdict {
        let authorization = head
            .lines()
            .find_map(|l| {
                l.split_once(':')
                    .filter(|(k, _)| k.eq_ignore_ascii_case("authorization"))
            })
            .map(|(_, v)| v.trim().to_owned())
            .unwrap_or_default();
        match &self.guard {
            Auth::Open => {}
            Auth::Basic(secret) if authorization == format!("Basic {secret}") => {}
            Auth::Basic(_) => {
                return Verdict::Answer(unauthorized("Basic realm=\"e2e\""));
            }
            Auth::Bearer(secret) if path.starts_with("/token") => {
                if secret.is_empty() || authorization == format!("Basic {secret}") {
                    return Verdict::Answer(answer(
                        200,
                        "",
                        &format!("{{\"token\":\"{TOKEN}\",\"expires_in\":300}}"),
                    ));
                }
                return Verdict::Answer(answer(401, "", "{}"));
            }
            Auth::Bearer(_) if authorization == format!("Bearer {TOKEN}") => {}
            Auth::Bearer(_) => {
                let realm = format!(
                    "Bearer realm=\"http://{}/token\",service=\"e2e\"",
                    self.host
                );
                return Verdict::Answer(unauthorized(&realm));
            }
        }
        let spent = |fault: &Fault| matches!(fault, Fault::Cut { times: 0, .. });
        let fault = self
            .faults
            .iter_mut()
            .find(|(part, fault)| path.contains(part.as_str()) && !spent(fault));
        let fault = match fault {
            Some((_, Fault::Status(code))) => return Verdict::Answer(answer(*code, "", "")),
            Some((_, Fault::Hang)) => return Verdict::Hang,
            Some((_, Fault::Cut { after, times })) if method == "GET" => {
                *times -= 1;
                Some(Fault::Cut {
                    after: *after,
                    times: 0,
                })
            }
            Some((_, Fault::Corrupt)) if method == "GET" => Some(Fault::Corrupt),
            _ => None,
        };
        if method == "GET" {
            *self.seen.entry(path.to_owned()).or_default() += 1;
        }
        Verdict::Pass(fault)
    }
}

fn unauthorized(challenge: &str) -> String {
    answer(401, &format!("www-authenticate: {challenge}\r\n"), "{}")
}

fn answer(code: u16, headers: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {code} Fault\r\n{headers}content-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// Reads up to the empty line. Returns the head and the bytes after it.
async fn head(stream: &mut TcpStream) -> Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            return Ok((String::from_utf8_lossy(&bytes).into_owned(), rest));
        }
        if bytes.len() > MAX_HEAD_BYTES || stream.read_buf(&mut bytes).await? == 0 {
            bail!("incomplete request head");
        }
    }
}

async fn serve(mut client: TcpStream, rules: Arc<Mutex<Rules>>) -> Result {
    let (request, _) = head(&mut client).await?;
    let mut words = request.split_whitespace();
    let (method, path) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let (verdict, upstream) = {
        let mut rules = rules.lock();
        (rules.judge(method, path, &request), rules.upstream.clone())
    };
    let fault = match verdict {
        Verdict::Answer(text) => {
            client.write_all(text.as_bytes()).await?;
            return Ok(client.shutdown().await?);
        }
        Verdict::Hang => {
            // Waits until the client disconnects.
            let mut sink = [0; 64];
            while client.read(&mut sink).await? > 0 {}
            return Ok(());
        }
        Verdict::Pass(fault) => fault,
    };
    let mut server = TcpStream::connect(&upstream).await.during(&upstream)?;
    let kept: Vec<_> = request
        .trim_end()
        .lines()
        .filter(|l| {
            let name = l.split(':').next().unwrap_or_default();
            !name.eq_ignore_ascii_case("connection") && !name.eq_ignore_ascii_case("authorization")
        })
        .collect();
    server
        .write_all(format!("{}\r\nconnection: close\r\n\r\n", kept.join("\r\n")).as_bytes())
        .await?;
    let (response, mut body) = head(&mut server).await?;
    client.write_all(response.as_bytes()).await?;
    match fault {
        None => {
            client.write_all(&body).await?;
            tokio::io::copy(&mut server, &mut client).await?;
        }
        Some(Fault::Cut { after, .. }) => {
            while body.len() < after && server.read_buf(&mut body).await? > 0 {}
            body.truncate(after);
            client.write_all(&body).await?;
        }
        Some(_) => {
            server.read_to_end(&mut body).await?;
            if let Some(last) = body.last_mut() {
                *last ^= 0x55;
            }
            client.write_all(&body).await?;
        }
    }
    client.shutdown().await?;
    Ok(())
}
