//! Compiles the device rules of a spec to a BPF program of the container's cgroup.
//!
//! Containers may create nodes (CAP_MKNOD is in the default set), so without this a container could read other
//! containers' files on the scratch disk. cgroup v2 has no files for device rules; the kernel runs a program,
//! attached by [`super::bpf`]. The program evaluates the rules from last to first; the first rule that covers the
//! whole requested access (or, to deny, any part of it) decides.

use super::error::CgroupError;
use super::instruction::{
    ANSWER, CONTEXT, COPY, EXIT, IF_EQUAL, Instruction, LOAD, MOVE, instruction,
};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

/// Rules that every container has, as in runc: mknod of any device, and the use of these.
const DEFAULT: [(i64, Option<i64>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    // Pseudoterminals.
    (136, None),
];
/// Maximum number of rules of one container; the kernel accepts much longer programs.
const MAX_RULES: usize = 2048;
/// Device types and access bits of `struct bpf_cgroup_dev_ctx` (linux/bpf.h).
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
const MAKE: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MAKE | READ | WRITE;

/// A rule in numbers; `None` matches any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// Compiles the program for these rules and the container's own devices; `None` if everything is allowed.
///
/// # Errors
/// If a device number or an access is invalid.
pub(crate) fn program(
    rules: &[LinuxDeviceCgroup],
    devices: &[LinuxDevice],
) -> Result<Option<Vec<Instruction>>, CgroupError> {
    let mut all = Vec::new();
    for rule in rules {
        all.push(from_oci(rule)?);
    }
    let everything =
        |rule: &&Rule| (rule.kind, rule.major, rule.minor, rule.access) == (None, None, None, ALL);
    // Without any rule all devices are allowed.
    if all.iter().rfind(everything).is_none_or(|last| last.allow) {
        return Ok(None);
    }
    all.extend([BLOCK, CHARACTER].map(|kind| allow(Some(kind), None, None, MAKE)));
    for (major, minor) in DEFAULT {
        let (major, minor) = (number(major)?, minor.map(number).transpose()?);
        all.push(allow(Some(CHARACTER), Some(major), minor, ALL));
    }
    for device in devices {
        let (major, minor) = (number(device.major())?, number(device.minor())?);
        all.push(allow(kind_of(device.typ()), Some(major), Some(minor), ALL));
    }
    if all.len() > MAX_RULES {
        return Err(CgroupError::Resource {
            field: "devices".to_owned(),
            reason: format!("more than {MAX_RULES} rules"),
        });
    }
    Ok(Some(assemble(&all)))
}

fn allow(kind: Option<i32>, major: Option<i32>, minor: Option<i32>, access: i32) -> Rule {
    Rule {
        allow: true,
        kind,
        major,
        minor,
        access,
    }
}

fn number(value: i64) -> Result<i32, CgroupError> {
    i32::try_from(value)
        .ok()
        .filter(|value| *value >= 0)
        .ok_or_else(|| CgroupError::Resource {
            field: "devices".to_owned(),
            reason: format!("{value} is not a device number"),
        })
}

fn kind_of(kind: LinuxDeviceType) -> Option<i32> {
    match kind {
        LinuxDeviceType::B => Some(BLOCK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
        LinuxDeviceType::P | LinuxDeviceType::A => None,
    }
}

fn from_oci(rule: &LinuxDeviceCgroup) -> Result<Rule, CgroupError> {
    // -1 is also a wildcard.
    let wild = |value: Option<i64>| value.filter(|value| *value != -1).map(number).transpose();
    let mut access = 0;
    for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MAKE,
            other => {
                return Err(CgroupError::Resource {
                    field: "devices.access".to_owned(),
                    reason: format!("{other:?} is not one of r, w, m"),
                });
            }
        };
    }
    Ok(Rule {
        allow: rule.allow(),
        kind: rule.typ().and_then(kind_of),
        major: wild(rule.major())?,
        minor: wild(rule.minor())?,
        access,
    })
}

/// Opcodes: and, shift right; jump if not equal.
const AND: u8 = 0x54;
const SHIFT: u8 = 0x74;
const UNLESS_EQUAL: u8 = 0x55;
/// Registers of values read from the context.
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

fn assemble(rules: &[Rule]) -> Vec<Instruction> {
    let set = |code, to, value| instruction(code, to, 0, 0, value);
    let mut program = vec![
        instruction(LOAD, KIND, CONTEXT, 0, 0),
        instruction(COPY, ACCESS, KIND, 0, 0),
        set(AND, KIND, 0xffff),
        set(SHIFT, ACCESS, 16),
        instruction(LOAD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut tests = Vec::new();
        for (register, wanted) in [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)] {
            if let Some(wanted) = wanted {
                tests.push(set(UNLESS_EQUAL, register, wanted));
            }
        }
        if rule.access != ALL || !rule.allow {
            tests.push(instruction(COPY, SCRATCH, ACCESS, 0, 0));
            if rule.allow {
                tests.push(set(AND, SCRATCH, ALL & !rule.access));
                tests.push(set(UNLESS_EQUAL, SCRATCH, 0));
            } else {
                tests.push(set(AND, SCRATCH, rule.access));
                tests.push(set(IF_EQUAL, SCRATCH, 0));
            }
        }
        // All jumps lead to the instruction after this rule's return.
        let end = tests.len() + 2;
        for (at, mut test) in tests.into_iter().enumerate() {
            if test.code == UNLESS_EQUAL || test.code == IF_EQUAL {
                test.offset = (end - at - 1) as i16;
            }
            program.push(test);
        }
        program.push(set(MOVE, ANSWER, i32::from(rule.allow)));
        program.push(set(EXIT, 0, 0));
    }
    program.push(set(MOVE, ANSWER, 0));
    program.push(set(EXIT, 0, 0));
    program
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Returns the result of the kernel's BPF machine.
    fn run(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let mut registers = [0i64; 7];
        let mut at = 0;
        loop {
            let Instruction {
                code,
                registers: pair,
                offset,
                value,
            } = program[at];
            at += 1;
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            let jump = |taken: bool| if taken { offset as usize } else { 0 };
            match code {
                LOAD => {
                    let words = [access << 16 | kind, major, minor];
                    registers[to] = i64::from(words[offset as usize / 4]);
                }
                COPY => registers[to] = registers[from],
                MOVE => registers[to] = i64::from(value),
                AND => registers[to] &= i64::from(value),
                SHIFT => registers[to] >>= value,
                UNLESS_EQUAL => at += jump(registers[to] != i64::from(value)),
                IF_EQUAL => at += jump(registers[to] == i64::from(value)),
                EXIT => return registers[0] == 1,
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    fn rules(value: serde_json::Value) -> Vec<LinuxDeviceCgroup> {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn program_without_rules_allows_standard_devices() {
        let device = oci_spec::runtime::LinuxDeviceBuilder::default()
            .path("/dev/fuse")
            .typ(LinuxDeviceType::C)
            .major(10)
            .minor(229)
            .build()
            .unwrap();
        let none = rules(json!([{"allow": false, "access": "rwm"}]));
        let program = program(&none, &[device]).unwrap().unwrap();
        for (kind, access, major, minor, answer) in [
            (CHARACTER, READ | WRITE, 1, 3, true),
            (CHARACTER, READ | WRITE, 136, 77, true),
            (CHARACTER, READ, 1, 1, false),
            (BLOCK, READ, 254, 0, false),
            (BLOCK, MAKE, 254, 0, true),
            (BLOCK, MAKE | READ, 254, 0, false),
            (BLOCK, READ, 1, 3, false),
            (CHARACTER, ALL, 10, 229, true),
            (CHARACTER, READ, 10, 200, false),
        ] {
            let got = run(&program, kind, access, major, minor);
            assert_eq!(got, answer, "{kind} {access} {major}:{minor}");
        }
    }

    #[test]
    fn program_later_rules_take_precedence() {
        let list = rules(json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 8, "access": "r"},
            {"allow": false, "type": "b", "major": 8, "minor": 1, "access": "rw"},
        ]));
        let program = program(&list, &[]).unwrap().unwrap();
        assert!(run(&program, BLOCK, READ, 8, 0));
        assert!(!run(&program, BLOCK, READ | WRITE, 8, 0));
        assert!(!run(&program, BLOCK, READ, 8, 1));
    }

    #[test]
    fn program_privileged_returns_none() {
        for list in [
            json!([]),
            json!([{"allow": true, "access": "rwm"}]),
            json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "a", "access": "rwm"}]),
        ] {
            assert_eq!(program(&rules(list), &[]).unwrap(), None);
        }
        assert!(program(&rules(json!([{"allow": false, "access": "x"}])), &[]).is_err());
    }
}
