//! `make conformance`: critest, the conformance suite of CRI runtimes, against boxlite-cri in this enclave, three times:
//! streams over SPDY, over WebSocket, and with NRI; `make conformance-containerd`: against a stock containerd's CRI plugin.
//!
//! Only starts things and judges the result ([`report`]); the specs are those of the Go module pinned in `e2e/critest`, the
//! images are made in [`images`]. Each run has a daemon of its own ([`target`]).

mod images;
mod report;
mod target;

use crate::bail;
use crate::containerd::Version;
use crate::image::registry::Registry;
use crate::install::Install;
use crate::outcome::{During, Result};
use crate::world::Home;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;
use target::Target;
use tokio::process::Command;

/// How critest is told to talk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Transport {
    /// Streams over SPDY/3.1, as a kubelet's.
    Spdy,
    /// Streams over WebSocket.
    Websocket,
    /// With `--nri-socket`.
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

/// What is to be run.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Which VMM.
    #[arg(long, value_enum, default_value = "qemu")]
    home: Home,
    /// Which runs; all three when left out.
    #[arg(long, value_enum, value_delimiter = ',')]
    transport: Vec<Transport>,
    /// Against this containerd's CRI plugin, with the shim as the handler `boxlite`, instead of boxlite-cri.
    #[arg(long, value_enum)]
    containerd: Option<Version>,
    /// Only specs whose name matches this regular expression.
    #[arg(long)]
    focus: Option<String>,
    /// No spec whose name matches this regular expression.
    #[arg(long)]
    skip: Option<String>,
    /// Another critest than the one that e2e/scripts/critest built.
    #[arg(long)]
    critest: Option<PathBuf>,
    /// Order of the specs; random when left out.
    #[arg(long)]
    seed: Option<u64>,
    /// Folder for critest's output, the reports and the daemon's log.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// What e2e/scripts/critest made.
pub struct Programs {
    critest: PathBuf,
    nginx: PathBuf,
    nnp: PathBuf,
}

/// Runs what was asked for; whether nothing failed that can run here.
pub async fn run(options: &Options) -> Result<bool> {
    let programs = Programs::find(options.critest.clone())?;
    let scratch = crate::enclave::scratch();
    let install = Install::find()?;
    let out = match &options.out {
        Some(out) => out.clone(),
        None => install.daemon.with_file_name("conformance"),
    };
    std::fs::create_dir_all(&out).during(out.display())?;
    let registry = Registry::start(&install.registry, &scratch, 5001, false).await?;
    images::push(&registry, &install.busybox, &programs)
        .await
        .during("pushing critest's images")?;
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

impl Programs {
    fn find(critest: Option<PathBuf>) -> Result<Self> {
        let home = std::env::var_os("HOME").map_or_else(|| "/root".into(), PathBuf::from);
        let cache = std::env::var_os("BOXLITE_CACHE")
            .map_or_else(|| home.join(".cache/boxlite-cri"), PathBuf::from)
            .join("critest");
        let programs = Self {
            critest: critest.unwrap_or_else(|| cache.join("critest")),
            nginx: cache.join("nginx/usr/sbin/nginx"),
            nnp: cache.join("nnp"),
        };
        for path in [&programs.critest, &programs.nginx, &programs.nnp] {
            if !path.exists() {
                bail!(
                    "{} is missing: e2e/scripts/critest makes it (make conformance calls it)",
                    path.display()
                );
            }
        }
        Ok(programs)
    }
}

/// One run's surroundings.
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
            self.options.home.vmm()
        );
        let begun = Instant::now();
        let json = self.out.join(format!("{name}.json"));
        let _ = std::fs::remove_file(&json);
        let output = self.out.join(format!("{name}.log"));
        let ran = self.critest(transport, &target, &json, &output).await;
        // The daemon's log is worth most when the run broke.
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
        // What a containerd lets the suite skip is its own: our part of it cannot be asked.
        Ok(report.good(target.handler().is_none()))
    }

    /// critest's exit code says only that something failed, what is in the report.
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
            // A file of the machine's must not change the run.
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
                if self.knows_nri().await? {
                    command.arg(format!("-nri-socket={}", target.nri().display()));
                } else {
                    println!("this critest has no NRI specs: the run is without --nri-socket");
                }
            }
        }
        let log = std::fs::File::create(output).during(output.display())?;
        println!("output in {}", output.display());
        let status = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .status()
            .await
            .during("critest")?;
        if !json.exists() {
            bail!(
                "critest ended with {status} and no report: see {}",
                output.display()
            );
        }
        Ok(())
    }

    /// Whether this critest has the flag.
    async fn knows_nri(&self) -> Result<bool> {
        let output = Command::new(&self.programs.critest)
            .arg("-help")
            .output()
            .await?;
        let text = [output.stdout, output.stderr].concat();
        Ok(String::from_utf8_lossy(&text).contains("-nri-socket"))
    }
}
