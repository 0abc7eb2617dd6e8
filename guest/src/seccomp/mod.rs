//! Compiles seccomp profiles of OCI specs to BPF programs: [`Filter::compile`].
//!
//! Pure; [`install`] installs a program, at a time chosen by the spawner. Implemented here because the static agent
//! cannot link libseccomp, and the crate `seccompiler` supports only one action besides the default. Semantics are
//! those of libseccomp: a syscall listed without arguments takes precedence over rules with arguments; of several
//! rules with arguments the first match decides; all arguments of a rule must match, but two conditions on the same
//! argument are alternatives; names unknown to this kernel are skipped.
//!
//! The guest's kernel runs x86-64 programs only (no IA32, no x32), so a profile's other architectures do not apply; a
//! call through another ABI kills the process.
//!
//! ```text
//! load arch ─ not x86-64 ─► kill process
//! load nr ── binary search over ranges of numbers ──► [conditions on arguments] ──► return action
//! ```

mod error;
pub(crate) mod install;
mod instruction;
mod rule;

pub(crate) use error::SeccompError;
use instruction::{Instruction, JUMP, JUMP_AT_LEAST, JUMP_EQUAL, LOAD, RETURN, jump};
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag, LinuxSyscall};
use rule::Rule;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use syscalls::Sysno;

/// Maximum number of instructions accepted by the kernel (BPF_MAXINSNS).
const MAX_INSTRUCTIONS: usize = 4096;
/// Maximum number of rules in a profile; moby's has about 20.
const MAX_RULES: usize = 4096;
/// `AUDIT_ARCH_X86_64`.
const ARCH: u32 = 0xc000_003e;
/// First number of the x32 ABI, which the guest's kernel does not support.
const X32: u32 = 0x4000_0000;
/// `SECCOMP_RET_KILL_PROCESS`.
const KILL_PROCESS: u32 = 0x8000_0000;
/// Offsets in `struct seccomp_data`.
const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;
/// Flags of seccomp(2).
const FLAG_LOG: u32 = 1 << 1;
const FLAG_SPEC_ALLOW: u32 = 1 << 2;

/// A compiled profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Filter {
    /// Instructions packed into one number each, for a compact encoding.
    packed: Vec<u64>,
    /// Flags for seccomp(2).
    flags: u32,
}

impl Filter {
    /// Compiles a profile.
    ///
    /// # Errors
    /// As listed in [`SeccompError`].
    pub(crate) fn compile(profile: &LinuxSeccomp) -> Result<Self, SeccompError> {
        let default = action(profile.default_action(), profile.default_errno_ret())?;
        let chains = chains(
            profile.syscalls().as_deref().unwrap_or_default(),
            profile.default_action(),
            default,
        )?;
        let mut program = vec![
            Instruction::plain(LOAD, OFFSET_ARCH),
            jump(JUMP_EQUAL, ARCH, 1, 0),
            Instruction::plain(RETURN, KILL_PROCESS),
            Instruction::plain(LOAD, OFFSET_NR),
        ];
        program.extend(search(&segments(chains, default)));
        if program.len() > MAX_INSTRUCTIONS {
            return Err(SeccompError::TooBig {
                what: "instructions",
                count: program.len(),
                limit: MAX_INSTRUCTIONS,
            });
        }
        Ok(Self {
            packed: program.into_iter().map(pack).collect(),
            flags: flags(profile.flags().as_deref().unwrap_or_default()),
        })
    }

    /// Returns the program.
    pub(crate) fn instructions(&self) -> Vec<Instruction> {
        self.packed.iter().copied().map(unpack).collect()
    }

    /// Returns the flags for seccomp(2).
    pub(crate) fn flags(&self) -> u32 {
        self.flags
    }
}

fn pack(instruction: Instruction) -> u64 {
    let Instruction {
        code,
        yes,
        no,
        value,
    } = instruction;
    u64::from(code) << 48 | u64::from(yes) << 40 | u64::from(no) << 32 | u64::from(value)
}

fn unpack(packed: u64) -> Instruction {
    let byte = |shift: u32| (packed >> shift & 0xff) as u8;
    Instruction {
        code: (packed >> 48) as u16,
        yes: byte(40),
        no: byte(32),
        value: packed as u32,
    }
}

/// Returns the kernel's return value for an action. The default errno is EPERM.
fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32, SeccompError> {
    if action == LinuxSeccompAction::ScmpActNotify {
        return Err(SeccompError::Notify);
    }
    match errno {
        // The lower 16 bits of a return value are its data.
        Some(errno) if errno > 0xffff => Err(SeccompError::Range {
            field: "errnoRet",
            value: errno.into(),
        }),
        errno => Ok(action.as_u32(errno)),
    }
}

fn flags(wanted: &[LinuxSeccompFilterFlag]) -> u32 {
    wanted
        .iter()
        .map(|flag| match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => FLAG_SPEC_ALLOW,
            // The process is single-threaded, and there is no notification listener.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync
            | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
        })
        .fold(0, |all, flag| all | flag)
}

/// Rules of one syscall.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Chain {
    Always(u32),
    /// The first match decides, else the default.
    Conditions(Vec<Rule>),
}

/// Returns the rules by syscall number.
fn chains(
    entries: &[LinuxSyscall],
    default_action: LinuxSeccompAction,
    default: u32,
) -> Result<BTreeMap<u32, Chain>, SeccompError> {
    let mut chains = BTreeMap::new();
    let mut count = 0;
    for entry in entries {
        let result = action(entry.action(), entry.errno_ret())?;
        let args = entry.args().as_deref().unwrap_or_default();
        let rules = rule::alternatives(args, result)?;
        // Rules equal to the default are ignored; in libseccomp, too, they do not weaken other rules.
        if entry.action() == default_action && result == default {
            continue;
        }
        for number in entry.names().iter().filter_map(|name| number_of(name)) {
            count += rules.len().max(1);
            if count > MAX_RULES {
                return Err(SeccompError::TooBig {
                    what: "rules",
                    count,
                    limit: MAX_RULES,
                });
            }
            let chain = chains
                .entry(number)
                .or_insert_with(|| Chain::Conditions(Vec::new()));
            match chain {
                Chain::Always(_) => {}
                chain if rules.is_empty() => *chain = Chain::Always(result),
                Chain::Conditions(present) => present.extend(rules.iter().cloned()),
            }
        }
    }
    Ok(chains)
}

/// Returns the number of a syscall on this kernel, if it exists.
fn number_of(name: &str) -> Option<u32> {
    let number: Sysno = name.parse().ok()?;
    u32::try_from(number.id()).ok()
}

/// A range of syscall numbers, from `first` to the next segment, and its code.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    first: u32,
    code: Vec<Instruction>,
}

/// Returns segments covering all numbers in order; adjacent ones with equal code are merged.
fn segments(chains: BTreeMap<u32, Chain>, default: u32) -> Vec<Segment> {
    let answer = |value| vec![Instruction::plain(RETURN, value)];
    let mut all: Vec<Segment> = Vec::new();
    let mut add = |first: u32, code: Vec<Instruction>| {
        if all.last().is_none_or(|last| last.code != code) {
            all.push(Segment { first, code });
        }
    };
    let mut next = 0;
    for (number, chain) in chains.into_iter().filter(|(number, _)| *number < X32) {
        if number > next {
            add(next, answer(default));
        }
        let code = match chain {
            Chain::Always(result) => answer(result),
            Chain::Conditions(rules) => {
                let mut code: Vec<Instruction> = rules.iter().flat_map(Rule::code).collect();
                code.extend(answer(default));
                code
            }
        };
        add(number, code);
        next = number + 1;
    }
    add(next, answer(default));
    all
}

/// Returns a binary search for the segment of the loaded number.
fn search(segments: &[Segment]) -> Vec<Instruction> {
    match segments {
        [] => Vec::new(),
        [one] => one.code.clone(),
        _ => {
            let (left, right) = segments.split_at(segments.len() / 2);
            let middle = right.first().map_or(0, |segment| segment.first);
            let (left, right) = (search(left), search(right));
            let mut code = match u8::try_from(left.len()) {
                Ok(over) => vec![jump(JUMP_AT_LEAST, middle, over, 0)],
                // A conditional jump reaches 255 instructions.
                Err(_) => vec![
                    jump(JUMP_AT_LEAST, middle, 0, 1),
                    Instruction::plain(JUMP, left.len() as u32),
                ],
            };
            code.extend(left);
            code.extend(right);
            code
        }
    }
}

#[cfg(test)]
mod tests;
