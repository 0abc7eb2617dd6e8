//! The test VM: 64 KiB of memory, one vCPU in long mode, 69 bytes of code that report by one `out`.
//!
//! JUSTIFICATION for unsafe: KVM takes guest memory as an address of this process and runs its contents.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::path::Path;

/// Guest memory; KVM requires whole pages.
#[repr(C, align(4096))]
struct Memory([u8; MEMORY]);

/// Size of guest memory in bytes, from guest physical address 0.
const MEMORY: usize = 0x10000;
const CODE_AT: usize = 0x1000;
const STACK_TOP: u64 = 0x7000;
/// Page tables: one 2 MiB page maps all memory.
const PML4: usize = 0x9000;
const PDPT: usize = 0xa000;
const PD: usize = 0xb000;
/// Flags "present" and "writable"; the last level adds "large page".
const TABLE: u64 = 0x3;
const LARGE: u64 = 0x83;
const REPORT_PORT: u16 = 0x80;
const DONE: u8 = 0x42;
/// Maximum number of exits before the report: one suffices, signals may add some.
const MAX_EXITS: u32 = 100;

/// movd and paddd (SSE2) with a check of the result; lock cmpxchg16b at 0x7000 with a check of the stored value; cpuid; then
/// `out 0x80` with 0x42, or 0xee if a check failed.
const CODE: [u8; 69] = [
    0xb8, 0x11, 0x00, 0x00, 0x00, 0x66, 0x0f, 0x6e, 0xc0, 0x66, 0x0f, 0xfe, 0xc0, 0x66, 0x0f, 0x7e,
    0xc1, 0x83, 0xf9, 0x22, 0x75, 0x2a, 0x31, 0xc0, 0x31, 0xd2, 0xbb, 0x01, 0x00, 0x00, 0x00, 0xb9,
    0x02, 0x00, 0x00, 0x00, 0xbf, 0x00, 0x70, 0x00, 0x00, 0xf0, 0x48, 0x0f, 0xc7, 0x0f, 0x75, 0x10,
    0x48, 0x83, 0x7f, 0x08, 0x02, 0x75, 0x09, 0x31, 0xc0, 0x0f, 0xa2, 0xb0, 0x42, 0xe6, 0x80, 0xf4,
    0xb0, 0xee, 0xe6, 0x80, 0xf4,
];

/// Error of a test VM.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    /// The device exists but cannot be used as KVM.
    #[error("failed to use {device}: {step}: {source}")]
    Kvm {
        device: String,
        step: &'static str,
        source: kvm_ioctls::Error,
    },
    /// The vCPU exited for a reason that the code does not cause.
    #[error("{exit}")]
    Exit { exit: String },
}

/// Runs the VM and returns a description of it.
///
/// # Errors
/// The failed step with KVM's error, or the unexpected exit.
pub(crate) fn run(device: &Path) -> Result<String, ProbeError> {
    let name = device.display().to_string();
    let failed = |step| {
        let device = name.clone();
        move |source| ProbeError::Kvm {
            device,
            step,
            source,
        }
    };
    let path = std::ffi::CString::new(device.as_os_str().as_encoded_bytes());
    let path = path.map_err(|_| failed("open")(kvm_ioctls::Error::new(nix::libc::EINVAL)))?;
    let kvm = Kvm::new_with_path(path).map_err(failed("open"))?;
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    let mut memory = Box::new(Memory([0; MEMORY]));
    fill(&mut memory.0);
    // KVM writes to it from now on: never freed and never read. The process exits soon.
    let memory = Box::into_raw(memory);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory as u64,
    };
    // SAFETY: the region is the page-aligned allocation above, which lives until the process exits and is not accessed by Rust.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = prepare(&kvm, &vm).map_err(failed("set up the vCPU"))?;
    for _ in 0..MAX_EXITS {
        let exit = match vcpu.run().map_err(failed("KVM_RUN"))? {
            VcpuExit::IoOut(REPORT_PORT, [DONE]) => {
                return Ok("ran long mode, SSE2, cmpxchg16b and cpuid".to_owned());
            }
            VcpuExit::IoOut(REPORT_PORT, data) => {
                format!("guest code computed a wrong result (out {data:02x?})")
            }
            VcpuExit::Intr => continue,
            VcpuExit::InternalError => "KVM_EXIT_INTERNAL_ERROR".to_owned(),
            VcpuExit::FailEntry(reason, _) => {
                format!("KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x}")
            }
            VcpuExit::Shutdown => "KVM_EXIT_SHUTDOWN (triple fault)".to_owned(),
            other => format!("unexpected exit {other:?}"),
        };
        return Err(ProbeError::Exit { exit });
    }
    Err(ProbeError::Exit {
        exit: format!("{MAX_EXITS} exits without a report"),
    })
}

fn fill(memory: &mut [u8]) {
    memory[CODE_AT..CODE_AT + CODE.len()].copy_from_slice(&CODE);
    for (at, entry) in [
        (PML4, PDPT as u64 | TABLE),
        (PDPT, PD as u64 | TABLE),
        (PD, LARGE),
    ] {
        memory[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }
}

fn prepare(kvm: &Kvm, vm: &VmFd) -> Result<VcpuFd, kvm_ioctls::Error> {
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut special = vcpu.get_sregs()?;
    // Flat 64-bit code and data segments (Intel SDM volume 3, 3.4.5).
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 8,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 16,
        type_: 3,
        l: 0,
        db: 1,
        ..code
    };
    special.cs = code;
    special.ds = data;
    special.es = data;
    special.fs = data;
    special.gs = data;
    special.ss = data;
    special.cr3 = PML4 as u64;
    // PAE, OSFXSR, OSXMMEXCPT.
    special.cr4 = 1 << 5 | 1 << 9 | 1 << 10;
    // PE, MP, ET, NE, WP, PG.
    special.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
    // LME, LMA.
    special.efer = 1 << 8 | 1 << 10;
    vcpu.set_sregs(&special)?;
    let mut registers = vcpu.get_regs()?;
    registers.rip = CODE_AT as u64;
    registers.rsp = STACK_TOP;
    registers.rflags = 2;
    vcpu.set_regs(&registers)?;
    Ok(vcpu)
}
