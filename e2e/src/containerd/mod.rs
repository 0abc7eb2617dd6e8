//! `boxlite-e2e containerd`: the shim under a stock containerd, with no boxlite-cri anywhere.
//!
//! Each version is run on its own, in this program's namespaces: [`daemon`] starts and kills it, [`tasks`], [`choice`],
//! [`events`] and [`logs`] drive it by `ctr`, [`pods`] by CRI, [`faults`] kills what can be killed. Behind every case stands a look for what was left.

mod choice;
mod daemon;
mod events;
mod faults;
mod logs;
mod pods;
mod tasks;

use crate::image::archive;
use crate::image::build::Image;
use crate::image::busybox;
use crate::image::layer::{Compression, LayerTar};
use crate::install::Install;
use crate::outcome::{During, Result};
use crate::runner::{self, Surroundings};
use crate::service::Service;
use crate::world::Home;
use crate::{ensure, wait};
pub use daemon::{Containerd, Options, Version};
use serde_json::json;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Name under which the image is imported.
const IMAGE: &str = "e2e.local/base:1";
/// What is removed may be gone a moment after the answer.
const SETTLE: Duration = Duration::from_secs(10);

/// What a case is given.
pub struct Lab {
    home: Home,
    scratch: PathBuf,
    install: Install,
    archive: PathBuf,
    version: Version,
    /// The containerd that cases share; those that kill one start their own.
    shared: Containerd,
}

impl Lab {
    /// See [`Home::patience`].
    fn patience(&self, seconds: u64) -> Duration {
        self.home.patience(seconds)
    }

    /// A containerd of its own, with the image imported.
    async fn own(&self, name: &str, change: impl FnOnce(&mut Options)) -> Result<Containerd> {
        let mut options = Options::new(name, self.version, self.home.vmm());
        change(&mut options);
        let daemon = Containerd::start(&self.scratch, &self.install, options).await?;
        daemon.import(&self.archive).await?;
        Ok(daemon)
    }
}

type Shared = Arc<Lab>;
type Case = runner::Case<Lab>;

/// A condition of cases: an older version than this one.
fn before(version: Version) -> impl Fn(&Lab) -> bool + Send + Sync + 'static {
    move |lab| lab.version < version
}

/// Runs all cases whose name contains `filter` with every version; whether all passed.
pub async fn run(home: Home, version: Option<Version>, filter: &str) -> Result<bool> {
    let versions = match version {
        Some(one) => vec![one],
        None => Version::USUAL.to_vec(),
    };
    let mut good = true;
    for version in versions {
        good &= run_version(home, version, filter).await?;
    }
    Ok(good)
}

async fn run_version(home: Home, version: Version, filter: &str) -> Result<bool> {
    let scratch = crate::enclave::scratch();
    let install = Install::find()?;
    let archive = archive(&install, &scratch)?;
    let options = Options::new(&format!("s{}", version.name()), version, home.vmm());
    let shared = Containerd::start(&scratch, &install, options).await?;
    shared.import(&archive).await?;
    let lab = Arc::new(Lab {
        home,
        scratch,
        install,
        archive,
        version,
        shared,
    });
    let cases = [
        tasks::cases(),
        choice::cases(),
        events::cases(),
        logs::cases(),
        pods::cases(),
        faults::cases(),
    ];
    let text = lab.shared.version_text().await?;
    let title = format!("containerd-{text} {}", home.vmm());
    runner::run(&lab, &title, filter, cases.into_iter().flatten().collect()).await
}

impl Surroundings for Lab {
    type Before = BTreeSet<String>;

    fn home(&self) -> Home {
        self.home
    }

    fn daemon(&self) -> &Service {
        self.shared.service()
    }

    fn before(&self) -> Result<BTreeSet<String>> {
        traces()
    }

    async fn after(&self, before: BTreeSet<String>, failed: bool) -> Result {
        if failed {
            // A failed case must not fail the next.
            self.shared.clear().await?;
        }
        wait::until("everything a task had is gone", SETTLE, || async {
            let more: Vec<_> = traces()?.difference(&before).cloned().collect();
            ensure!(more.is_empty(), "left behind:\n  {}", more.join("\n  "));
            Ok(())
        })
        .await
    }
}

/// What a task could leave: processes, mounts, network namespaces, cgroups.
fn traces() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for name in [
        "containerd-shim-boxlite",
        "qemu-system",
        "virtiofsd",
        "vhost-device-vsock",
    ] {
        found.extend(
            crate::process::pids(&[name])?
                .into_iter()
                .map(|pid| format!("process {name} {pid}")),
        );
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    found.extend(points.map(|point| format!("mount {point}")));
    for (kind, dir) in [("netns", "/run/netns"), ("fifo", "/run/containerd/fifo")] {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        found.extend(entries.map(|entry| format!("{kind} {}", entry.path().display())));
    }
    let mut cgroups = Vec::new();
    below("/sys/fs/cgroup".as_ref(), 4, &mut cgroups);
    let ours = |path: &&PathBuf| path.display().to_string().contains("boxlite-");
    found.extend(
        cgroups
            .iter()
            .filter(ours)
            .map(|path| format!("cgroup {}", path.display())),
    );
    Ok(found)
}

fn below(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(entry.path());
            if depth > 1 {
                below(&entry.path(), depth - 1, found);
            }
        }
    }
}

/// Writes the image that [`Containerd::import`] takes; its pods' pause containers are of it, too.
pub fn archive(install: &Install, scratch: &Path) -> Result<PathBuf> {
    let archive = scratch.join("base.tar");
    archive::write(&image(install)?, IMAGE, &archive)?;
    Ok(archive)
}

/// Busybox in one layer, a file in a second one.
fn image(install: &Install) -> Result<Image> {
    let mut second = LayerTar::default();
    second
        .dir("opt", 0o755)?
        .file("opt/second", 0o644, b"from the second layer\n")?;
    let layers = vec![
        busybox::layer(&install.busybox, Compression::Gzip).during("busybox")?,
        second.finish(Compression::Plain)?,
    ];
    Ok(Image::new(
        layers,
        json!({"Cmd": ["sh"], "Env": ["PATH=/bin:/usr/bin"]}),
    ))
}
