//! [`Instruction`]: one BPF instruction, and the opcodes that profiles use.

/// BPF opcodes: load word, jumps by constant, return constant.
pub(crate) const LOAD: u16 = 0x20;
pub(crate) const JUMP: u16 = 0x05;
pub(crate) const JUMP_EQUAL: u16 = 0x15;
pub(crate) const JUMP_GREATER: u16 = 0x25;
pub(crate) const JUMP_AT_LEAST: u16 = 0x35;
pub(crate) const AND: u16 = 0x54;
pub(crate) const RETURN: u16 = 0x06;

/// One BPF instruction, as in `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub code: u16,
    pub yes: u8,
    pub no: u8,
    pub value: u32,
}

impl Instruction {
    /// Creates an instruction without jumps.
    pub(crate) fn plain(code: u16, value: u32) -> Self {
        Self {
            code,
            yes: 0,
            no: 0,
            value,
        }
    }
}

/// Creates a jump.
pub(crate) fn jump(code: u16, value: u32, yes: u8, no: u8) -> Instruction {
    Instruction {
        code,
        yes,
        no,
        value,
    }
}
