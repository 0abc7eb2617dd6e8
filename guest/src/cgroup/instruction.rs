//! Instructions of the kernel's BPF machine, for the programs of [`super::devices`] and [`super::sockets`].

/// An instruction, as in `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(super) code: u8,
    /// Destination in the lower half, source in the upper half.
    pub(super) registers: u8,
    pub(super) offset: i16,
    pub(super) value: i32,
}

/// Opcodes: load a word; set to a constant, to a register; return.
pub(super) const LOAD: u8 = 0x61;
pub(super) const MOVE: u8 = 0xb7;
pub(super) const COPY: u8 = 0xbf;
pub(super) const EXIT: u8 = 0x95;
/// Opcode: jump if a register equals a constant.
pub(super) const IF_EQUAL: u8 = 0x15;
/// Registers: the return value and the context.
pub(super) const ANSWER: u8 = 0;
pub(super) const CONTEXT: u8 = 1;

/// Returns an instruction on the registers `to` and `from`.
pub(super) const fn instruction(
    code: u8,
    to: u8,
    from: u8,
    offset: i16,
    value: i32,
) -> Instruction {
    Instruction {
        code,
        registers: from << 4 | to,
        offset,
        value,
    }
}
