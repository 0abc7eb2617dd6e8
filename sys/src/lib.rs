//! System-call helpers shared by the daemon, the shim, the guest agent and the tests.
//!
//! Contains no wire types (those are in `boxlite-proto`), no policy and no knowledge of a VMM.

pub mod ask;
pub mod calendar;
pub mod clock;
pub mod core_dumps;
pub mod descriptors;
pub mod detached_mount;
pub mod file_lock;
pub mod fuse;
pub mod idmap;
pub mod log_line;
pub mod mount_attributes;
pub mod mountinfo;
pub mod proc_memory;
pub mod process;
pub mod replace_file;
pub mod report;
pub mod storage_full;
pub mod sync;
pub mod tcp_table;
pub mod unix_socket;
