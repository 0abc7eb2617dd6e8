//! The cases of the package tests. Each gets a fresh Debian.

use super::root::DebianRoot;
use crate::failure::{During, Result};
use crate::namespaces::run;
use crate::{bail, ensure, same};
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

/// Path of the package in the system.
const DEB: &str = "/tmp/boxlite-cri.deb";
const CONFIG: &str = "/etc/boxlite/config.toml";
const SHIM: &str = "/usr/bin/containerd-shim-boxlite-v2";
/// Programs of the package.
const PROGRAMS: [&str; 5] = [
    "/usr/bin/boxlite-cri",
    SHIM,
    "/usr/libexec/boxlite/boxlite-guest",
    "/usr/libexec/boxlite/virtiofsd",
    "/usr/libexec/boxlite/vhost-device-vsock",
];

/// Installs the package and returns dpkg's output.
fn install(root: &DebianRoot, deb: &Path) -> Result<String> {
    root.copy(deb, DEB)?;
    root.run("dpkg", &["--install", DEB])
}

/// Returns the differences between two trees.
fn differences(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> Vec<String> {
    let gone = before.iter().filter(|(path, _)| !after.contains_key(*path));
    let new = after
        .iter()
        .filter(|(path, text)| before.get(*path) != Some(text));
    gone.map(|(path, _)| format!("- {path}"))
        .chain(new.map(|(path, text)| format!("+ {path}: {text:.60}")))
        .collect()
}

/// A purge removes everything, including the data of a daemon that ran.
pub(super) fn purge_restores_the_file_tree(root: &DebianRoot, deb: &Path) -> Result {
    root.copy(deb, DEB)?;
    let before = root.files()?;
    root.run("dpkg", &["--install", DEB])?;
    let installed = differences(&before, &root.files()?);
    ensure!(installed.len() > 20, "dpkg installed only {installed:?}");
    root.run("systemctl", &["enable", "boxlite-cri.service"])?;
    fs::create_dir_all(root.path("/var/lib/boxlite/images"))?;
    fs::write(root.path("/etc/boxlite/shim.toml"), "")?;
    root.run("dpkg", &["--remove", "boxlite-cri"])?;
    ensure!(
        root.path(CONFIG).exists(),
        "remove deleted the configuration"
    );
    root.run("dpkg", &["--purge", "boxlite-cri"])?;
    let leaked = differences(&before, &root.files()?);
    ensure!(leaked.is_empty(), "purge left differences: {leaked:?}");
    Ok(())
}

/// The installation succeeds without QEMU and reports the result of `boxlite-cri check`; all libraries are dependencies.
pub(super) fn programs_run_after_installation(root: &DebianRoot, deb: &Path) -> Result {
    let output = install(root, deb)?;
    ensure!(
        output.contains("pods can"),
        "postinst printed no check: {output}"
    );
    for program in PROGRAMS {
        ensure!(root.path(program).is_file(), "{program} not found");
        let (_, libraries) = root.outcome("ldd", &[program])?;
        ensure!(!libraries.contains("not found"), "{program}: {libraries}");
    }
    root.run("boxlite-cri", &["version"])?;
    root.run("boxlite-cri", &["config", "check", "--config", CONFIG])?;
    root.run(SHIM, &["--help"])?;
    let changed = root.run("dpkg", &["--verify", "boxlite-cri"])?;
    same!(changed, "", "files that differ from the package");
    let conffiles = root.run("dpkg-query", &["-W", "-f", "${Conffiles}", "boxlite-cri"])?;
    ensure!(conffiles.contains(CONFIG), "conffiles: {conffiles:?}");
    // The defaults must be the paths of this package.
    let config = root.run("boxlite-cri", &["config", "dump", "--config", CONFIG])?;
    for path in ["/usr/libexec/boxlite/boxlite-guest", SHIM] {
        ensure!(config.contains(path), "{path} is not in {config}");
    }
    root.run("systemctl", &["enable", "boxlite-cri.service"])?;
    let link = root.path("/etc/systemd/system/multi-user.target.wants/boxlite-cri.service");
    ensure!(link.is_symlink(), "the unit was not enabled");
    Ok(())
}

/// Packs an older version with another default configuration and one more file.
fn former(root: &DebianRoot, deb: &Path) -> Result<PathBuf> {
    let work = root.path("/tmp/former");
    let (text, deb) = (work.display().to_string(), deb.display().to_string());
    run("dpkg-deb", &["--raw-extract", &deb, &text])?;
    let control = work.join("DEBIAN/control");
    let fields = fs::read_to_string(&control)?;
    let fields = fields
        .lines()
        .map(|line| match line.starts_with("Version: ") {
            true => "Version: 0.0.1\n".to_owned(),
            false => format!("{line}\n"),
        });
    fs::write(&control, fields.collect::<String>())?;
    let config = work.join(CONFIG.trim_start_matches('/'));
    let default = fs::read_to_string(&config)?;
    fs::write(&config, format!("# 0.0.1\n{default}"))?;
    fs::write(work.join("usr/libexec/boxlite/former"), "")?;
    let packed = work.with_extension("deb");
    let output = packed.display().to_string();
    run(
        "dpkg-deb",
        &["--root-owner-group", "-Znone", "--build", &text, &output],
    )?;
    fs::remove_dir_all(work).during("remove the unpacked package")?;
    Ok(packed)
}

/// An upgrade replaces an unchanged configuration, keeps a changed one, and removes files that the new version lacks.
pub(super) fn upgrade_keeps_changed_configuration(root: &DebianRoot, deb: &Path) -> Result {
    let former = former(root, deb)?;
    let upgrade = ["--force-confold", "--install", DEB];
    install(root, &former)?;
    let file = root.path("/usr/libexec/boxlite/former");
    ensure!(file.exists(), "the former version was not installed");
    root.copy(deb, DEB)?;
    root.run("dpkg", &upgrade)?;
    ensure!(!file.exists(), "a file of the former version remains");
    let unchanged = fs::read_to_string(root.path(CONFIG))?;
    ensure!(
        !unchanged.starts_with("# 0.0.1"),
        "an unchanged conffile was kept"
    );

    root.run("dpkg", &["--purge", "boxlite-cri"])?;
    install(root, &former)?;
    fs::write(root.path(CONFIG), "log_level = \"debug\"\n")?;
    root.copy(deb, DEB)?;
    root.run("dpkg", &upgrade)?;
    let changed = fs::read_to_string(root.path(CONFIG))?;
    same!(
        changed,
        "log_level = \"debug\"\n",
        "configuration after the upgrade"
    );
    let default = root.path("/etc/boxlite/config.toml.dpkg-dist");
    ensure!(
        default.exists(),
        "the new default was not written beside it"
    );
    Ok(())
}

/// Waits until a process returns a line that it is sent.
fn echo(process: &mut Child) -> Result {
    let (Some(input), Some(output)) = (&mut process.stdin, &mut process.stdout) else {
        bail!("no pipes to the process");
    };
    input.write_all(b"ready\n")?;
    let mut line = [0; 6];
    Ok(output.read_exact(&mut line)?)
}

/// The programs of running pods cannot be removed.
pub(super) fn removal_with_pods_is_refused(root: &DebianRoot, deb: &Path) -> Result {
    install(root, deb)?;
    // Any process with the shim's executable counts as a shim. This one runs as soon as it returns a line.
    fs::copy(root.path("/bin/cat"), root.path(SHIM))?;
    let mut shim = root
        .command(SHIM, &[])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let echoed = echo(&mut shim);
    let refused = echoed.and_then(|()| root.outcome("dpkg", &["--remove", "boxlite-cri"]));
    shim.kill()?;
    shim.wait()?;
    let (removed, output) = refused?;
    ensure!(!removed, "the programs of a running pod were removed");
    ensure!(output.contains("pods are running"), "dpkg printed {output}");
    root.run("dpkg", &["--remove", "boxlite-cri"])?;
    ensure!(!root.path(SHIM).exists(), "the shim was not removed");
    Ok(())
}
