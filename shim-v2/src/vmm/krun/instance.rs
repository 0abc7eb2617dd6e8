//! Step 8: the jail's files, and entering the VM.

use super::ffi::Context;
use super::kvm;
use crate::jail::{self, HostFiles, ProcFiles, Process};
use crate::vmm::passt;
use crate::vmm::step::StepExt;
use crate::vmm::{VmmInstance, VmmInstanceImpl};
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::exit::ExitCode;
use boxlite_proto::vmm::InstanceSpec;
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

struct KrunInstance {
    context: Context,
    spec: InstanceSpec,
    /// Shows the end of passt.
    passt: Option<OwnedFd>,
}

pub(super) fn create(context: Context, spec: InstanceSpec, passt: Option<OwnedFd>) -> VmmInstance {
    VmmInstance::new(KrunInstance {
        context,
        spec,
        passt,
    })
}

/// Ends the VM with passt: libkrun would go on without a network.
fn watch_passt(socket: OwnedFd) -> BoxliteResult<()> {
    let watch = move || {
        match passt::wait_closed(&socket) {
            Ok(()) => eprintln!("vmm: passt exited"),
            Err(error) => eprintln!("vmm: failed to watch passt: {error}"),
        }
        std::process::exit(ExitCode::VmmStart as i32)
    };
    // Not joined: it ends with passt, or with this process.
    let thread = std::thread::Builder::new().name("passt-watch".to_owned());
    thread.spawn(watch).map(drop).step("start a thread")
}

impl VmmInstanceImpl for KrunInstance {
    fn host_files(&self) -> HostFiles {
        let spec = &self.spec;
        let (read_only, writable): (Vec<_>, Vec<_>) =
            spec.disks.iter().partition(|disk| disk.read_only);
        let path = |disk: &boxlite_proto::vmm::Disk| disk.path.clone();
        let mut read_write = vec![PathBuf::from(kvm::DEVICE)];
        if !spec.nics.is_empty() {
            read_write.push(PathBuf::from("/dev/net/tun"));
        }
        read_write.extend(writable.into_iter().map(path));
        HostFiles {
            read_only: read_only.into_iter().map(path).collect(),
            optional: Vec::new(),
            read_write,
            share: spec.share_dir.clone(),
            // Its file server follows names of the guest. The rest of /proc leads to the VMM's memory.
            proc: ProcFiles::OwnDescriptors,
            work_dir: spec.work_dir.clone(),
        }
    }

    fn enter(self: Box<Self>) -> BoxliteResult<Infallible> {
        let process = Process::Krun {
            internet: self.spec.host_network,
        };
        kvm::check(Path::new(kvm::DEVICE))?;
        jail::allow_only(process).step("install the system call filter")?;
        if let Some(socket) = self.passt {
            watch_passt(socket)?;
        }
        Err(self.context.start_enter())
    }
}
