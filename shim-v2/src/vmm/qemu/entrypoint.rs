//! Step 3: kernel, root file system with the agent, command line, console.
//!
//! The root is a read-only EROFS image of the agent and some empty directories, created once per agent binary, so pods share
//! its page cache.

use super::context::Context;
use super::{derived, kernel};
use crate::vmm::step::{StepExt, require};
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Mount points needed in the read-only root by the agent and, for /dev, by the kernel.
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
    // Standard output is a pipe to the shim, which bounds the log.
    context.option("-chardev", "file,id=console,path=/proc/self/fd/1");
    context.option("-device", "virtio-serial-device");
    context.option("-device", "virtconsole,chardev=console");
    let verbosity = if spec.debug_console {
        "ignore_loglevel"
    } else {
        "quiet"
    };
    let words = [
        verbosity,
        "panic=-1",
        "console=hvc0",
        "root=/dev/vda",
        "rootfstype=erofs",
        "ro",
        "init=/init",
        // The RTC driver takes IRQ 8, which is that of the fifth virtio device. It is not needed: the kernel reads the time at
        // boot without it.
        "initcall_blacklist=cmos_init",
    ];
    context.kernel_words.extend(words.map(str::to_owned));
    context.read_only.extend([kernel, root]);
    Ok(())
}

/// Returns the root image for the agent at `guest`, created if the cache lacks it.
fn agent_image(guest: &Path, cache: &Path) -> BoxliteResult<PathBuf> {
    derived::obtain(cache, "agent", guest, "erofs", |draft| {
        let step = || format!("create the agent's image {}", draft.display());
        let archive = pack(guest).step(step())?;
        let file = File::create_new(draft).step(step())?;
        let mut archive = archive.as_slice();
        let target = boxlite_erofs::Target {
            file: &file,
            path: draft,
            scratch: cache,
            cancelled: &|| false,
        };
        boxlite_erofs::write_image(&mut archive, "the agent's image", target).step(step())
    })
}

/// Returns a tar archive with the agent as /init and the mount points.
fn pack(guest: &Path) -> std::io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    for name in DIRECTORIES {
        header.set_entry_type(tar::EntryType::Directory);
        header.set_size(0);
        archive.append_data(&mut header, format!("{name}/"), std::io::empty())?;
    }
    let agent = File::open(guest)?;
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(agent.metadata()?.len());
    archive.append_data(&mut header, "init", agent)?;
    archive.into_inner()
}
