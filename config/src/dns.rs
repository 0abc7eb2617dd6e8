//! resolv.conf of a pod.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Resolver configuration of the node.
const NODE_RESOLV_CONF: &str = "/etc/resolv.conf";
/// Most bytes copied of a file of the node.
const MAX_NODE_FILE_BYTES: u64 = 1 << 20;

/// Renders a resolv.conf; `None` if there is nothing to render, and the pod takes the node's.
pub fn resolv_conf(servers: &[String], searches: &[String], options: &[String]) -> Option<String> {
    let mut text = String::new();
    if !searches.is_empty() {
        text.push_str(&format!("search {}\n", searches.join(" ")));
    }
    for server in servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !options.is_empty() {
        text.push_str(&format!("options {}\n", options.join(" ")));
    }
    (!text.is_empty()).then_some(text)
}

/// Returns the node's own resolv.conf.
pub fn node_resolv_conf() -> io::Result<Vec<u8>> {
    node_file(Path::new(NODE_RESOLV_CONF))
}

/// Returns the content of a file of the node, at most 1 MiB; empty if it does not exist.
pub fn node_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    match File::open(path) {
        Ok(file) => {
            file.take(MAX_NODE_FILE_BYTES).read_to_end(&mut text)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_has_search_servers_options_in_order() {
        let list = |names: &[&str]| names.iter().map(|&name| name.into()).collect::<Vec<_>>();
        let text = resolv_conf(
            &list(&["10.0.0.10", "fd00::a"]),
            &list(&["svc.local", "local"]),
            &list(&["ndots:5"]),
        );
        assert_eq!(
            text.as_deref(),
            Some(
                "search svc.local local\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n"
            )
        );
        assert_eq!(resolv_conf(&[], &[], &[]), None);
    }

    #[test]
    fn node_file_is_bounded_and_may_be_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        assert_eq!(node_file(&path).unwrap(), b"");
        File::create(&path)
            .and_then(|file| file.set_len(MAX_NODE_FILE_BYTES + 9))
            .unwrap();
        assert_eq!(node_file(&path).unwrap().len() as u64, MAX_NODE_FILE_BYTES);
    }
}
