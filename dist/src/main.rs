//! boxlite-dist: packs an installed tree into a .deb, a tarball, an image, an SBOM and a list of checksums.
//!
//! Builds no program and reads no configuration: `e2e/scripts/dist` and `e2e/scripts/image` stage the tree and call it.
//! The same tree, version and time give the same bytes on every machine.

#![forbid(unsafe_code)]

mod archive;
mod chart;
mod checksums;
mod deb;
mod error;
mod image;
mod sbom;
mod tree;

use clap::{Parser, Subcommand};
use error::{DistError, Result};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Packs boxlite-cri")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Writes the Debian package.
    Deb {
        /// Installed tree, whose root becomes `/`.
        #[arg(long)]
        root: PathBuf,
        /// Directory with the template `control` and the maintainer scripts.
        #[arg(long)]
        debian: PathBuf,
        #[command(flatten)]
        stamp: Stamp,
        /// File to write.
        #[arg(long)]
        out: PathBuf,
    },
    /// Writes a gzip-compressed tarball.
    Tarball {
        /// Installed tree.
        #[arg(long)]
        root: PathBuf,
        /// Name of the tarball's top directory.
        #[arg(long)]
        prefix: String,
        #[command(flatten)]
        stamp: Stamp,
        /// File to write.
        #[arg(long)]
        out: PathBuf,
    },
    /// Writes a container image as an OCI layout and prints its digest.
    Image {
        /// Root directory of the image.
        #[arg(long)]
        root: PathBuf,
        /// Entry point.
        #[arg(long)]
        entrypoint: String,
        #[command(flatten)]
        stamp: Stamp,
        /// Directory to write.
        #[arg(long)]
        out: PathBuf,
    },
    /// Writes the README of a chart from its template and values.yaml.
    ChartReadme {
        /// Directory of the chart.
        chart: PathBuf,
    },
    /// Writes the SBOM as CycloneDX JSON.
    Sbom {
        /// Output of `cargo metadata --format-version 1`.
        #[arg(long)]
        metadata: PathBuf,
        /// Cargo.lock, for the hashes of the crates.
        #[arg(long)]
        lock: PathBuf,
        /// Packages of the workspace whose programs are shipped.
        #[arg(long = "package", required = true)]
        packages: Vec<String>,
        /// Shipped file of another project: NAME=VERSION=LICENSE=PATH.
        #[arg(long = "file")]
        files: Vec<sbom::ForeignFile>,
        #[command(flatten)]
        stamp: Stamp,
        /// File to write.
        #[arg(long)]
        out: PathBuf,
    },
    /// Writes the SHA-256 of files in the format of sha256sum.
    Checksums {
        /// File to write.
        #[arg(long)]
        out: PathBuf,
        /// Files of the same directory.
        files: Vec<PathBuf>,
    },
}

/// Version and time of a package.
#[derive(clap::Args)]
struct Stamp {
    /// Version of the package.
    #[arg(long)]
    version: String,
    /// Modification time of all files, in seconds since 1970.
    #[arg(long, env = "SOURCE_DATE_EPOCH")]
    epoch: u64,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("boxlite-dist: {}", boxlite_sys::report::report(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Deb {
            root,
            debian,
            stamp,
            out,
        } => {
            let package = deb::Package {
                root: &root,
                debian: &debian,
                version: &stamp.version,
                epoch: stamp.epoch,
            };
            write(&out, &package.build()?)
        }
        Command::Tarball {
            root,
            prefix,
            stamp,
            out,
        } => {
            let entries = tree::read(&root)?;
            write(&out, &archive::gzip(&entries, &prefix, stamp.epoch)?)
        }
        Command::Image {
            root,
            entrypoint,
            stamp,
            out,
        } => {
            let image = image::Image::build(&root, &entrypoint, &stamp.version, stamp.epoch)?;
            image.write(&out)?;
            println!("{}", image.digest());
            Ok(())
        }
        Command::ChartReadme { chart } => {
            let template = read_text(&chart.join("README.md.in"))?;
            let values = read_text(&chart.join("values.yaml"))?;
            let readme = chart::readme(&template, &values);
            write(&chart.join("README.md"), readme.as_bytes())
        }
        Command::Sbom {
            metadata,
            lock,
            packages,
            files,
            stamp,
            out,
        } => {
            let metadata = sbom::Metadata::parse(&read_text(&metadata)?, &read_text(&lock)?)?;
            let document = metadata.document(&packages, &files, &stamp.version, stamp.epoch)?;
            write(&out, format!("{document:#}\n").as_bytes())
        }
        Command::Checksums { out, files } => write(&out, checksums::list(&files)?.as_bytes()),
    }
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| DistError::Read {
        path: path.to_owned(),
        source,
    })
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    std::fs::write(path, content).map_err(|source| DistError::Write {
        path: path.to_owned(),
        source,
    })
}
