//! Selection of a task's VM: annotations, their permission, and the shim's TOML file. Annotations of pods are tested in
//! [`super::pods`].

use super::daemon::run_args;
use super::tasks::{succeeded, text};
use super::{Case, Context};
use crate::case;
use crate::context::Backend;
use crate::failure::{During, Failure, Result};
use crate::{ensure, process, same};
use std::ops::RangeInclusive;

/// Returns the cases.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(annotations_are_refused_unless_allowed, 60),
        case!(annotations_configure_the_vm, 90),
        case!(runtime_option_names_the_config_file, 60),
    ]
}

/// Range of MemTotal in KiB in a VM of 128 MiB plus 100 MiB for the guest; libkrun rounds up. Without the annotation it is
/// over 300 MiB.
const SMALL_VM_KIB: RangeInclusive<u64> = (130 << 10)..=(230 << 10);
/// Prints the input of [`sizes`].
const SIZES_SCRIPT: &str = "nproc; grep MemTotal /proc/meminfo";

/// Parses the number of CPUs and the memory in KiB.
fn sizes(text: &str) -> Result<(u32, u64)> {
    let mut words = text.split_whitespace();
    let vcpus = words.next().and_then(|word| word.parse().ok());
    let kib = words.nth(1).and_then(|word| word.parse().ok());
    vcpus
        .zip(kib)
        .ok_or_else(|| Failure(format!("no sizes in {text:?}")))
}

async fn annotations_are_refused_unless_allowed(ctx: Context) -> Result {
    let ctr = &ctx.shared;
    let flag = ctx.version.annotation_flag();
    let vcpus = ["--rm", flag, "io.boxlite.vcpus=2"];
    let refused = ctr.run(&vcpus, "ann1", &["nproc"]).await?;
    let words = text(&refused.stderr);
    ensure!(
        words.contains("io.boxlite.vcpus") && words.contains("allowed_annotations"),
        "{words}"
    );
    ctr.output(&["container", "delete", "ann1"]).await?;
    let allowed = ctx
        .dedicated_daemon("ann", |options| {
            options.shim = "allowed_annotations = [\"io.boxlite.vcpus\"]".into()
        })
        .await?;
    let output = allowed.run(&vcpus, "ann2", &["nproc"]).await?;
    same!(succeeded(&output)?, "2", "CPUs");
    let flags = ["--rm", flag, "io.boxlite.speed=9"];
    let words = text(&allowed.run(&flags, "ann3", &["nproc"]).await?.stderr);
    ensure!(
        words.contains("unknown annotation io.boxlite.speed"),
        "{words}"
    );
    Ok(())
}

/// All five annotations at once, with a file that has other values.
async fn annotations_configure_the_vm(ctx: Context) -> Result {
    const ALL: [&str; 5] = ["vmm", "vcpus", "memory-mib", "kernel", "debug-console"];
    let kernel = ctx.scratch.join("other-libkrunfw.so");
    std::fs::copy(&ctx.install.libkrunfw, &kernel).during("failed to copy the guest kernel")?;
    let daemon = ctx
        .dedicated_daemon("cho", |options| {
            options.vmm = match ctx.backend {
                Backend::Qemu => "krun".to_owned(),
                Backend::Krun => "qemu".to_owned(),
            };
            let names = ALL.map(|name| format!("io.boxlite.{name}"));
            options.shim = format!("allowed_annotations = {names:?}");
        })
        .await?;
    let kernel = kernel.display().to_string();
    let values = [ctx.backend.vmm(), "2", "128", &kernel, "true"];
    let annotations = ALL.iter().zip(values);
    let annotations: Vec<_> = annotations
        .map(|(name, value)| format!("io.boxlite.{name}={value}"))
        .collect();
    let flag = ctx.version.annotation_flag();
    let mut flags = vec!["-d"];
    flags.extend(
        annotations
            .iter()
            .flat_map(|annotation| [flag, annotation.as_str()]),
    );
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
        SIZES_SCRIPT,
    ];
    let (vcpus, kib) = sizes(&daemon.ok(&exec).await?)?;
    same!(vcpus, 2, "CPUs");
    ensure!(SMALL_VM_KIB.contains(&kib), "{kib} KiB of memory");
    let (_, below) = process::family("chosen")?;
    let qemu = process::pids(&["qemu-system"])?;
    same!(
        below.iter().any(|pid| qemu.contains(pid)),
        ctx.backend == Backend::Qemu,
        "QEMU is running"
    );
    let console = daemon.bundle("default", "chosen").join("vm/console.log");
    let console = std::fs::read_to_string(&console).during(console.display())?;
    // The first lines may be missing.
    ensure!(console.contains("as init process"), "{console}");
    daemon.remove("chosen").await?;
    // A file that is not a kernel: a VM that uses it cannot boot.
    let busybox = ctx.install.busybox.display().to_string();
    let annotation = format!("io.boxlite.kernel={busybox}");
    let refused = daemon
        .run(
            &["--rm", flag, &annotation, flag, &annotations[0]],
            "odd",
            &["true"],
        )
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

async fn runtime_option_names_the_config_file(ctx: Context) -> Result {
    let path = ctx.scratch.join("other.toml");
    let text_of = std::fs::read_to_string(ctx.shared.dir.join("shim.toml"))?;
    std::fs::write(
        &path,
        format!("{text_of}\n[pod]\nvcpus = 2\nmemory_mib = 128\n"),
    )?;
    let flag = path.display().to_string();
    let output = ctx
        .shared
        .run(
            &["--rm", "--runtime-config-path", &flag],
            "cfg1",
            &["sh", "-c", SIZES_SCRIPT],
        )
        .await?;
    let (vcpus, kib) = sizes(&succeeded(&output)?)?;
    same!(vcpus, 2, "CPUs");
    ensure!(SMALL_VM_KIB.contains(&kib), "{kib} KiB of memory");
    std::fs::write(&path, "vmmm = \"qemu\"\n")?;
    let output = ctx
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
    ctx.shared
        .output(&["container", "delete", "cfg2"])
        .await
        .map(drop)
}
