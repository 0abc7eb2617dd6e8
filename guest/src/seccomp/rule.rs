//! [`Rule`]: conditions on a syscall's arguments, and their code.
//!
//! Arguments have 64 bits and BPF compares 32, so each condition tests the upper half first. The parent module
//! selects and orders the rules of a syscall.

use super::error::SeccompError;
use super::instruction::{AND, Instruction, JUMP_AT_LEAST, JUMP_EQUAL, JUMP_GREATER, LOAD, RETURN};
use oci_spec::runtime::{LinuxSeccompArg, LinuxSeccompOperator as Operator};

/// Number of arguments of a syscall.
const ARGUMENTS: usize = 6;
/// Offset of the first argument in `struct seccomp_data`, and distance from a lower half to its upper half.
const OFFSET_ARGUMENTS: u32 = 16;
const HALF: u32 = 4;

/// Conditions that must all hold, and the resulting return value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    conditions: Vec<LinuxSeccompArg>,
    result: u32,
}

/// Returns the rules of a list of conditions: one with all of them, or, as in runc, one per condition if two are on
/// the same argument. Empty if there are no conditions.
pub(crate) fn alternatives(
    args: &[LinuxSeccompArg],
    result: u32,
) -> Result<Vec<Rule>, SeccompError> {
    let mut seen = [0usize; ARGUMENTS];
    for arg in args {
        let count = seen.get_mut(arg.index()).ok_or(SeccompError::Range {
            field: "args.index",
            value: arg.index() as u64,
        })?;
        *count += 1;
    }
    let rule = |conditions: &[LinuxSeccompArg]| Rule {
        conditions: conditions.to_vec(),
        result,
    };
    Ok(if args.is_empty() {
        Vec::new()
    } else if seen.iter().any(|count| *count > 1) {
        args.chunks(1).map(rule).collect()
    } else {
        vec![rule(args)]
    })
}

/// Target of a step's jump.
#[derive(Debug, Clone, Copy)]
enum Goal {
    /// The following step.
    Next,
    /// This condition holds.
    Pass,
    /// The rule does not match.
    Fail,
}

/// An instruction with symbolic jump targets.
struct Step {
    code: u16,
    value: u32,
    yes: Goal,
    no: Goal,
}

impl Rule {
    /// Returns code that returns the result if the rule matches, and otherwise continues after its end.
    pub(crate) fn code(&self) -> Vec<Instruction> {
        let conditions: Vec<Vec<Step>> = self.conditions.iter().map(steps).collect();
        // Six conditions of at most six steps: all jumps are short.
        let end = conditions.iter().map(Vec::len).sum::<usize>() + 1;
        let mut code = Vec::with_capacity(end);
        for condition in conditions {
            let passed = code.len() + condition.len();
            for step in condition {
                let after = code.len() + 1;
                let distance = |goal| match goal {
                    Goal::Next => 0,
                    Goal::Pass => (passed - after) as u8,
                    Goal::Fail => (end - after) as u8,
                };
                code.push(Instruction {
                    code: step.code,
                    yes: distance(step.yes),
                    no: distance(step.no),
                    value: step.value,
                });
            }
        }
        code.push(Instruction::plain(RETURN, self.result));
        code
    }
}

/// Returns the steps of one condition.
fn steps(arg: &LinuxSeccompArg) -> Vec<Step> {
    use Goal::{Fail, Next, Pass};
    let offset = OFFSET_ARGUMENTS + 8 * arg.index() as u32;
    let halves = |value: u64| ((value >> 32) as u32, value as u32);
    let (high, low) = halves(arg.value());
    let load = |offset| Step {
        code: LOAD,
        value: offset,
        yes: Next,
        no: Next,
    };
    let test = |code, value, yes, no| Step {
        code,
        value,
        yes,
        no,
    };
    // Upper halves decide if they differ.
    let ordered = |greater, less, last: Step| {
        vec![
            load(offset + HALF),
            test(JUMP_GREATER, high, greater, Next),
            test(JUMP_EQUAL, high, Next, less),
            load(offset),
            last,
        ]
    };
    match arg.op() {
        Operator::ScmpCmpEq => vec![
            load(offset + HALF),
            test(JUMP_EQUAL, high, Next, Fail),
            load(offset),
            test(JUMP_EQUAL, low, Pass, Fail),
        ],
        Operator::ScmpCmpNe => vec![
            load(offset + HALF),
            test(JUMP_EQUAL, high, Next, Pass),
            load(offset),
            test(JUMP_EQUAL, low, Fail, Pass),
        ],
        Operator::ScmpCmpLt => ordered(Fail, Pass, test(JUMP_AT_LEAST, low, Fail, Pass)),
        Operator::ScmpCmpLe => ordered(Fail, Pass, test(JUMP_GREATER, low, Fail, Pass)),
        Operator::ScmpCmpGe => ordered(Pass, Fail, test(JUMP_AT_LEAST, low, Pass, Fail)),
        Operator::ScmpCmpGt => ordered(Pass, Fail, test(JUMP_GREATER, low, Pass, Fail)),
        Operator::ScmpCmpMaskedEq => {
            let (high_mask, low_mask) = (high, low);
            let (high, low) = halves(arg.value_two().unwrap_or(0) & arg.value());
            let mask = |value| test(AND, value, Next, Next);
            vec![
                load(offset + HALF),
                mask(high_mask),
                test(JUMP_EQUAL, high, Next, Fail),
                load(offset),
                mask(low_mask),
                test(JUMP_EQUAL, low, Pass, Fail),
            ]
        }
    }
}
