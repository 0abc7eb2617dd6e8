//! `boxlite-e2e containerd`: the shim under a stock containerd, with no boxlite-cri anywhere.
//!
//! Each version is run on its own, in this program's namespaces: [`daemon`] starts and kills it, [`tasks`] drives it by
//! `ctr`, [`pods`] by CRI, [`faults`] kills what can be killed. Behind every case stands a look for what was left.

mod daemon;
mod faults;
mod logs;
mod pods;
mod tasks;

use crate::image::archive;
use crate::image::build::Image;
use crate::image::busybox;
use crate::image::layer::{Compression, LayerTar};
use crate::install::Install;
use crate::outcome::{During, Failure, Result};
use crate::world::Home;
use crate::{ensure, wait};
use daemon::{Containerd, Options, Version};
use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

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
    /// A time limit that is fair in this home.
    fn patience(&self, seconds: u64) -> Duration {
        Duration::from_secs(match self.home {
            Home::Qemu => seconds,
            Home::Krun => seconds * 5,
        })
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
type Run = Box<dyn Fn(Shared) -> BoxFuture<'static, Result> + Send + Sync>;

/// A named test of one or of both versions.
pub struct Case {
    name: &'static str,
    seconds: u64,
    only: Option<(Version, &'static str)>,
    run: Run,
}

/// A case that takes at most so many seconds on QEMU.
fn case<F, Fut>(name: &'static str, seconds: u64, run: F) -> Case
where
    F: Fn(Shared) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result> + Send + 'static,
{
    Case {
        name,
        seconds,
        only: None,
        run: Box::new(move |lab| run(lab).boxed()),
    }
}

impl Case {
    /// Runs with this version only.
    fn only(mut self, version: Version, reason: &'static str) -> Self {
        self.only = Some((version, reason));
        self
    }
}

/// Runs all cases whose name contains `filter` with every version; whether all passed.
pub async fn run(home: Home, version: Option<Version>, filter: &str) -> Result<bool> {
    let versions = match version {
        Some(one) => vec![one],
        None => vec![Version::V1, Version::V2],
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
    let archive = scratch.join("base.tar");
    archive::write(&image(&install)?, IMAGE, &archive)?;
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
    let begun = Instant::now();
    let (mut passed, mut failed, mut skipped) = (0, Vec::new(), 0);
    let cases = [
        tasks::cases(),
        logs::cases(),
        pods::cases(),
        faults::cases(),
    ];
    for case in cases
        .into_iter()
        .flatten()
        .filter(|c| c.name.contains(filter))
    {
        if let Some((_, reason)) = case.only.filter(|(only, _)| *only != version) {
            println!("not with {}: {}: {reason}", version.name(), case.name);
            skipped += 1;
            continue;
        }
        let start = Instant::now();
        let outcome = one(&lab, &case).await;
        let took = start.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => {
                passed += 1;
                println!("ok    {:<52} {took:>6.1} s", case.name);
            }
            Err(failure) => {
                println!(
                    "FAIL  {:<52} {took:>6.1} s\n      {}",
                    case.name,
                    indent(&failure.0)
                );
                println!(
                    "      --- containerd's log\n      {}",
                    indent(&lab.shared.log_tail(12))
                );
                failed.push(case.name);
            }
        }
    }
    if !failed.is_empty() {
        println!("failed: {}", failed.join(", "));
    }
    println!(
        "e2e containerd-{} {}: {passed} passed, {} failed, {skipped} skipped in {:.0} s",
        lab.shared.version_text().await?,
        home.vmm(),
        failed.len(),
        begun.elapsed().as_secs_f64()
    );
    Ok(failed.is_empty() && passed > 0)
}

async fn one(lab: &Shared, case: &Case) -> Result {
    let before = traces()?;
    let limit = lab.patience(case.seconds);
    let mut task = tokio::spawn((case.run)(lab.clone()));
    let outcome = match tokio::time::timeout(limit, &mut task).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(panic)) => Err(Failure(format!("panicked: {panic}"))),
        Err(_) => {
            task.abort();
            Err(Failure(format!("not done within {} s", limit.as_secs())))
        }
    };
    if outcome.is_err() {
        // A failed case must not fail the next.
        lab.shared.clear().await?;
    }
    let left = wait::until("everything a task had is gone", SETTLE, || async {
        let more: Vec<_> = traces()?.difference(&before).cloned().collect();
        ensure!(more.is_empty(), "left behind:\n  {}", more.join("\n  "));
        Ok(())
    })
    .await;
    outcome.and(left)
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

fn indent(text: &str) -> String {
    text.replace('\n', "\n      ")
}

pub use daemon::Version as WhichVersion;
