//! [`Device`]: a driver for the guest's virtio file system device from user space, which takes the device from the kernel
//! and can put anything into its queues. Registers and rings as in virtio 1.2, sections 2.7 and 4.2 (4.2.4 for QEMU, whose
//! microvm machine has legacy registers). Runs inside a guest.

use super::memory::{Mapping, PAGE};
use crate::ensure;
use crate::failure::{During, Result};
use std::collections::HashSet;
use std::fs;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

/// Device type of a file system (virtio 1.2, section 5.11).
const FILE_SYSTEM: u32 = 26;
/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// Bytes of a device's registers up to its configuration.
const REGISTER_BYTES: usize = 0x100;

/// Registers of a device, by offset.
const MAGIC_VALUE: usize = 0x00;
const VERSION: usize = 0x04;
const DEVICE_ID: usize = 0x08;
const DRIVER_FEATURES: usize = 0x20;
const DRIVER_FEATURES_SELECT: usize = 0x24;
const LEGACY_PAGE_SIZE: usize = 0x28;
const QUEUE_SELECT: usize = 0x30;
const QUEUE_SIZE: usize = 0x38;
const LEGACY_ALIGNMENT: usize = 0x3c;
const LEGACY_PAGE: usize = 0x40;
const QUEUE_READY: usize = 0x44;
const QUEUE_NOTIFY: usize = 0x50;
const STATUS: usize = 0x70;
/// Low halves of the addresses of descriptors, available ring and used ring; the high halves follow.
const QUEUE_ADDRESSES: [usize; 3] = [0x80, 0x90, 0xa0];

/// Values of the status register, one after the other.
const ACKNOWLEDGED: u32 = 1;
const DRIVER: u32 = ACKNOWLEDGED | 2;
const FEATURES_OK: u32 = DRIVER | 8;
const DRIVER_OK: u32 = FEATURES_OK | 4;

/// Flags of a descriptor.
pub(super) const NEXT: u16 = 1;
pub(super) const WRITABLE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// Entries of a queue.
pub(super) const ENTRIES: u16 = 16;
/// Queue of requests; queue 0 is for FORGET and INTERRUPT.
pub(super) const REQUESTS: u32 = 1;

/// Offsets in the page of a queue; the descriptors are at 0. A legacy device computes the same from the alignment.
const AVAILABLE: usize = ENTRIES as usize * 16;
const USED: usize = 512;

/// Pages: one for each queue, then one for a request and the rest for its answer.
const REQUEST: usize = REQUESTS as usize + 1;
const ANSWER: usize = REQUEST + 1;
const ANSWER_PAGES: usize = 4;
/// Bytes of an answer that are kept.
pub(super) const ANSWER_BYTES: usize = ANSWER_PAGES * PAGE;

/// Time in which a device answers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// A buffer as the device sees it.
#[derive(Clone, Copy)]
pub(super) struct Descriptor {
    /// Address in guest memory.
    pub address: u64,
    pub bytes: u32,
    pub flags: u16,
    /// Index of the next one, with NEXT.
    pub next: u16,
}

/// The file system device. While it exists, the kernel's own mounts of it do not answer.
pub(super) struct Device {
    registers: Mapping,
    /// Offset of the registers in their mapping.
    offset: usize,
    memory: Mapping,
    addresses: Vec<u64>,
    /// Chains made available so far, modulo 2^16.
    available: u16,
}

impl Device {
    /// Finds the devices: on libkrun there is one besides the share's.
    pub(super) fn all() -> Result<Vec<Self>> {
        let table = fs::read_to_string("/proc/iomem")?;
        let (mut found, mut seen) = (Vec::new(), HashSet::new());
        for line in table.lines().filter(|line| line.contains("virtio-mmio")) {
            let start = line.trim().split('-').next().unwrap_or_default();
            let start = u64::from_str_radix(start, 16).during(line)?;
            // A device and its driver both have a line.
            if !seen.insert(start) {
                continue;
            }
            let (registers, offset) = Mapping::registers(start, REGISTER_BYTES)?;
            if registers.read_u32(offset + MAGIC_VALUE) != MAGIC
                || registers.read_u32(offset + DEVICE_ID) != FILE_SYSTEM
            {
                continue;
            }
            let memory = Mapping::pages(ANSWER + ANSWER_PAGES)?;
            found.push(Self {
                registers,
                offset,
                addresses: memory.physical()?,
                memory,
                available: 0,
            });
        }
        ensure!(!found.is_empty(), "no virtio file system among\n{table}");
        Ok(found)
    }

    /// Stores a value in a register.
    pub(super) fn set(&self, register: usize, value: u32) {
        fence(Ordering::SeqCst);
        self.registers.write_u32(self.offset + register, value);
        fence(Ordering::SeqCst);
    }

    /// Resets the device and starts it with this driver's queues.
    pub(super) fn start(&mut self) -> Result {
        self.start_with(u32::from(ENTRIES), |address| address)
    }

    /// Starts the device with queues of a size, and their addresses changed.
    pub(super) fn start_with(&mut self, entries: u32, change: fn(u64) -> u64) -> Result {
        self.set(STATUS, 0);
        self.available = 0;
        for page in 0..REQUEST {
            self.memory.write(page * PAGE, &[0; PAGE]);
        }
        self.set(STATUS, ACKNOWLEDGED);
        self.set(STATUS, DRIVER);
        let legacy = self.registers.read_u32(self.offset + VERSION) == 1;
        // VIRTIO_F_VERSION_1, bit 32, and nothing else.
        for (half, features) in [(0, 0), (1, u32::from(!legacy))] {
            self.set(DRIVER_FEATURES_SELECT, half);
            self.set(DRIVER_FEATURES, features);
        }
        if !legacy {
            self.set(STATUS, FEATURES_OK);
            let status = self.registers.read_u32(self.offset + STATUS);
            ensure!(
                status & FEATURES_OK == FEATURES_OK,
                "features refused: status {status:#x}"
            );
        }
        for queue in 0..=REQUESTS {
            let page = self.addresses[queue as usize];
            self.set(QUEUE_SELECT, queue);
            self.set(QUEUE_SIZE, entries);
            if legacy {
                self.set(LEGACY_PAGE_SIZE, PAGE as u32);
                self.set(LEGACY_ALIGNMENT, USED as u32);
                self.set(LEGACY_PAGE, (change(page) / PAGE as u64) as u32);
                continue;
            }
            for (register, at) in QUEUE_ADDRESSES.into_iter().zip([0, AVAILABLE, USED]) {
                let address = change(page + at as u64);
                self.set(register, address as u32);
                self.set(register + 4, (address >> 32) as u32);
            }
            self.set(QUEUE_READY, 1);
        }
        self.set(STATUS, DRIVER_OK);
        Ok(())
    }

    /// Rings the doorbell of a queue.
    pub(super) fn notify(&self, queue: u32) {
        self.set(QUEUE_NOTIFY, queue);
    }

    /// Returns the address of a byte of the request.
    pub(super) fn request_address(&self) -> u64 {
        self.addresses[REQUEST]
    }

    /// Returns descriptors of a request of this length, then of the whole buffer for the answer.
    pub(super) fn chain(&self, request_bytes: usize) -> Vec<Descriptor> {
        let request = Descriptor {
            address: self.addresses[REQUEST],
            bytes: request_bytes as u32,
            flags: NEXT,
            next: 1,
        };
        let answer = (0..ANSWER_PAGES).map(|page| Descriptor {
            address: self.addresses[ANSWER + page],
            bytes: PAGE as u32,
            flags: if page + 1 == ANSWER_PAGES {
                WRITABLE
            } else {
                WRITABLE | NEXT
            },
            next: page as u16 + 2,
        });
        std::iter::once(request).chain(answer).collect()
    }

    /// Writes the bytes of a request, which fit in a page.
    pub(super) fn fill(&self, request: &[u8]) {
        self.memory.write(REQUEST * PAGE, request);
        self.memory.write(ANSWER * PAGE, &[0; ANSWER_BYTES]);
    }

    /// Makes a chain available that begins with the first descriptor, `skip` entries ahead of the right one. Returns the bytes
    /// that the device wrote, or none if it does not answer in time.
    pub(super) fn submit(&mut self, chain: &[Descriptor], skip: u16) -> Option<usize> {
        let descriptors = REQUESTS as usize * PAGE;
        let (available, used) = (descriptors + AVAILABLE, descriptors + USED);
        for (index, descriptor) in chain.iter().enumerate() {
            let mut bytes = descriptor.address.to_le_bytes().to_vec();
            bytes.extend(descriptor.bytes.to_le_bytes());
            bytes.extend(descriptor.flags.to_le_bytes());
            bytes.extend(descriptor.next.to_le_bytes());
            self.memory.write(descriptors + index * 16, &bytes);
        }
        let slot = usize::from(self.available % ENTRIES);
        self.memory.write(available + 4 + slot * 2, &[0, 0]);
        fence(Ordering::SeqCst);
        self.available = self.available.wrapping_add(1);
        let index = self.available.wrapping_add(skip);
        // Flags: no interrupt, since the kernel does not expect one.
        self.memory.write_u32(available, u32::from(index) << 16 | 1);
        self.notify(REQUESTS);
        let until = Instant::now() + ANSWER_TIMEOUT;
        while Instant::now() < until {
            fence(Ordering::SeqCst);
            if (self.memory.read_u32(used) >> 16) as u16 == self.available {
                let bytes = self.memory.read_u32(used + 4 + slot * 8 + 4);
                return Some((bytes as usize).min(ANSWER_BYTES));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// Returns bytes of the answer.
    pub(super) fn answer(&self, bytes: usize) -> Vec<u8> {
        self.memory.read(ANSWER * PAGE, bytes)
    }
}
