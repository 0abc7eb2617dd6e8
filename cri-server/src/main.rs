//! `boxlite-cri`: the node's CRI runtime.
//!
//! Flow: cli → serve (the daemon), check (this machine), status (the running daemon), config (prints and validates),
//! support-bundle (files for a bug report).

#![forbid(unsafe_code)]

mod check;
mod cli;
mod cni;
mod config;
mod convert;
mod host_pods;
#[cfg(test)]
mod inner_run;
mod layout;
mod metrics;
mod notify;
mod nri;
mod output;
mod serve;
mod server;
mod service;
mod status;
mod streaming;
mod subject;
mod support_bundle;
mod vmm;
mod warm;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run(cli::Cli::parse())
}
