//! The .deb in minimal Debian systems: installation, upgrade, removal and purge.
//!
//! Runs dpkg in a chroot on an overlay of a bootstrapped root (`e2e/scripts/debian-roots`), so each case begins with the same
//! system. No daemon is started: a chroot has no systemd as PID 1.

mod cases;
mod root;

use crate::bail;
use crate::failure::{During, Result};
use clap::Args;
use root::DebianRoot;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Options of the package tests.
#[derive(Args)]
pub(crate) struct Options {
    /// Directory that `make dist` wrote.
    #[arg(long)]
    dist: PathBuf,
    /// Debian versions.
    #[arg(required = true)]
    versions: Vec<u32>,
}

/// Case: a name, and a function that gets a fresh system and the package.
type Case = (&'static str, fn(&DebianRoot, &Path) -> Result);

const CASES: [Case; 4] = [
    (
        "purge_restores_the_file_tree",
        cases::purge_restores_the_file_tree,
    ),
    (
        "programs_run_after_installation",
        cases::programs_run_after_installation,
    ),
    (
        "upgrade_keeps_changed_configuration",
        cases::upgrade_keeps_changed_configuration,
    ),
    (
        "removal_with_pods_is_refused",
        cases::removal_with_pods_is_refused,
    ),
];

/// Runs all cases in each version and prints a summary. Returns true if none failed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let begun = Instant::now();
    let deb = package(&options.dist)?;
    let (mut passed, mut failed) = (0, 0);
    for version in &options.versions {
        for (name, case) in CASES {
            let start = Instant::now();
            let root = DebianRoot::mount(*version)?;
            let result = case(&root, &deb);
            // Also after a failure: the next case uses the same directories.
            let unmounted = root.unmount();
            let seconds = start.elapsed().as_secs_f64();
            match result.and(unmounted) {
                Ok(()) => {
                    passed += 1;
                    println!("ok    debian {version}: {name:<48} {seconds:>6.1} s");
                }
                Err(failure) => {
                    failed += 1;
                    println!(
                        "FAIL  debian {version}: {name:<48} {seconds:>6.1} s\n      {failure}"
                    );
                }
            }
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("e2e packages: {passed} passed, {failed} failed, 0 skipped in {seconds:.0} s");
    Ok(failed == 0)
}

/// Returns the package that SHA256SUMS of the directory lists.
fn package(dist: &Path) -> Result<PathBuf> {
    let sums = dist.join("SHA256SUMS");
    let text = std::fs::read_to_string(&sums).during(sums.display())?;
    let mut names = text.lines().filter_map(|line| line.split("  ").nth(1));
    match names.find(|name| name.ends_with(".deb")) {
        Some(name) => Ok(dist.join(name)),
        None => bail!("{} lists no .deb", sums.display()),
    }
}
