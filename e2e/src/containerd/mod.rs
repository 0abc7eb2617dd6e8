//! `boxlite-e2e containerd`: the shim under a stock containerd, without boxlite-cri.
//!
//! Runs every version in this program's namespaces: [`daemon`] starts and kills it, [`tasks`], [`vm_options`],
//! [`events`] and [`logs`] use `ctr`, [`pods`] and [`traces`] use CRI, [`faults`] kills processes. A leak check follows every case.

mod daemon;
mod events;
mod faults;
mod host_pods;
mod logs;
mod passt;
mod pods;
pub(crate) mod stock;
mod tasks;
mod traces;
mod vm_options;

use crate::context::Backend;
use crate::failure::{During, Result};
use crate::image::archive;
use crate::image::build::Image;
use crate::image::busybox;
use crate::image::layer::{Compression, LayerTar};
use crate::install::Install;
use crate::leak::is_of_another_run;
use crate::runner::{self, TestEnv};
use crate::service::Service;
use crate::{ensure, poll};
pub(crate) use daemon::{Containerd, Options, Version};
use serde_json::json;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Name of the imported image.
const IMAGE: &str = "e2e.local/base:1";
/// Time for removals that complete after the answer.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Argument of every case.
pub(crate) struct ContainerdContext {
    backend: Backend,
    scratch: PathBuf,
    install: Install,
    archive: PathBuf,
    version: Version,
    /// Shared containerd. Cases that kill one start a dedicated one.
    shared: Containerd,
}

impl ContainerdContext {
    /// Scales a time limit; see [`Backend::patience`].
    fn patience(&self, seconds: u64) -> Duration {
        self.backend.patience(seconds)
    }

    /// Starts a dedicated containerd with the image imported.
    async fn dedicated_daemon(
        &self,
        name: &str,
        change: impl FnOnce(&mut Options),
    ) -> Result<Containerd> {
        let mut options = Options::new(name, self.version, self.backend.vmm());
        change(&mut options);
        let daemon = Containerd::start(&self.scratch, &self.install, options).await?;
        daemon.import(&self.archive).await?;
        Ok(daemon)
    }
}

type Context = Arc<ContainerdContext>;
type Case = runner::Case<ContainerdContext>;

/// Condition for skipping a case: an older version than `version`.
fn before(version: Version) -> impl Fn(&ContainerdContext) -> bool + Send + Sync + 'static {
    move |ctx| ctx.version < version
}

/// Runs the selected cases with every version. Returns true if all passed.
pub(crate) async fn run(suite: &crate::SuiteOptions, version: Option<Version>) -> Result<bool> {
    let versions = match version {
        Some(one) => vec![one],
        None => Version::DEFAULT.to_vec(),
    };
    let mut passed = true;
    for version in versions {
        passed &= run_version(suite, version).await?;
    }
    Ok(passed)
}

async fn run_version(suite: &crate::SuiteOptions, version: Version) -> Result<bool> {
    let backend = suite.backend;
    let scratch = crate::namespaces::scratch();
    let install = Install::find()?;
    let archive = archive(&install, &scratch)?;
    let options = Options::new(&format!("s{}", version.name()), version, backend.vmm());
    let shared = Containerd::start(&scratch, &install, options).await?;
    shared.import(&archive).await?;
    let ctx = Arc::new(ContainerdContext {
        backend,
        scratch,
        install,
        archive,
        version,
        shared,
    });
    let cases = [
        tasks::cases(),
        passt::cases(),
        vm_options::cases(),
        events::cases(),
        logs::cases(),
        pods::cases(),
        traces::cases(),
        faults::cases(),
        host_pods::cases(),
    ];
    let text = ctx.shared.version_text().await?;
    let title = format!("containerd-{text} {}", backend.vmm());
    let cases = cases.into_iter().flatten().collect();
    runner::run(&ctx, &suite.runner(&title), cases).await
}

impl TestEnv for ContainerdContext {
    type Before = BTreeSet<String>;

    fn backend(&self) -> Backend {
        self.backend
    }

    fn daemon(&self) -> &Service {
        self.shared.service()
    }

    fn before(&self) -> Result<BTreeSet<String>> {
        traces()
    }

    async fn after(&self, before: BTreeSet<String>, failed: bool) -> Result {
        if failed {
            // A failed case must not affect the next.
            self.shared.clear().await?;
        }
        poll::until(
            "all objects of the task are removed",
            SETTLE_TIMEOUT,
            || async {
                let more: Vec<_> = traces()?.difference(&before).cloned().collect();
                ensure!(more.is_empty(), "leaked:\n  {}", more.join("\n  "));
                Ok(())
            },
        )
        .await
    }
}

/// Returns everything a task could leave behind: processes, mounts, network namespaces, cgroups.
fn traces() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for name in [
        "containerd-shim-boxlite",
        "qemu-system",
        "virtiofsd",
        "vhost-device-vsock",
        "passt",
    ] {
        found.extend(
            crate::process::pids(&[name])?
                .into_iter()
                .map(|pid| format!("process {name} {pid}")),
        );
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points = boxlite_sys::mountinfo::mounts(&mounts).map(|mount| mount.point);
    found.extend(points.map(|point| format!("mount {}", point.display())));
    for (kind, dir) in [("netns", "/run/netns"), ("fifo", "/run/containerd/fifo")] {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        found.extend(entries.map(|entry| format!("{kind} {}", entry.path().display())));
    }
    let mut cgroups = Vec::new();
    below("/sys/fs/cgroup".as_ref(), 4, &mut cgroups);
    let cgroups = cgroups.iter().map(|path| path.display().to_string());
    let ours = |path: &String| path.contains("boxlite-") && !is_of_another_run(path);
    found.extend(cgroups.filter(ours).map(|path| format!("cgroup {path}")));
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

/// Writes the image for [`Containerd::import`], which is also the pause image of its pods.
pub(crate) fn archive(install: &Install, scratch: &Path) -> Result<PathBuf> {
    let archive = scratch.join("base.tar");
    archive::write(&image(install)?, IMAGE, &archive)?;
    Ok(archive)
}

/// Returns an image of busybox in one layer and a file in a second one.
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
