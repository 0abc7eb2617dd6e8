//! The command line: `serve`, `check`, `config`, `version`.
//!
//! Options given here beat the file. Exit codes: 0 fine, 1 failed, 2 (clap's) wrong usage, 78 (EX_CONFIG of sysexits.h) wrong configuration.

use crate::config::{Config, ConfigError, DEFAULT_TOML, socket_path};
use crate::{check, serve};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Where the configuration is looked for when none is named; it may be missing there.
const DEFAULT_FILE: &str = "/etc/boxlite/config.toml";
/// EX_CONFIG.
const EXIT_CONFIG: u8 = 78;

/// Runs Kubernetes pods in VMs: a CRI v1 runtime.
#[derive(Debug, Parser)]
#[command(name = "boxlite-cri", version, about)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Serves the CRI until SIGTERM; pods outlive it.
    Serve(Common),
    /// Says which VMM this machine can use and why, and what is missing.
    Check(Common),
    /// Prints or checks the configuration.
    Config {
        #[command(subcommand)]
        verb: ConfigVerb,
    },
    /// Prints the version.
    Version,
}

#[derive(Debug, Subcommand)]
enum ConfigVerb {
    /// Prints every key with its default and what it is for.
    Default,
    /// Reports every mistake of the file.
    Check(Common),
}

/// Options of every verb that needs the configuration.
#[derive(Debug, Args)]
struct Common {
    /// TOML file [default: /etc/boxlite/config.toml, if it is there].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Persistent directory, instead of the file's `root`.
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Directory of the present boot, instead of the file's `state`.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Socket, instead of the file's `listen`.
    #[arg(long, value_name = "unix:///PATH", value_parser = socket_path)]
    listen: Option<PathBuf>,
    /// Log filter, instead of the file's `log_level`.
    #[arg(long, value_name = "FILTER")]
    log_level: Option<String>,
}

impl Common {
    fn load(self) -> Result<Config, ConfigError> {
        let mut config = match self.config {
            Some(path) => Config::load(&path)?,
            None if std::path::Path::new(DEFAULT_FILE).exists() => {
                Config::load(DEFAULT_FILE.as_ref())?
            }
            None => Config::default(),
        };
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        if let Some(root) = self.root {
            config.root = absolute(root);
        }
        if let Some(state) = self.state {
            config.state = absolute(state);
        }
        config.listen = self.listen.unwrap_or(config.listen);
        config.log_level = self.log_level.unwrap_or(config.log_level);
        Ok(config)
    }
}

/// Does what the command line says.
pub fn run(cli: Cli) -> ExitCode {
    match cli.verb {
        Verb::Serve(common) => with(common, |config| {
            logging(&config.log_level);
            on_runtime(serve::serve(config))
        }),
        Verb::Check(common) => with(common, |config| on_runtime(check::check(config))),
        Verb::Config {
            verb: ConfigVerb::Default,
        } => {
            print!("{DEFAULT_TOML}");
            ExitCode::SUCCESS
        }
        Verb::Config {
            verb: ConfigVerb::Check(common),
        } => with(common, |_| {
            println!("the configuration is fine");
            ExitCode::SUCCESS
        }),
        Verb::Version => {
            println!("boxlite-cri {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
    }
}

fn with(common: Common, work: impl FnOnce(Config) -> ExitCode) -> ExitCode {
    match common.load() {
        Ok(config) => work(config),
        Err(error) => {
            eprintln!("boxlite-cri: {}", boxlite_runtime::report(&error));
            ExitCode::from(EXIT_CONFIG)
        }
    }
}

fn on_runtime(work: impl Future<Output = ExitCode>) -> ExitCode {
    match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime.block_on(work),
        Err(error) => {
            eprintln!("boxlite-cri: cannot start the async runtime: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Log lines go to standard error: the journal adds time and unit.
fn logging(filter: &str) {
    let filter = tracing_subscriber::EnvFilter::try_new(filter).unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
}
