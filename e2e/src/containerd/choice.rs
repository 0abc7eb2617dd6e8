//! What chooses a task's VM: annotations, where they are allowed, and the shim's TOML file. Those of pods are in [`super::pods`].

use super::daemon::run_args;
use super::tasks::{succeeded, text};
use super::{Case, Shared};
use crate::outcome::{During, Failure, Result};
use crate::runner::case;
use crate::world::Home;
use crate::{ensure, process, same};
use std::ops::RangeInclusive;

/// All of them.
pub fn cases() -> Vec<Case> {
    vec![
        case("choice::annotations_only_where_allowed", 60, refused),
        case("choice::annotations_make_the_vm", 90, annotations),
        case("choice::a_file_by_runtime_option", 60, file),
    ]
}

/// KiB that the kernel of a VM of 128 MiB and 64 of overhead counts; libkrun rounds up. Without a wish it is over 300 MiB.
const SMALL: RangeInclusive<u64> = (130 << 10)..=(230 << 10);
/// Prints what [`sizes`] reads.
const SIZES: &str = "nproc; grep MemTotal /proc/meminfo";

/// CPUs, and KiB of memory.
fn sizes(text: &str) -> Result<(u32, u64)> {
    let mut words = text.split_whitespace();
    let vcpus = words.next().and_then(|word| word.parse().ok());
    let kib = words.nth(1).and_then(|word| word.parse().ok());
    vcpus
        .zip(kib)
        .ok_or_else(|| Failure(format!("no sizes in {text:?}")))
}

async fn refused(lab: Shared) -> Result {
    let ctr = &lab.shared;
    let flag = lab.version.annotation_flag();
    let vcpus = ["--rm", flag, "io.boxlite.vcpus=2"];
    let refused = ctr.run(&vcpus, "ann1", &["nproc"]).await?;
    let words = text(&refused.stderr);
    ensure!(
        words.contains("io.boxlite.vcpus") && words.contains("allowed_annotations"),
        "{words}"
    );
    ctr.output(&["container", "delete", "ann1"]).await?;
    let allowed = lab
        .own("ann", |options| {
            options.shim = "allowed_annotations = [\"io.boxlite.vcpus\"]".into()
        })
        .await?;
    let output = allowed.run(&vcpus, "ann2", &["nproc"]).await?;
    same!(succeeded(&output)?, "2", "CPUs");
    let flags = ["--rm", flag, "io.boxlite.speed=9"];
    let words = text(&allowed.run(&flags, "ann3", &["nproc"]).await?.stderr);
    ensure!(
        words.contains("io.boxlite.speed") && words.contains("not known"),
        "{words}"
    );
    Ok(())
}

/// All five at once, against a file that says otherwise.
async fn annotations(lab: Shared) -> Result {
    const ALL: [&str; 5] = ["vmm", "vcpus", "memory-mib", "kernel", "debug-console"];
    let kernel = lab.scratch.join("other-libkrunfw.so");
    std::fs::copy(&lab.install.libkrunfw, &kernel).during("copying the guest kernel")?;
    let daemon = lab
        .own("cho", |options| {
            options.vmm = match lab.home {
                Home::Qemu => "krun".to_owned(),
                Home::Krun => "qemu".to_owned(),
            };
            let names = ALL.map(|name| format!("io.boxlite.{name}"));
            options.shim = format!("allowed_annotations = {names:?}");
        })
        .await?;
    let kernel = kernel.display().to_string();
    let values = [lab.home.vmm(), "2", "128", &kernel, "true"];
    let wishes = ALL.iter().zip(values);
    let wishes: Vec<_> = wishes
        .map(|(name, value)| format!("io.boxlite.{name}={value}"))
        .collect();
    let flag = lab.version.annotation_flag();
    let mut flags = vec!["-d"];
    flags.extend(wishes.iter().flat_map(|wish| [flag, wish.as_str()]));
    daemon
        .ok(&run_args(&flags, "chosen", &["sleep", "600"]))
        .await?;
    let exec = [
        "task",
        "exec",
        "--exec-id",
        "e",
        "chosen",
        "sh",
        "-c",
        SIZES,
    ];
    let (vcpus, kib) = sizes(&daemon.ok(&exec).await?)?;
    same!(vcpus, 2, "CPUs");
    ensure!(SMALL.contains(&kib), "{kib} KiB of memory");
    let (_, below) = process::family("chosen")?;
    let qemu = process::pids(&["qemu-system"])?;
    same!(
        below.iter().any(|pid| qemu.contains(pid)),
        lab.home == Home::Qemu,
        "whether QEMU runs"
    );
    let console = daemon.bundle("default", "chosen").join("vm/console.log");
    let console = std::fs::read_to_string(&console).during(console.display())?;
    // The first lines may be cut off.
    ensure!(console.contains("as init process"), "{console}");
    daemon.remove("chosen").await?;
    // A file that is no kernel: whoever follows the wish cannot boot.
    let busybox = lab.install.busybox.display().to_string();
    let wish = format!("io.boxlite.kernel={busybox}");
    let refused = daemon
        .run(&["--rm", flag, &wish, flag, &wishes[0]], "odd", &["true"])
        .await?;
    ensure!(
        !refused.status.success() && text(&refused.stderr).contains(&busybox),
        "{}",
        text(&refused.stderr)
    );
    daemon
        .output(&["container", "delete", "odd"])
        .await
        .map(drop)
}

async fn file(lab: Shared) -> Result {
    let path = lab.scratch.join("other.toml");
    let text_of = std::fs::read_to_string(lab.shared.dir.join("shim.toml"))?;
    std::fs::write(
        &path,
        format!("{text_of}\n[pod]\nvcpus = 2\nmemory_mib = 128\n"),
    )?;
    let flag = path.display().to_string();
    let output = lab
        .shared
        .run(
            &["--rm", "--runtime-config-path", &flag],
            "cfg1",
            &["sh", "-c", SIZES],
        )
        .await?;
    let (vcpus, kib) = sizes(&succeeded(&output)?)?;
    same!(vcpus, 2, "CPUs");
    ensure!(SMALL.contains(&kib), "{kib} KiB of memory");
    std::fs::write(&path, "vmmm = \"qemu\"\n")?;
    let output = lab
        .shared
        .run(
            &["--rm", "--runtime-config-path", &flag],
            "cfg2",
            &["nproc"],
        )
        .await?;
    ensure!(
        text(&output.stderr).contains("vmmm"),
        "{}",
        text(&output.stderr)
    );
    lab.shared
        .output(&["container", "delete", "cfg2"])
        .await
        .map(drop)
}
