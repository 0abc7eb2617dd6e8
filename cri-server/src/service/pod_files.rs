//! Files that are mounted into every container of a pod: resolv.conf, hostname, hosts.

use crate::convert::sandbox::PodMetadata;
use crate::layout::{HOSTNAME, HOSTS, Layout, RESOLV_CONF};
use boxlite_config::dns;
use boxlite_runtime::failpoint;
use std::collections::HashSet;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Source of the hosts file for a pod with host networking.
const NODE_HOSTS: &str = "/etc/hosts";

/// Writes the files. The directory is private; the files are readable by any user of a container.
pub(crate) fn write(layout: &Layout, id: &str, record: &PodMetadata) -> io::Result<()> {
    let directory = layout.pod(id);
    failpoint::hit("pod.files")?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&directory)?;
    let resolv = match record.resolv_conf() {
        Some(text) => Some(text.into_bytes()),
        // The agent has one by DHCP.
        None if record.passt => None,
        None => Some(dns::node_resolv_conf()?),
    };
    if let Some(resolv) = resolv {
        file(&directory.join(RESOLV_CONF), &resolv)?;
    }
    file(
        &directory.join(HOSTNAME),
        format!("{}\n", record.hostname()).as_bytes(),
    )?;
    let hosts = match record.host_network() {
        true => dns::node_file(Path::new(NODE_HOSTS))?,
        false => record.hosts().into_bytes(),
    };
    file(&directory.join(HOSTS), &hosts)?;
    Ok(failpoint::hit("pod.written")?)
}

/// Removes the files; succeeds if they do not exist.
pub(crate) fn remove(layout: &Layout, id: &str) -> io::Result<()> {
    failpoint::hit("pod.unwrite")?;
    match fs::remove_dir_all(layout.pod(id)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes the files of pods that are not in `live`. Returns the number of pods.
pub(crate) fn collect(layout: &Layout, live: &HashSet<String>) -> usize {
    let Ok(entries) = fs::read_dir(layout.pods()) else {
        return 0;
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|id| !live.contains(id) && remove(layout, id).is_ok())
        .count()
}

fn file(path: &Path, content: &[u8]) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .open(path)?
        .write_all(content)
}
