//! Step 3: kernel, root with the agent, command line, console.
//!
//! The root is a read-only EROFS image of the agent and some empty directories, made once per agent binary: pods share
//! its page cache.

use super::context::Context;
use super::kernel;
use crate::vmm::step::{StepExt, require};
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;
use std::path::{Path, PathBuf};

/// Mount points the agent and, for /dev, the kernel need in a root that cannot be written.
const DIRECTORIES: [&str; 6] = ["dev", "proc", "sys", "run", "tmp", "etc"];

pub(super) fn configure(context: &mut Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    require("the agent", &spec.installation.guest)?;
    let kernel = kernel::bootable(&spec.installation.libkrunfw, &context.cache)?;
    let root = agent_image(&spec.installation.guest, &context.cache)?;
    context.option("-kernel", kernel.display().to_string());
    let drive = format!(
        "file={},if=none,id=agent,format=raw,readonly=on,file.locking=off",
        root.display()
    );
    context.option("-drive", drive);
    context.option("-device", "virtio-blk-device,drive=agent,serial=agent");
    // Standard output is a pipe to the shim, which bounds what it keeps.
    context.option("-chardev", "file,id=console,path=/proc/self/fd/1");
    context.option("-device", "virtio-serial-device");
    context.option("-device", "virtconsole,chardev=console");
    let volume = if spec.debug_console {
        "ignore_loglevel"
    } else {
        "quiet"
    };
    let words = [
        volume,
        "panic=-1",
        "console=hvc0",
        "root=/dev/vda",
        "rootfstype=erofs",
        "ro",
        "init=/init",
    ];
    context.kernel_words.extend(words.map(str::to_owned));
    context.read_only.extend([kernel, root]);
    Ok(())
}

/// The root image for the agent at `guest`; made now if the cache has none.
fn agent_image(guest: &Path, cache: &Path) -> BoxliteResult<PathBuf> {
    let file = cache.join(format!("agent-{}.erofs", kernel::identity(guest)?));
    if file.exists() {
        return Ok(file);
    }
    let draft = cache.join(format!("agent-{}.dir", std::process::id()));
    let made = fill(&draft, guest).and_then(|()| make_erofs(&draft, &file));
    std::fs::remove_dir_all(&draft).step("removing the agent image's directory")?;
    made?;
    Ok(file)
}

fn fill(directory: &Path, guest: &Path) -> BoxliteResult<()> {
    let step = || "filling the agent image".to_owned();
    for name in DIRECTORIES {
        std::fs::create_dir_all(directory.join(name)).step(step())?;
    }
    let init = directory.join("init");
    std::fs::copy(guest, &init).step(step())?;
    std::fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .step(step())
}

fn make_erofs(directory: &Path, file: &Path) -> BoxliteResult<()> {
    let step = "running mkfs.erofs";
    let made = std::process::Command::new("mkfs.erofs")
        .arg("--quiet")
        .arg(file)
        .arg(directory)
        .status()
        .step(step)?;
    match made.success() {
        true => Ok(()),
        false => Err(std::io::Error::other(made.to_string())).step(step),
    }
}
