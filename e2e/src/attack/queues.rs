//! Queues, descriptors and doorbells that the specification forbids.

use super::device::{Descriptor, Device, ENTRIES, INDIRECT, NEXT, REQUESTS, WRITABLE};
use super::fuse::Session;
use super::{PAUSE_BEFORE_ATTEMPT, say};
use serde_json::json;

/// Address between the guest's memory and its end, where devices are.
const HOLE: u64 = 0xd000_0000;
/// Address without memory.
const NOWHERE: u64 = u64::MAX - 4095;

/// Input of the device.
enum Attempt {
    /// A chain of one descriptor: address, length, flags, next. Address 0 is the request.
    Chain(u64, u32, u16, u16),
    /// More chains made available than the queue has entries.
    Ahead(u16),
    /// A doorbell.
    Doorbell(u32),
    /// Queues of this size.
    Size(u32),
    /// Rings at other addresses.
    Rings(fn(u64) -> u64),
}

/// Attempts with their names, those that end a VMM last.
const ATTEMPTS: &[(&str, Attempt)] = &[
    ("length 0", Attempt::Chain(0, 0, 0, 0)),
    ("only writable", Attempt::Chain(0, 4096, WRITABLE, 0)),
    ("doorbell of queue 2", Attempt::Doorbell(2)),
    ("doorbell of queue 100", Attempt::Doorbell(100)),
    ("doorbell of the last queue", Attempt::Doorbell(u32::MAX)),
    ("size 0", Attempt::Size(0)),
    ("size 3", Attempt::Size(3)),
    ("size 65535", Attempt::Size(65535)),
    ("length of 4 GiB", Attempt::Chain(0, u32::MAX, 0, 0)),
    (
        "length that wraps",
        Attempt::Chain(u64::MAX - 15, 64, WRITABLE, 0),
    ),
    (
        "address beyond the memory",
        Attempt::Chain(NOWHERE, 4096, 0, 0),
    ),
    ("address in a hole", Attempt::Chain(HOLE, 4096, WRITABLE, 0)),
    ("chain to itself", Attempt::Chain(0, 64, NEXT, 0)),
    (
        "next beyond the queue",
        Attempt::Chain(0, 64, NEXT, u16::MAX),
    ),
    (
        "indirect without the feature",
        Attempt::Chain(0, 64, INDIRECT, 0),
    ),
    (
        "indirect of odd length",
        Attempt::Chain(0, 17, INDIRECT | NEXT, 1),
    ),
    ("more chains than entries", Attempt::Ahead(5000)),
    ("unaligned rings", Attempt::Rings(|address| address + 1)),
    ("rings in a hole", Attempt::Rings(|_| HOLE)),
    ("rings beyond the memory", Attempt::Rings(|_| NOWHERE)),
];

/// Makes the attempts from this number on. Each is printed before it is made, and the device is started again after it, which
/// a VMM may refuse.
pub(super) fn run(session: &mut Session, first: usize) {
    for (number, (name, attempt)) in ATTEMPTS.iter().enumerate().skip(first) {
        say(&json!({"queue": name, "number": number}));
        // The line reaches the host before the VM can end.
        std::thread::sleep(PAUSE_BEFORE_ATTEMPT);
        make(&mut session.device, attempt);
        if let Err(failure) = session.restart() {
            say(&json!({"queue": name, "restart": failure.0}));
        }
    }
}

fn make(device: &mut Device, attempt: &Attempt) {
    let request = device.request_address();
    let chain = |address, bytes, flags, next| Descriptor {
        address,
        bytes,
        flags,
        next,
    };
    device.fill(&[0; 64]);
    match *attempt {
        Attempt::Chain(address, bytes, flags, next) => {
            let address = if address == 0 { request } else { address };
            device.submit(&[chain(address, bytes, flags, next)], 0);
        }
        Attempt::Ahead(skip) => {
            device.submit(&[chain(request, 64, 0, 0)], skip);
        }
        Attempt::Doorbell(queue) => device.notify(queue),
        // A refusal is the right answer.
        Attempt::Size(entries) => drop(device.start_with(entries, |address| address)),
        Attempt::Rings(change) => drop(device.start_with(u32::from(ENTRIES), change)),
    }
    device.notify(REQUESTS);
}
