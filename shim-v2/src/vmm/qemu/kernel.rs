//! The guest kernel in a form that QEMU boots: libkrunfw's raw image behind a 4 KiB ELF header, created once and cached.
//!
//! The image contains a Xen PVH note (type 18: the 32-bit entry). QEMU needs an ELF file whose PT_NOTE refers to such a note
//! and whose PT_LOAD refers to the image; it ignores the rest of ELF.

use super::derived;
use crate::vmm::krunfw::{self, KernelImage};
use crate::vmm::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use std::path::{Path, PathBuf};

/// Offset of the image in the file: one page, so that the mapping is aligned.
const IMAGE_OFFSET: usize = 4096;
/// Virtual address of the kernel's text, used only by debuggers.
const TEXT_ADDRESS: u64 = 0xffff_ffff_8100_0000;
/// Start of the PVH entry note (XEN_ELFNOTE_PHYS32_ENTRY): sizes of name and descriptor, type and name, little-endian.
const PVH_NOTE: [u8; 16] = *b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0";
/// Length of the note header and its eight-byte descriptor.
const PVH_NOTE_BYTES: usize = PVH_NOTE.len() + 8;

/// Returns the bootable kernel for the libkrunfw at `library`, created if the cache lacks it.
pub(super) fn bootable(library: &Path, cache: &Path) -> BoxliteResult<PathBuf> {
    derived::obtain(cache, "kernel", library, "elf", |draft| {
        let image = krunfw::kernel_image(library)?;
        derived::write_new(draft, &wrap(&image)?)
    })
}

/// Puts the header in front of the image.
fn wrap(image: &KernelImage) -> BoxliteResult<Vec<u8>> {
    let note = image
        .bytes
        .windows(PVH_NOTE.len())
        .step_by(4)
        .position(|window| window == PVH_NOTE);
    let note = note
        .map(|index| index * 4)
        .filter(|start| start + PVH_NOTE_BYTES <= image.bytes.len());
    let note = note
        .ok_or_else(|| std::io::Error::other("no PVH note in the image"))
        .step("wrap the guest kernel")?;
    let size = image.bytes.len() as u64;
    let load = Segment {
        kind: 1,
        flags: 7,
        offset: 0,
        vaddr: TEXT_ADDRESS,
        paddr: image.load_address,
        size,
        align: 4096,
    };
    let at = note as u64;
    let note = Segment {
        kind: 4,
        flags: 4,
        offset: at,
        vaddr: TEXT_ADDRESS + at,
        paddr: image.load_address + at,
        size: PVH_NOTE_BYTES as u64,
        align: 4,
    };
    let mut file = Vec::with_capacity(IMAGE_OFFSET + image.bytes.len());
    file.extend(elf_header(image.load_address));
    load.write(&mut file);
    note.write(&mut file);
    file.resize(IMAGE_OFFSET, 0);
    file.extend_from_slice(image.bytes);
    Ok(file)
}

/// Program header; `offset` is relative to the image's first byte.
struct Segment {
    kind: u32,
    flags: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    size: u64,
    align: u64,
}

impl Segment {
    fn write(&self, file: &mut Vec<u8>) {
        file.extend(self.kind.to_le_bytes());
        file.extend(self.flags.to_le_bytes());
        let offset = IMAGE_OFFSET as u64 + self.offset;
        for field in [
            offset, self.vaddr, self.paddr, self.size, self.size, self.align,
        ] {
            file.extend(field.to_le_bytes());
        }
    }
}

/// Returns an ELF64 header, little-endian, executable, x86_64, followed by two program headers.
fn elf_header(entry: u64) -> Vec<u8> {
    const HEADER_BYTES: u16 = 64;
    const SEGMENT_BYTES: u16 = 56;
    let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    header.extend(2u16.to_le_bytes()); // ET_EXEC
    header.extend(62u16.to_le_bytes()); // EM_X86_64
    header.extend(1u32.to_le_bytes());
    header.extend(entry.to_le_bytes());
    header.extend(u64::from(HEADER_BYTES).to_le_bytes());
    header.extend(0u64.to_le_bytes());
    header.extend(0u32.to_le_bytes());
    for field in [HEADER_BYTES, SEGMENT_BYTES, 2, 0, 0, 0] {
        header.extend(field.to_le_bytes());
    }
    header
}

#[cfg(test)]
mod tests {
    use super::{IMAGE_OFFSET, KernelImage, PVH_NOTE, wrap};

    fn image(note_at: Option<usize>) -> KernelImage {
        let mut bytes = vec![0x90u8; 3 * 4096 + 5];
        if let Some(at) = note_at {
            bytes[at..at + PVH_NOTE.len()].copy_from_slice(&PVH_NOTE);
        }
        KernelImage {
            bytes: bytes.leak(),
            load_address: 0x100_0000,
        }
    }

    fn word(file: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(file[at..at + 8].try_into().expect("eight bytes"))
    }

    #[test]
    fn wrap_headers_refer_to_image_and_note() {
        let image = image(Some(8192));
        let file = wrap(&image).expect("it has a note");
        assert_eq!(&file[IMAGE_OFFSET..], image.bytes);
        assert_eq!(&file[..4], b"\x7fELF");
        assert_eq!(word(&file, 24), image.load_address, "entry");
        let (load, note) = (64, 64 + 56);
        assert_eq!(
            word(&file, load + 8),
            IMAGE_OFFSET as u64,
            "offset of the image"
        );
        assert_eq!(word(&file, load + 24), image.load_address, "its address");
        assert_eq!(word(&file, load + 32), image.bytes.len() as u64, "its size");
        let at = usize::try_from(word(&file, note + 8)).expect("an offset");
        assert_eq!(file[at..at + PVH_NOTE.len()], PVH_NOTE);
    }

    #[test]
    fn wrap_image_without_whole_note_fails() {
        assert!(wrap(&image(None)).is_err());
        let cut = image(None).bytes.len() - PVH_NOTE.len() - 1;
        assert!(wrap(&image(Some(cut / 4 * 4))).is_err());
    }
}
