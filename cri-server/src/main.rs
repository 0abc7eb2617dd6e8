//! `boxlite-cri`: the node's CRI runtime. This file reads the command line and sets up logging; `cli` has the verbs.
//!
//! Flow: cli → serve (the daemon), check (probes), config (prints and checks).

#![forbid(unsafe_code)]

mod check;
mod cli;
mod cni;
mod config;
mod convert;
#[cfg(test)]
mod inner_run;
mod layout;
mod metrics;
mod nri;
mod serve;
mod server;
mod service;
mod streaming;
mod vmm;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run(cli::Cli::parse())
}
