//! `boxlite-cri check`: what this machine can run, with reasons, and what is missing. Changes nothing but the probe's kept answer.
//!
//! Exit code: 0 where pods can run, 1 where something they need is missing.

use crate::cni::Cni;
use crate::config::Config;
use crate::layout::Layout;
use crate::vmm;
use boxlite_proto::vmm::VmmKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::ExitCode;

/// Whether a part is needed for a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Always,
    Only(&'static str),
}

/// The verb.
pub async fn check(config: Config) -> ExitCode {
    let mut fine = true;
    let choice = match vmm::choose(&config).await {
        Ok(choice) => {
            println!("{choice}");
            Some(choice)
        }
        Err(error) => {
            println!("no VMM can be chosen: {}", boxlite_runtime::report(&error));
            fine = false;
            None
        }
    };
    let kind = choice.map(|choice| choice.kind);
    for (what, path, need, program) in parts(&config) {
        let problem = problem(path, program);
        let needed = need == Need::Always || needed_by(need, kind.as_ref());
        let word = match (&problem, needed) {
            (None, _) => "found".to_owned(),
            (Some(problem), true) => {
                fine = false;
                format!("MISSING ({problem})")
            }
            (Some(problem), false) => format!("missing ({problem}), not needed for this VMM"),
        };
        println!("{what:<20} {word:<10} {}", path.display());
    }
    let layout = Layout::new(&config.root, &config.state);
    match Cni::new(&config.cni, &layout).ready() {
        Ok(conf) => println!(
            "{:<20} {:<10} {} ({})",
            "network",
            "found",
            conf.source.display(),
            conf.name
        ),
        // A node gets its network after its runtime: a reason to wait, not to fail.
        Err(error) => println!(
            "{:<20} not yet: {}",
            "network",
            boxlite_runtime::report(&error)
        ),
    }
    println!(
        "{}",
        if fine {
            "pods can run"
        } else {
            "pods cannot run"
        }
    );
    if fine {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn parts(config: &Config) -> [(&'static str, &Path, Need, bool); 6] {
    let paths = &config.paths;
    let qemu = Need::Only("qemu");
    [
        ("shim", &paths.shim, Need::Always, true),
        ("guest agent", &paths.guest, Need::Always, true),
        ("guest kernel", &paths.libkrunfw, Need::Always, false),
        ("qemu", &paths.qemu, qemu, true),
        ("virtiofsd", &paths.virtiofsd, qemu, true),
        ("vhost-device-vsock", &paths.vhost_device_vsock, qemu, true),
    ]
}

fn needed_by(need: Need, kind: Option<&VmmKind>) -> bool {
    match (need, kind) {
        (Need::Always, _) => true,
        (Need::Only(name), Some(kind)) => kind.to_string() == name,
        (Need::Only(_), None) => false,
    }
}

/// What is wrong with a file; `None`: nothing.
fn problem(path: &Path, program: bool) -> Option<String> {
    match std::fs::metadata(path) {
        Err(error) => Some(error.to_string()),
        Ok(metadata) if !metadata.is_file() => Some("no file".into()),
        Ok(metadata) if program && metadata.permissions().mode() & 0o111 == 0 => {
            Some("not executable".into())
        }
        Ok(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x");
        assert!(problem(&file, false).unwrap().contains("No such file"));
        assert_eq!(problem(dir.path(), false).unwrap(), "no file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(problem(&file, false), None);
        assert_eq!(problem(&file, true).unwrap(), "not executable");
    }

    #[test]
    fn qemus_helpers_are_needed_by_qemu_only() {
        let helper = Need::Only("qemu");
        assert!(needed_by(helper, Some(&VmmKind::Qemu)));
        assert!(!needed_by(helper, Some(&VmmKind::Krun)));
        assert!(!needed_by(helper, None));
    }
}
