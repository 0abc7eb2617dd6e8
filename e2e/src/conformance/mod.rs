//! `make conformance`: runs critest, the conformance suite of CRI runtimes, against boxlite-cri three times (SPDY,
//! WebSocket, NRI); `make conformance-containerd`: against the CRI plugin of a stock containerd.
//!
//! Starts the programs and evaluates the result ([`report`]). The specs are those of the Go module pinned in
//! `e2e/critest`; the images are built by [`images`]. Each run has a separate daemon ([`target`]).

pub(crate) mod images;
mod report;
mod target;

use crate::containerd::Version;
use crate::context::Backend;
use crate::failure::{During, Result};
use crate::image::registry::Registry;
use crate::install::{self, Install};
use crate::{bail, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use target::Target;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

/// Time limit for an interrupted suite to clean up and write its report.
const INTERRUPTION_TIMEOUT: Duration = Duration::from_secs(60);

/// Transport of critest's streaming calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Transport {
    /// SPDY/3.1, as used by kubelets.
    Spdy,
    /// WebSocket.
    Websocket,
    /// SPDY, with `--nri-socket`.
    Nri,
}

impl Transport {
    fn name(self) -> &'static str {
        match self {
            Self::Spdy => "spdy",
            Self::Websocket => "websocket",
            Self::Nri => "nri",
        }
    }
}

/// Options of `boxlite-e2e conformance`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// VMM, and the environment it needs.
    #[arg(long, value_enum, default_value = "qemu")]
    backend: Backend,
    /// Runs to perform; all three by default.
    #[arg(long, value_enum, value_delimiter = ',')]
    transport: Vec<Transport>,
    /// Test the CRI plugin of this containerd, with the shim as the handler `boxlite`, instead of boxlite-cri.
    #[arg(long, value_enum)]
    containerd: Option<Version>,
    /// Run only the specs whose name matches this regular expression.
    #[arg(long)]
    focus: Option<String>,
    /// Skip the specs whose name matches this regular expression.
    #[arg(long)]
    skip: Option<String>,
    /// Path of critest; by default the one built by e2e/scripts/critest.
    #[arg(long)]
    critest: Option<PathBuf>,
    /// Seed of the order of the specs; random by default.
    #[arg(long)]
    seed: Option<u64>,
    /// Directory for critest's output, the reports and the daemon's log.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Programs built by e2e/scripts/critest.
pub(crate) struct Programs {
    critest: PathBuf,
    nginx: PathBuf,
    nnp: PathBuf,
}

/// Performs the selected runs. Returns true if nothing failed except specs that cannot run here.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    let programs = Programs::find(options.critest.clone())?;
    let scratch = crate::namespaces::scratch();
    let install = Install::find()?;
    let out = match &options.out {
        Some(out) => out.clone(),
        None => install.daemon.with_file_name("conformance"),
    };
    std::fs::create_dir_all(&out).during(out.display())?;
    let registry = Registry::start(&install.registry, &scratch, 5001, false).await?;
    images::push(&registry, &install.busybox, &programs)
        .await
        .during("failed to push critest's images")?;
    let all = [Transport::Spdy, Transport::Websocket, Transport::Nri];
    let chosen = if options.transport.is_empty() {
        &all[..]
    } else {
        &options.transport
    };
    let mut good = true;
    for &transport in chosen {
        let suite = Suite {
            scratch: &scratch,
            install: &install,
            registry: &registry,
            programs: &programs,
            options,
            out: &out,
        };
        good &= suite.run(transport).await?;
    }
    Ok(good)
}

/// Runs a test suite with its output in a file. Its exit code does not count: failed tests are in the report.
///
/// The suite has a separate process group. SIGINT and SIGTERM of this program reach it once, as the SIGINT after which ginkgo
/// writes its report.
///
/// # Errors
/// If the suite writes no report, or after a signal.
pub(crate) async fn run_suite(
    name: &str,
    command: &mut Command,
    output: &Path,
    report: &Path,
) -> Result {
    println!("output in {}", output.display());
    let log = std::fs::File::create(output).during(output.display())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut suite = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .during(name)?;
    let status = tokio::select! {
        status = suite.wait() => status.during(name)?,
        _ = interrupt.recv() => return interrupted(name, &mut suite).await,
        _ = terminate.recv() => return interrupted(name, &mut suite).await,
    };
    ensure!(
        report.exists(),
        "{name} ended with {status} and without a report, see {}",
        output.display()
    );
    Ok(())
}

/// Interrupts a suite's process group and waits until ginkgo has written the report: it relies on the terminal to interrupt the
/// processes that run the specs. Kills the group if that takes too long.
async fn interrupted(name: &str, suite: &mut Child) -> Result {
    let Some(pid) = suite.id() else {
        bail!("{name} interrupted at its end");
    };
    let group = Pid::from_raw(i32::try_from(pid)?);
    killpg(group, Signal::SIGINT)?;
    if timeout(INTERRUPTION_TIMEOUT, suite.wait()).await.is_ok() {
        bail!("{name} interrupted");
    }
    killpg(group, Signal::SIGKILL)?;
    bail!("{name} interrupted, and killed after {INTERRUPTION_TIMEOUT:?}")
}

impl Programs {
    fn find(critest: Option<PathBuf>) -> Result<Self> {
        let cache = install::cache().join("critest");
        let programs = Self {
            critest: critest.unwrap_or_else(|| cache.join("critest")),
            nginx: cache.join("nginx/usr/sbin/nginx"),
            nnp: cache.join("nnp"),
        };
        for path in [&programs.critest, &programs.nginx, &programs.nnp] {
            if !path.exists() {
                bail!(
                    "{} not found: run e2e/scripts/critest (make conformance does)",
                    path.display()
                );
            }
        }
        Ok(programs)
    }
}

/// Environment of one run.
struct Suite<'a> {
    scratch: &'a Path,
    install: &'a Install,
    registry: &'a Registry,
    programs: &'a Programs,
    options: &'a Options,
    out: &'a Path,
}

impl Suite<'_> {
    async fn run(&self, transport: Transport) -> Result<bool> {
        let target = Target::start(self, transport).await?;
        let name = match target.handler() {
            None => transport.name().to_owned(),
            Some(_) => format!("{}-{}", target.name(), transport.name()),
        };
        println!(
            "\n== critest, {}, {}, {}",
            target.name(),
            transport.name(),
            self.options.backend.vmm()
        );
        let begun = Instant::now();
        let json = self.out.join(format!("{name}.json"));
        let _ = std::fs::remove_file(&json);
        let output = self.out.join(format!("{name}.log"));
        let ran = self.critest(transport, &target, &json, &output).await;
        // The daemon's log matters most when the run failed.
        let log = self.out.join(format!("{name}-daemon.log"));
        std::fs::copy(target.log(), &log).during(log.display())?;
        target.end().await?;
        ran?;
        let report = report::read(&json)?;
        println!("{}", report.text());
        println!(
            "critest {name}: {} ({:.0} s)",
            report.line(),
            begun.elapsed().as_secs_f64()
        );
        // Skips caused by a containerd's limitations do not count against the shim.
        Ok(report.good(target.handler().is_none()))
    }

    /// Runs critest. Its exit code says only that something failed; the details are in the report.
    async fn critest(
        &self,
        transport: Transport,
        target: &Target,
        json: &Path,
        output: &Path,
    ) -> Result {
        let endpoint = format!("unix://{}", target.socket().display());
        let mut command = Command::new(&self.programs.critest);
        command
            .args(["-runtime-endpoint", &endpoint, "-image-endpoint", &endpoint])
            // A configuration file of the machine must not affect the run.
            .args(["-config", "/nonexistent"])
            .args(["-ginkgo.no-color", "-ginkgo.timeout", "6h"])
            .arg(format!("-ginkgo.json-report={}", json.display()))
            .env("TMPDIR", self.scratch);
        if let Some(handler) = target.handler() {
            command.arg(format!("-runtime-handler={handler}"));
        }
        if let Some(focus) = &self.options.focus {
            command.args(["-ginkgo.focus", focus]);
        }
        if let Some(skip) = &self.options.skip {
            command.args(["-ginkgo.skip", skip]);
        }
        if let Some(seed) = self.options.seed {
            command.arg(format!("-ginkgo.seed={seed}"));
        }
        match transport {
            Transport::Spdy => {}
            Transport::Websocket => {
                command.args([
                    "-websocket-exec",
                    "-websocket-attach",
                    "-websocket-portforward",
                ]);
            }
            Transport::Nri => {
                if self.supports_nri().await? {
                    command.arg(format!("-nri-socket={}", target.nri().display()));
                } else {
                    println!("this critest has no NRI specs, running without --nri-socket");
                }
            }
        }
        run_suite("critest", &mut command, output, json).await
    }

    /// Returns true if this critest has the flag `--nri-socket`.
    async fn supports_nri(&self) -> Result<bool> {
        let output = Command::new(&self.programs.critest)
            .arg("-help")
            .output()
            .await?;
        let text = [output.stdout, output.stderr].concat();
        Ok(String::from_utf8_lossy(&text).contains("-nri-socket"))
    }
}
