//! Checks of a spec that apply to every VMM: sizes, device slots, names. VMM-specific limits come as capabilities.

use super::VmmCapabilities;
use super::step::invalid;
use boxlite_proto::error::{BoxliteError, BoxliteResult};
use boxlite_proto::vmm::InstanceSpec;

/// Maximum length of a virtio-blk serial in bytes (VIRTIO_BLK_ID_BYTES).
const MAX_SERIAL_BYTES: usize = 20;
/// Minimum guest memory: kernel image and page tables take about 45 MiB.
const MIN_MEMORY_MIB: u32 = 64;
/// Maximum length of an interface name in bytes, without the NUL (IFNAMSIZ).
const MAX_INTERFACE_NAME_BYTES: usize = 15;

/// Checks `spec` against requirements of every VM and against the VMM's slots.
///
/// # Errors
/// The first invalid field, or all devices if there are too many.
pub fn check(spec: &InstanceSpec, capabilities: &VmmCapabilities) -> BoxliteResult<()> {
    if spec.vcpus == 0 {
        return Err(invalid("vcpus", 0, "a VM has at least 1 CPU"));
    }
    if spec.memory_mib < MIN_MEMORY_MIB {
        let reason = format!("a VM needs at least {MIN_MEMORY_MIB} MiB");
        return Err(invalid("memory_mib", spec.memory_mib, reason));
    }
    for disk in &spec.disks {
        let fits = disk.serial.len() <= MAX_SERIAL_BYTES;
        let plain = disk
            .serial
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if !fits || !plain || disk.serial.is_empty() {
            let reason = format!("1 to {MAX_SERIAL_BYTES} letters, digits, '-' or '_'");
            return Err(invalid("disks.serial", &disk.serial, reason));
        }
        // QEMU separates options by commas; libkrun accepts UTF-8 only.
        match disk.path.to_str() {
            Some(path) if disk.path.is_absolute() && !path.contains(',') => {}
            _ => {
                let reason = "an absolute path in UTF-8 without a comma";
                return Err(invalid("disks.path", disk.path.display(), reason));
            }
        }
    }
    for nic in &spec.nics {
        let fits = (1..=MAX_INTERFACE_NAME_BYTES).contains(&nic.tap.len());
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
    let user_nics = usize::from(spec.host_network) + usize::from(spec.passt);
    let requested = capabilities.base_devices + spec.disks.len() + spec.nics.len() + user_nics;
    if requested <= capabilities.max_devices {
        return Ok(());
    }
    let mut devices = vec![format!("{} built-in", capabilities.base_devices)];
    devices.extend(
        spec.disks
            .iter()
            .map(|disk| format!("disk {}", disk.serial)),
    );
    devices.extend(spec.nics.iter().map(|nic| format!("NIC {}", nic.tap)));
    Err(BoxliteError::TooManyDevices {
        kind: spec.kind.clone(),
        limit: capabilities.max_devices,
        wanted: requested,
        devices: devices.join(", "),
    })
}

/// Parses a MAC address of the form `aa:bb:cc:dd:ee:ff`.
///
/// # Errors
/// The text is not a MAC address, or is a group address, which a NIC cannot have.
pub fn parse_mac(text: &str) -> BoxliteResult<[u8; 6]> {
    let invalid_mac = |reason: &str| invalid("nics.mac", text, reason);
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2);
        let part = part.ok_or_else(|| invalid_mac("six pairs of hex digits"))?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| invalid_mac("six pairs of hex digits"))?;
    }
    if parts.next().is_some() {
        return Err(invalid_mac("six pairs of hex digits"));
    }
    if mac[0] & 1 == 1 {
        return Err(invalid_mac("a group address"));
    }
    Ok(mac)
}
