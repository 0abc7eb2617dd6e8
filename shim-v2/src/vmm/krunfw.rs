//! `libkrunfw.so.5`, the guest kernel as a shared library, loaded by absolute path independent of the linker's path.
//!
//! libkrun opens it later by its soname, and glibc then finds the copy loaded here. The Qemu side extracts the raw image. The
//! library remains loaded because libkrun maps the image into the guest.
//!
//! JUSTIFICATION for unsafe: loading a shared library and reading the image it returns requires it.

use super::step::{StepExt, require};
use boxlite_proto::error::{BoxliteError, BoxliteResult};
use std::path::Path;

/// Maximum size of a kernel image in bytes; the real one has 21 MiB.
const MAX_IMAGE_BYTES: usize = 256 << 20;

/// The kernel of libkrunfw in memory.
pub(crate) struct KernelImage {
    /// Raw image, loaded at `load_address`.
    pub(crate) bytes: &'static [u8],
    /// Guest-physical address of its first byte.
    pub(crate) load_address: u64,
}

/// Loads the library for the rest of the process's lifetime.
pub(crate) fn load(path: &Path) -> BoxliteResult<&'static libloading::os::unix::Library> {
    require("libkrunfw", path)?;
    let flags = libloading::os::unix::RTLD_NOW | libloading::os::unix::RTLD_GLOBAL;
    // SAFETY: libkrunfw has no initializers, only data and three getters. The path is the installation's, not a pod's.
    let library = unsafe { libloading::os::unix::Library::open(Some(path), flags) };
    let library = library.step(format!("load the guest kernel {}", path.display()))?;
    Ok(Box::leak(Box::new(library)))
}

/// Returns the image in the library at `path`.
pub(crate) fn kernel_image(path: &Path) -> BoxliteResult<KernelImage> {
    type GetKernel = unsafe extern "C" fn(*mut u64, *mut u64, *mut usize) -> *const u8;
    let library = load(path)?;
    // SAFETY: the signature is the one of libkrunfw's public header since version 3.
    let get_kernel = unsafe { library.get::<GetKernel>(b"krunfw_get_kernel") };
    let get_kernel = get_kernel.step("find krunfw_get_kernel")?;
    let (mut load_address, mut entry, mut size) = (0u64, 0u64, 0usize);
    // SAFETY: the three pointers refer to live, writable locals of the types in the header.
    let data = unsafe { get_kernel(&mut load_address, &mut entry, &mut size) };
    if data.is_null() || size == 0 || size > MAX_IMAGE_BYTES {
        return Err(BoxliteError::Missing {
            what: "a kernel image in libkrunfw",
            path: path.display().to_string(),
            source: None,
        });
    }
    // SAFETY: the library returns its own constant data of `size` bytes and is never unloaded (leaked above).
    let bytes = unsafe { std::slice::from_raw_parts(data, size) };
    Ok(KernelImage {
        bytes,
        load_address,
    })
}
