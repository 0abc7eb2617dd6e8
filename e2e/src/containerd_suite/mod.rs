//! `make conformance-containerd-suite`: runs containerd's own CRI integration tests against boxlite-cri.
//!
//! The tests are those of the Go module pinned in `e2e/containerd-suite`, built by e2e/scripts/containerd-suite; its
//! `tests.txt` ([`list`]) says which run, which are of containerd itself, and which differ. Each test is a separate run of
//! the binary ([`outcome`]), so that a test that hangs or panics does not end the others.

mod images;
pub(crate) mod list;
mod outcome;

use crate::bail;
use crate::context::Backend;
use crate::failure::{During, Failure, Result};
use crate::image::registry::Registry;
use crate::install::{self, Install};
use crate::namespaces;
use crate::node::{Mirror, Node, NodeOptions};
use list::List;
use outcome::{Outcome, State};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::Command;

/// List of the tests.
const TESTS: &str = include_str!("../../containerd-suite/tests.txt");
/// Registry hosts of the image references.
const HOSTS: [&str; 2] = ["registry.k8s.io", "ghcr.io"];
/// NRI socket that the tests use; a constant in the module.
const NRI_SOCKET: &str = "/run/nri-test.sock";
/// Directory on which the tests look for ID-mapped mounts; a constant in the module.
const CONTAINERD_ROOT: &str = "/var/lib/containerd-test";
/// vCPUs of each pod: tests move containers to the second CPU of the host.
const VCPUS: u8 = 2;
/// Pause before the daemon starts again: the tests poll once a second until they see that it has ended.
const RESTART_DELAY: Duration = Duration::from_secs(3);
/// Interval of the check for an ended daemon.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);
/// Time limit of one test.
const TEST_TIMEOUT: Duration = Duration::from_secs(600);
/// Answer to `runc features`, by which the tests decide on ID-mapped mounts of the runtime under test.
const RUNC: &str = "#!/bin/sh\n[ \"$*\" = features ] || [ \"$1\" = features ] || exit 1\n\
    echo '{\"ociVersionMin\":\"1.0.0\",\"ociVersionMax\":\"1.2.0\",\"linux\":{\"mountExtensions\":{\"idmap\":{\"enabled\":true}}}}'\n";

/// Options of `boxlite-e2e containerd-suite`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// VMM, and the environment it needs.
    #[arg(long, value_enum, default_value = "qemu")]
    backend: Backend,
    /// Run only the tests whose name contains this text.
    #[arg(long, default_value = "")]
    filter: String,
    /// Directory for the tests' output and the daemon's log.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Programs built by e2e/scripts/containerd-suite.
pub(crate) struct Programs {
    integration: PathBuf,
    stress: PathBuf,
    nginx: PathBuf,
}

/// Runs the tests. Returns true if none failed or was skipped except as the list says.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    let list = List::parse(TESTS)?;
    let programs = Programs::find()?;
    let install = Install::find()?;
    let scratch = namespaces::scratch();
    let out = match &options.out {
        Some(out) => out.clone(),
        None => install.daemon.with_file_name("containerd-suite"),
    };
    std::fs::create_dir_all(&out).during(out.display())?;
    prepare(&scratch)?;
    let _root = ContainerdRoot::mount()?;
    let registry = Registry::start(&install.registry, &scratch, 5001, false).await?;
    let digest = images::push(&registry, &install.busybox, &programs)
        .await
        .during("failed to push the images of containerd's tests")?;
    let list_file = scratch.join("images.toml");
    let toml = format!("BusyBoxByDigest = \"ghcr.io/containerd/busybox@{digest}\"\n");
    std::fs::write(&list_file, toml)?;
    let server = format!("http://{}", registry.host);
    let mirror = |host: &str| -> Mirror { (host.to_owned(), server.clone(), None) };
    let mut node_options = NodeOptions::new("cs", options.backend.vmm());
    node_options.registries = HOSTS.map(mirror).to_vec();
    node_options.nri_socket = Some(NRI_SOCKET.into());
    node_options.vcpus = Some(VCPUS);
    let node = Node::start(&scratch, &install, &node_options).await?;
    let suite = Suite {
        programs: &programs,
        scratch: &scratch,
        node: &node,
        images: &list_file,
        out: &out,
    };
    let result = suite.run(&list, &options.filter).await;
    let log = out.join("daemon.log");
    std::fs::copy(node.log(), &log).during(log.display())?;
    node.terminate().await?;
    result
}

impl Programs {
    fn find() -> Result<Self> {
        let cache = install::cache().join("containerd-suite");
        let programs = Self {
            integration: cache.join("integration"),
            stress: cache.join("stress"),
            nginx: cache.join("nginx"),
        };
        for path in [&programs.integration, &programs.stress, &programs.nginx] {
            if !path.exists() {
                bail!(
                    "{} not found: run e2e/scripts/containerd-suite (make conformance-containerd-suite does)",
                    path.display()
                );
            }
        }
        Ok(programs)
    }
}

/// Mounts file systems of the namespaces over the constant paths of the tests, and writes the answer to `runc features`.
fn prepare(scratch: &Path) -> Result {
    namespaces::tmpfs(Path::new("/run"), "mode=0755,size=256m")?;
    for dir in namespaces::RUN_DIRECTORIES {
        std::fs::create_dir(dir).during(dir)?;
    }
    let bin = scratch.join("bin");
    std::fs::create_dir_all(&bin)?;
    let runc = bin.join("runc");
    std::fs::write(&runc, RUNC)?;
    std::fs::set_permissions(&runc, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// A tmpfs at [`CONTAINERD_ROOT`], whose mount point exists outside the namespaces: removed on drop if it was made here.
struct ContainerdRoot {
    is_new: bool,
}

impl ContainerdRoot {
    fn mount() -> Result<Self> {
        let root = Path::new(CONTAINERD_ROOT);
        let is_new = !root.exists();
        std::fs::create_dir_all(root).during(CONTAINERD_ROOT)?;
        namespaces::tmpfs(root, "mode=0755,size=16m")?;
        Ok(Self { is_new })
    }
}

impl Drop for ContainerdRoot {
    fn drop(&mut self) {
        let unmounted = nix::mount::umount2(CONTAINERD_ROOT, nix::mount::MntFlags::MNT_DETACH);
        if unmounted.is_ok() && self.is_new {
            let _ = std::fs::remove_dir(CONTAINERD_ROOT);
        }
    }
}

/// Environment of the tests.
struct Suite<'a> {
    programs: &'a Programs,
    scratch: &'a Path,
    node: &'a Node,
    images: &'a Path,
    out: &'a Path,
}

impl Suite<'_> {
    async fn run(&self, list: &List, filter: &str) -> Result<bool> {
        let output = self.binary(&["-test.list", "."]).await?;
        let tests: Vec<_> = output
            .lines()
            .filter(|line| line.starts_with("Test"))
            .map(str::to_owned)
            .collect();
        list.compare(&tests)?;
        let mut counts = [0; 3];
        let mut bad = Vec::new();
        let begun = Instant::now();
        for test in tests.iter().filter(|test| test.contains(filter)) {
            if let Some(reason) = list.own.get(test) {
                println!("not run  {test}: {reason}");
                continue;
            }
            let (outcome, seconds) = self.test(test).await?;
            counts[outcome.state as usize] += 1;
            let word = match outcome.state {
                State::Passed => "passed ",
                State::Failed => "FAILED ",
                State::Skipped => "skipped",
            };
            println!("{word}  {test} ({seconds:.1} s)");
            let verdict = outcome.verdict(test, list);
            for (name, reason) in &verdict.excused {
                println!("         {name} excused: {reason}");
            }
            for name in &verdict.bad {
                println!("         {name}: {}", outcome.reason);
            }
            for name in &verdict.stale {
                println!("         {name} passes; the list says that it differs");
            }
            bad.extend(verdict.bad);
            bad.extend(verdict.stale);
        }
        let [passed, failed, skipped] = counts;
        println!(
            "containerd's integration tests: {passed} passed, {failed} failed, {skipped} skipped; {} unexpected ({:.0} s); output in {}",
            bad.len(),
            begun.elapsed().as_secs_f64(),
            self.out.display()
        );
        for name in &bad {
            println!("unexpected: {name}");
        }
        Ok(passed > 0 && bad.is_empty())
    }

    /// Runs one test and cleans up after it.
    async fn test(&self, test: &str) -> Result<(Outcome, f64)> {
        let begun = Instant::now();
        let pattern = format!("^{test}$");
        let limit = format!("{}s", TEST_TIMEOUT.as_secs());
        let arguments = ["-test.v", "-test.run", &pattern, "-test.timeout", &limit];
        let output = self.binary(&arguments).await?;
        let seconds = begun.elapsed().as_secs_f64();
        let log = self.out.join(format!("{test}.log"));
        std::fs::write(&log, &output).during(log.display())?;
        self.clean().await?;
        Ok((Outcome::read(test, &output), seconds))
    }

    /// Runs the test binary and returns its output.
    async fn binary(&self, arguments: &[&str]) -> Result<String> {
        let path = std::env::var("PATH").unwrap_or_default();
        let run = Command::new(&self.programs.integration)
            .args(arguments)
            .arg(format!(
                "-cri-endpoint=unix://{}",
                self.node.socket().display()
            ))
            .arg(format!("-image-list={}", self.images.display()))
            .args(["-containerd-bin", "boxlite-cri"])
            .current_dir(self.scratch)
            .env("TMPDIR", self.scratch)
            .env(
                "PATH",
                format!("{}:{path}", self.scratch.join("bin").display()),
            )
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let limited = tokio::time::timeout(TEST_TIMEOUT + Duration::from_secs(60), run);
        let ended = tokio::select! {
            output = limited => output,
            error = self.restart_ended() => return Err(error),
        };
        let output = ended
            .during("containerd's tests")?
            .during(self.programs.integration.display())?;
        let text = [output.stdout, output.stderr].concat();
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Starts the daemon again each time it ends, as an init system does. Returns only with an error.
    async fn restart_ended(&self) -> Failure {
        loop {
            tokio::time::sleep(WATCH_INTERVAL).await;
            match self.node.service().has_ended().await {
                Ok(false) => continue,
                Ok(true) => {}
                Err(error) => return error,
            }
            tokio::time::sleep(RESTART_DELAY).await;
            if let Err(error) = self.node.serve().await {
                return error;
            }
        }
    }

    /// Removes the pods that a failed test left, which would disturb the next one.
    async fn clean(&self) -> Result {
        for pod in self.node.pods().await? {
            self.node.cri.remove_pod(pod.id).await?;
        }
        Ok(())
    }
}
