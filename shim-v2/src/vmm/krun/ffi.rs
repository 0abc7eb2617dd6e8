//! Safe wrappers for libkrun's C interface: strings are checked, negative return values become errors.
//!
//! JUSTIFICATION for unsafe: the crate offers only `extern "C"` functions.

use super::super::step::invalid;
use boxlite_proto::error::{BoxliteError, BoxliteResult};
use std::ffi::CString;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::ptr;

/// A libkrun configuration context, consumed by entering.
pub(super) struct Context(u32);

fn answer(call: &'static str, code: i32) -> BoxliteResult<()> {
    match code {
        0.. => Ok(()),
        errno => Err(BoxliteError::Krun {
            call,
            errno: -errno,
        }),
    }
}

fn c_string(field: &'static str, text: &str) -> BoxliteResult<CString> {
    CString::new(text).map_err(|_| invalid(field, text, "contains a zero byte"))
}

impl Context {
    pub(super) fn create() -> BoxliteResult<Self> {
        let id = krun::krun_create_ctx();
        u32::try_from(id).map(Self).map_err(|_| BoxliteError::Krun {
            call: "krun_create_ctx",
            errno: -id,
        })
    }

    pub(super) fn set_vm_config(&self, vcpus: u8, memory_mib: u32) -> BoxliteResult<()> {
        answer(
            "krun_set_vm_config",
            krun::krun_set_vm_config(self.0, vcpus, memory_mib),
        )
    }

    pub(super) fn disable_implicit_init(&self) -> BoxliteResult<()> {
        answer(
            "krun_disable_implicit_init",
            krun::krun_disable_implicit_init(self.0),
        )
    }

    pub(super) fn disable_implicit_vsock(&self) -> BoxliteResult<()> {
        answer(
            "krun_disable_implicit_vsock",
            krun::krun_disable_implicit_vsock(self.0),
        )
    }

    /// Without TSI the guest's sockets are its own; with TSI, IPv4 and IPv6 sockets are opened in this process.
    pub(super) fn add_vsock(&self, tsi: bool) -> BoxliteResult<()> {
        /// KRUN_TSI_HIJACK_INET of libkrun.h.
        const HIJACK_INET: u32 = 1;
        let features = if tsi { HIJACK_INET } else { 0 };
        answer("krun_add_vsock", krun::krun_add_vsock(self.0, features))
    }

    /// `path` None: a file system of overlay entries only. `dax_bytes` 0: no DAX window.
    pub(super) fn add_virtiofs(
        &self,
        tag: &str,
        path: Option<&str>,
        dax_bytes: u64,
        read_only: bool,
    ) -> BoxliteResult<()> {
        /// Ownership and modes as on the host.
        const LINUX_COMPLETE: u32 = 0;
        let tag = c_string("tag", tag)?;
        let path = path.map(|path| c_string("share_dir", path)).transpose()?;
        let path = path.as_ref().map_or(ptr::null(), |path| path.as_ptr());
        // SAFETY: both pointers are to zero-terminated strings that outlive the call, or null as the header allows for
        // the path; libkrun copies them.
        let code = unsafe {
            krun::krun_add_virtiofs4(
                self.0,
                tag.as_ptr(),
                path,
                dax_bytes,
                read_only,
                LINUX_COMPLETE,
            )
        };
        answer("krun_add_virtiofs4", code)
    }

    /// Adds a read-only file with the contents `data`.
    pub(super) fn add_overlay_file(
        &self,
        tag: &str,
        path: &str,
        data: &'static [u8],
        mode: u32,
    ) -> BoxliteResult<()> {
        let (tag, path) = (c_string("tag", tag)?, c_string("path", path)?);
        // SAFETY: the strings outlive the call; libkrun keeps the pointer `data`, which is 'static.
        let code = unsafe {
            krun::krun_fs_add_overlay_file(
                self.0,
                tag.as_ptr(),
                path.as_ptr(),
                data.as_ptr(),
                data.len(),
                mode,
                false,
            )
        };
        answer("krun_fs_add_overlay_file", code)
    }

    pub(super) fn add_overlay_dir(&self, tag: &str, path: &str, mode: u32) -> BoxliteResult<()> {
        let (tag, path) = (c_string("tag", tag)?, c_string("path", path)?);
        // SAFETY: both strings outlive the call; libkrun copies them.
        let code =
            unsafe { krun::krun_fs_add_overlay_dir(self.0, tag.as_ptr(), path.as_ptr(), mode) };
        answer("krun_fs_add_overlay_dir", code)
    }

    /// Adds a raw image with `id` as its serial.
    pub(super) fn add_disk(&self, id: &str, path: &str, read_only: bool) -> BoxliteResult<()> {
        const RAW: u32 = 0;
        /// The guest's flushes reach the file (fdatasync) but not the disk: a scratch disk does not outlive its host.
        const SYNC_RELAXED: u32 = 1;
        let (id, path) = (c_string("disks.serial", id)?, c_string("disks.path", path)?);
        // SAFETY: both strings outlive the call; libkrun copies them.
        let code = unsafe {
            krun::krun_add_disk3(
                self.0,
                id.as_ptr(),
                path.as_ptr(),
                RAW,
                read_only,
                false,
                SYNC_RELAXED,
            )
        };
        answer("krun_add_disk3", code)
    }

    /// Adds a NIC on an existing tap, found by name in this process's network namespace.
    pub(super) fn add_net_tap(&self, tap: &str, mac: &[u8; 6], features: u32) -> BoxliteResult<()> {
        let tap = c_string("nics.tap", tap)?;
        // SAFETY: the string outlives the call, `mac` has the six bytes that are read; libkrun copies both.
        let code =
            unsafe { krun::krun_add_net_tap(self.0, tap.as_ptr(), mac.as_ptr(), features, 0) };
        answer("krun_add_net_tap", code)
    }

    /// Adds a NIC whose frames pass through a connected stream socket, each after its length.
    pub(super) fn add_net_stream(
        &self,
        socket: OwnedFd,
        mac: &[u8; 6],
        features: u32,
    ) -> BoxliteResult<()> {
        let socket = socket.into_raw_fd();
        // SAFETY: a null path means the descriptor, whose owner is libkrun from here on; `mac` has the six bytes that are read
        // and copied.
        let code = unsafe {
            krun::krun_add_net_unixstream(self.0, ptr::null(), socket, mac.as_ptr(), features, 0)
        };
        answer("krun_add_net_unixstream", code)
    }

    /// Connects a vsock port to a unix socket. If `listen`, the host connects, otherwise the guest.
    pub(super) fn add_vsock_port(&self, port: u32, path: &str, listen: bool) -> BoxliteResult<()> {
        let path = c_string("work_dir", path)?;
        // SAFETY: the string outlives the call; libkrun copies it.
        let code = unsafe { krun::krun_add_vsock_port2(self.0, port, path.as_ptr(), listen) };
        answer("krun_add_vsock_port2", code)
    }

    pub(super) fn set_console_output(&self, path: &str) -> BoxliteResult<()> {
        let path = c_string("console", path)?;
        // SAFETY: the string outlives the call; libkrun copies it.
        let code = unsafe { krun::krun_set_console_output(self.0, path.as_ptr()) };
        answer("krun_set_console_output", code)
    }

    /// Adds a word to the kernel's command line: libkrun passes the entrypoint's environment there in quotes, which the kernel
    /// removes. Must not carry secrets.
    pub(super) fn add_kernel_word(&self, word: &str) -> BoxliteResult<()> {
        /// Number of pointers that libkrun reads, however many are set (MAX_ARGS).
        const POINTERS: usize = 4096;
        let word = c_string("debug_console", word)?;
        let mut environment = vec![ptr::null(); POINTERS];
        environment[0] = word.as_ptr();
        // SAFETY: the array has all the elements that libkrun reads and is terminated by nulls; it and the string outlive the
        // call; libkrun copies them.
        let code = unsafe { krun::krun_set_env(self.0, environment.as_ptr()) };
        answer("krun_set_env", code)
    }

    /// Runs the VM. Returns only the error that kept it from starting.
    pub(super) fn start_enter(self) -> BoxliteError {
        BoxliteError::Krun {
            call: "krun_start_enter",
            errno: -krun::krun_start_enter(self.0),
        }
    }
}

/// Sends libkrun's errors to standard error. Its warnings include one per closed vsock connection.
pub(super) fn log_errors() {
    const STDERR: i32 = 2;
    const ERROR: u32 = 1;
    const STYLE_NEVER: u32 = 2;
    const NO_ENVIRONMENT: u32 = 1;
    // SAFETY: with a standard stream as target no descriptor is transferred.
    unsafe { krun::krun_init_log(STDERR, ERROR, STYLE_NEVER, NO_ENVIRONMENT) };
}
