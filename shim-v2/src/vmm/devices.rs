//! What of a spec every VMM checks alike: sizes, device slots, names. Each VMM's own limits come in as its capabilities.

use super::VmmCapabilities;
use super::step::invalid;
use boxlite_proto::error::{BoxliteError, BoxliteResult};
use boxlite_proto::vmm::InstanceSpec;

/// Longest serial number a virtio-blk device can report, in bytes (VIRTIO_BLK_ID_BYTES).
const SERIAL_LIMIT: usize = 20;
/// Smallest guest that boots: kernel image and its own tables take about 45 MiB.
const MEMORY_FLOOR_MIB: u32 = 64;
/// Longest interface name, in bytes, without the closing zero (IFNAMSIZ).
const INTERFACE_NAME_LIMIT: usize = 15;

/// Checks `spec` against what every VM needs and against the VMM's slots.
///
/// # Errors
/// Names the first field that is wrong, or all devices when there are too many.
pub fn check(spec: &InstanceSpec, capabilities: &VmmCapabilities) -> BoxliteResult<()> {
    if spec.vcpus == 0 {
        return Err(invalid("vcpus", 0, "a VM has at least 1 CPU"));
    }
    if spec.memory_mib < MEMORY_FLOOR_MIB {
        let reason = format!("a VM needs at least {MEMORY_FLOOR_MIB} MiB");
        return Err(invalid("memory_mib", spec.memory_mib, reason));
    }
    for disk in &spec.disks {
        let fits = disk.serial.len() <= SERIAL_LIMIT;
        let plain = disk
            .serial
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if !fits || !plain || disk.serial.is_empty() {
            let reason = format!("1 to {SERIAL_LIMIT} letters, digits, '-' or '_'");
            return Err(invalid("disks.serial", &disk.serial, reason));
        }
        // QEMU separates options by commas, and libkrun takes UTF-8 only.
        match disk.path.to_str() {
            Some(path) if disk.path.is_absolute() && !path.contains(',') => {}
            _ => {
                let reason = "an absolute path in UTF-8 without a comma";
                return Err(invalid("disks.path", disk.path.display(), reason));
            }
        }
    }
    for nic in &spec.nics {
        let fits = (1..=INTERFACE_NAME_LIMIT).contains(&nic.tap.len());
        if !fits
            || nic
                .tap
                .bytes()
                .any(|b| b == b'/' || b == b',' || b.is_ascii_whitespace())
        {
            return Err(invalid("nics.tap", &nic.tap, "not an interface name"));
        }
        parse_mac(&nic.mac)?;
    }
    check_slots(spec, capabilities)
}

fn check_slots(spec: &InstanceSpec, capabilities: &VmmCapabilities) -> BoxliteResult<()> {
    let user_cards = usize::from(spec.host_network);
    let wanted = capabilities.base_devices + spec.disks.len() + spec.nics.len() + user_cards;
    if wanted <= capabilities.max_devices {
        return Ok(());
    }
    let mut devices = vec![format!("{} of the VM itself", capabilities.base_devices)];
    devices.extend(
        spec.disks
            .iter()
            .map(|disk| format!("disk {}", disk.serial)),
    );
    devices.extend(spec.nics.iter().map(|nic| format!("card {}", nic.tap)));
    Err(BoxliteError::TooManyDevices {
        kind: spec.kind.clone(),
        limit: capabilities.max_devices,
        wanted,
        devices: devices.join(", "),
    })
}

/// Reads `aa:bb:cc:dd:ee:ff`.
///
/// # Errors
/// It is not one, or it is a group address, which no card may have.
pub fn parse_mac(text: &str) -> BoxliteResult<[u8; 6]> {
    let bad = |reason: &str| invalid("nics.mac", text, reason);
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2);
        let part = part.ok_or_else(|| bad("six pairs of hex digits"))?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| bad("six pairs of hex digits"))?;
    }
    if parts.next().is_some() {
        return Err(bad("six pairs of hex digits"));
    }
    if mac[0] & 1 == 1 {
        return Err(bad("a group address"));
    }
    Ok(mac)
}
