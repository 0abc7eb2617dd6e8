//! The command line. Options beat the configuration file.
//!
//! Exit codes: 0 success, 1 failure, 2 (clap's) invalid usage, 78 (EX_CONFIG of sysexits.h) invalid configuration.

#[cfg(test)]
mod tests;

use crate::config::{Config, ConfigError, Paths, check_log_filter, default_toml, socket_path};
use crate::output::{Output, VERSION, print};
use crate::{check, serve, status, support_bundle};
use boxlite_config::paths::{installed_kernel, prefix};
use boxlite_sys::log_line::EscapedWriter;
use clap::{Args, CommandFactory, Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Configuration file if none is named; it may be missing.
const DEFAULT_FILE: &str = "/etc/boxlite/config.toml";
/// EX_CONFIG.
const EXIT_CONFIG: u8 = 78;
/// Timeout for blocking calls to return at the end of the process.
const BLOCKING_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// Kubernetes container runtime (CRI v1) that runs every pod in a virtual machine.
///
/// The kubelet connects to it with --container-runtime-endpoint=unix:///run/boxlite/cri.sock. Pods keep running while
/// boxlite-cri is stopped or upgraded; the next start adopts them again.
#[derive(Debug, Parser)]
#[command(name = "boxlite-cri", version = VERSION, after_help = "\
Examples:
  boxlite-cri check                          test whether this machine can run pods
  boxlite-cri config default > config.toml   start a configuration file
  boxlite-cri serve --config config.toml     run in the foreground
  boxlite-cri status                         ask the running daemon
  boxlite-cri support-bundle                 collect the files of a bug report

Exit codes: 0 success, 1 failure, 2 invalid usage, 78 invalid configuration.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the CRI until SIGTERM.
    ///
    /// Logs to standard error and reports readiness to systemd if NOTIFY_SOCKET is set. Pods outlive the daemon.
    Serve(ConfigOptions),
    /// Test whether this machine can run pods, and report missing parts.
    ///
    /// Runs a few instructions in a VM to find out whether KVM works, then looks for the programs and the network
    /// configuration. Exits with 1 if pods cannot run.
    Check {
        #[command(flatten)]
        config: ConfigOptions,
        /// Format of the report.
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Report the state of the running daemon: VMM, pods, versions.
    ///
    /// Asks over the CRI socket. Exits with 1 if the daemon does not answer.
    Status {
        #[command(flatten)]
        config: ConfigOptions,
        /// Format of the report.
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Write an archive with the files that a bug report needs.
    ///
    /// Has versions, configuration, the reports of check and status, metrics, and the ends of the logs of daemon, shims and
    /// guest consoles; no container logs, environment variables or credentials. Works without a daemon.
    SupportBundle {
        #[command(flatten)]
        config: ConfigOptions,
        /// File to write, which must not exist [default: boxlite-support-<seconds since 1970>.tar.gz].
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Print or validate the configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Print the version and the commit it was built from.
    Version,
    /// Print a completion script for a shell.
    ///
    /// `make install` installs those of bash, zsh and fish. For this shell only: source <(boxlite-cri completions bash)
    Completions {
        /// Shell to complete in.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print every key with its default value and an explanation.
    Default {
        /// Installation prefix that the paths are below [default: the prefix of this program].
        #[arg(long, value_name = "DIR")]
        prefix: Option<PathBuf>,
    },
    /// Print the effective configuration: defaults, file and options together.
    Dump(ConfigOptions),
    /// Validate the configuration and report every mistake.
    Check(ConfigOptions),
}

/// Options of every command that reads the configuration.
#[derive(Debug, Args)]
struct ConfigOptions {
    /// Configuration file, in TOML [default: /etc/boxlite/config.toml, if it exists].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory of persistent data; overrides `root`.
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Directory of data of the current boot; overrides `state`.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// CRI socket; overrides `listen`.
    #[arg(long, value_name = "unix:///PATH", value_parser = socket_path)]
    listen: Option<PathBuf>,
    /// Log filter, such as info or boxlite_cri=debug,info; overrides `log_level`.
    #[arg(long, value_name = "FILTER", value_parser = check_log_filter)]
    log_level: Option<String>,
}

impl ConfigOptions {
    fn load(self) -> Result<Config, ConfigError> {
        let mut config = match self.config {
            Some(path) => Config::load(&path)?,
            None if Path::new(DEFAULT_FILE).exists() => Config::load(DEFAULT_FILE.as_ref())?,
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

/// Runs the command.
pub(crate) fn run(cli: Cli) -> ExitCode {
    match cli.command {
        Command::Serve(options) => with_config(options, |config| {
            if let Err(error) = init_logging(&config.log_level) {
                eprintln!("boxlite-cri: {error}");
                return ExitCode::from(EXIT_CONFIG);
            }
            block_on(serve::serve(config))
        }),
        Command::Check { config, output } => {
            with_config(config, |config| block_on(check::check(config, output)))
        }
        Command::Status { config, output } => {
            with_config(config, |config| block_on(status::status(config, output)))
        }
        Command::SupportBundle { config, file } => with_config(config, |config| {
            block_on(support_bundle::support_bundle(config, file))
        }),
        Command::Config { command } => run_config(command),
        Command::Version => print(&format!("boxlite-cri {VERSION}\n"), ExitCode::SUCCESS),
        Command::Completions { shell } => print(&completions(shell), ExitCode::SUCCESS),
    }
}

fn run_config(command: ConfigCommand) -> ExitCode {
    match command {
        ConfigCommand::Default { prefix: chosen } => {
            print(&default_file(chosen.as_deref()), ExitCode::SUCCESS)
        }
        ConfigCommand::Dump(options) => with_config(options, |config| {
            print(&config.to_toml(), ExitCode::SUCCESS)
        }),
        ConfigCommand::Check(options) => with_config(options, |_| {
            print("the configuration is valid\n", ExitCode::SUCCESS)
        }),
    }
}

fn completions(shell: clap_complete::Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "boxlite-cri", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Returns the default file. An explicit prefix is an installation to be made: its kernel need not exist yet.
fn default_file(chosen: Option<&Path>) -> String {
    match chosen {
        Some(prefix) => default_toml(prefix, &installed_kernel(prefix)),
        None => default_toml(&prefix(), &Paths::default().libkrunfw),
    }
}

fn with_config(options: ConfigOptions, run: impl FnOnce(Config) -> ExitCode) -> ExitCode {
    match options.load() {
        Ok(config) => run(config),
        Err(error) => {
            eprintln!("boxlite-cri: {}", boxlite_runtime::report(&error));
            ExitCode::from(EXIT_CONFIG)
        }
    }
}

fn block_on(work: impl Future<Output = ExitCode>) -> ExitCode {
    match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => {
            let code = runtime.block_on(work);
            // Dropping the runtime would wait without a limit for blocking calls, such as one on a stalled host path.
            runtime.shutdown_timeout(BLOCKING_SHUTDOWN_TIMEOUT);
            code
        }
        Err(error) => {
            eprintln!("boxlite-cri: failed to start the async runtime: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Logs to standard error, which systemd forwards to the journal.
fn init_logging(filter: &str) -> Result<(), tracing_subscriber::filter::ParseError> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| EscapedWriter::new(std::io::stderr()))
        .with_ansi(false)
        .with_target(false)
        .init();
    Ok(())
}
