//! Runs programs in a small interpreter of the kernel's BPF; one program is also installed in a thread.

use super::instruction::{AND, JUMP_GREATER};
use super::*;
use oci_spec::runtime::LinuxSeccomp;
use proptest::prelude::*;
use serde_json::json;

const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0001;

/// Returns the kernel's result.
fn run(filter: &Filter, arch: u32, number: u32, args: [u64; 6]) -> u32 {
    let program = filter.instructions();
    let word = |offset: u32| match offset {
        0 => number,
        4 => arch,
        offset => {
            let (index, half) = ((offset - 16) / 8, (offset - 16) % 8);
            (args[index as usize] >> (8 * half)) as u32
        }
    };
    let (mut at, mut a) = (0usize, 0u32);
    for _ in 0..=program.len() {
        let Instruction {
            code,
            yes,
            no,
            value,
        } = program[at];
        at += 1;
        let branch = |yes_taken: bool| usize::from(if yes_taken { yes } else { no });
        match code {
            LOAD => a = word(value),
            AND => a &= value,
            JUMP => at += value as usize,
            JUMP_EQUAL => at += branch(a == value),
            JUMP_GREATER => at += branch(a > value),
            JUMP_AT_LEAST => at += branch(a >= value),
            RETURN => return value,
            other => panic!("opcode {other:#x}"),
        }
    }
    panic!("no return");
}

fn filter(profile: serde_json::Value) -> Filter {
    let profile: LinuxSeccomp = serde_json::from_value(profile).unwrap();
    Filter::compile(&profile).unwrap()
}

fn call(filter: &Filter, name: &str, args: [u64; 6]) -> u32 {
    run(filter, ARCH, number_of(name).unwrap(), args)
}

#[test]
fn compile_maps_names_actions_and_default() {
    let filter = filter(json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_AARCH64"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [
            {"names": ["read", "write", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
            {"names": ["reboot"], "action": "SCMP_ACT_KILL_PROCESS"},
            {"names": ["swapon"], "action": "SCMP_ACT_TRAP"},
            {"names": ["swapoff"], "action": "SCMP_ACT_LOG"},
            {"names": ["acct"], "action": "SCMP_ACT_KILL"},
        ],
    }));
    let none = [0; 6];
    for (name, answer) in [
        ("read", ALLOW),
        ("write", ALLOW),
        ("chmod", 0x0005_0000 | 13),
        ("reboot", 0x8000_0000),
        ("swapon", 0x0003_0000),
        ("swapoff", 0x7ffc_0000),
        ("acct", 0),
        ("open", 0x0005_0000 | 38),
    ] {
        assert_eq!(call(&filter, name, none), answer, "{name}");
    }
    assert_eq!(run(&filter, ARCH, 100_000, none), 0x0005_0000 | 38);
    assert_eq!(run(&filter, ARCH, X32 + 1, none), 0x0005_0000 | 38);
    // i386 by int 0x80.
    assert_eq!(run(&filter, 0x4000_0003, 0, none), KILL_PROCESS);
    assert_eq!(filter.flags(), FLAG_LOG);
}

#[test]
fn compile_unconditional_rule_wins_then_first_match() {
    let condition = |value: u64| json!([{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}]);
    let filter = filter(json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["socket"], "action": "SCMP_ACT_ERRNO", "args": condition(40)},
            {"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5, "args": condition(40)},
            {"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 6, "args": condition(41)},
            {"names": ["clone"], "action": "SCMP_ACT_ERRNO", "args": condition(1)},
            {"names": ["clone"], "action": "SCMP_ACT_TRAP"},
            {"names": ["clone"], "action": "SCMP_ACT_KILL"},
            {"names": ["mount"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "args": condition(0)},
        ],
    }));
    assert_eq!(call(&filter, "socket", [40, 0, 0, 0, 0, 0]), EPERM);
    assert_eq!(
        call(&filter, "socket", [41, 0, 0, 0, 0, 0]),
        0x0005_0000 | 6
    );
    assert_eq!(call(&filter, "socket", [2, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(call(&filter, "clone", [1, 0, 0, 0, 0, 0]), 0x0003_0000);
    assert_eq!(call(&filter, "mount", [0; 6]), EPERM);
}

#[test]
fn compile_two_conditions_on_one_argument_are_alternatives() {
    let eq = |index: u32, value: u64| json!({"index": index, "value": value, "op": "SCMP_CMP_EQ"});
    let filter = filter(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [
            {"names": ["ioctl"], "action": "SCMP_ACT_ALLOW", "args": [eq(1, 7), eq(5, 8)]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [eq(0, 0), eq(0, 8)]},
        ],
    }));
    assert_eq!(call(&filter, "ioctl", [0, 7, 0, 0, 0, 8]), ALLOW);
    assert_eq!(call(&filter, "ioctl", [0, 7, 0, 0, 0, 9]), EPERM);
    assert_eq!(call(&filter, "ioctl", [0, 6, 0, 0, 0, 8]), EPERM);
    assert_eq!(call(&filter, "personality", [8, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(call(&filter, "personality", [9, 0, 0, 0, 0, 0]), EPERM);
}

#[test]
fn compile_unsupported_profile_returns_error() {
    let compile = |profile| {
        let profile: LinuxSeccomp = serde_json::from_value(profile).unwrap();
        Filter::compile(&profile).unwrap_err()
    };
    assert_eq!(
        compile(json!({"defaultAction": "SCMP_ACT_NOTIFY"})),
        SeccompError::Notify
    );
    let rule = |index: u32, errno: u32| {
        json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{
            "names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno,
            "args": [{"index": index, "value": 0, "op": "SCMP_CMP_EQ"}],
        }]})
    };
    assert_eq!(
        compile(rule(6, 1)).to_string(),
        "invalid seccomp profile: args.index = 6 is out of range"
    );
    assert_eq!(
        compile(rule(0, 70_000)).to_string(),
        "invalid seccomp profile: errnoRet = 70000 is out of range"
    );
    let many: Vec<_> = (0..1000)
        .map(|value| {
            json!({
                "names": ["read"], "action": "SCMP_ACT_ERRNO",
                "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}],
            })
        })
        .collect();
    let error = compile(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": many}));
    assert!(matches!(error, SeccompError::TooBig { .. }), "{error}");
}

/// Defines the operators.
fn holds(op: &str, argument: u64, value: u64, second: u64) -> bool {
    match op {
        "SCMP_CMP_EQ" => argument == value,
        "SCMP_CMP_NE" => argument != value,
        "SCMP_CMP_LT" => argument < value,
        "SCMP_CMP_LE" => argument <= value,
        "SCMP_CMP_GT" => argument > value,
        "SCMP_CMP_GE" => argument >= value,
        _ => argument & value == second & value,
    }
}

const OPERATORS: [&str; 7] = [
    "SCMP_CMP_EQ",
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_GT",
    "SCMP_CMP_GE",
    "SCMP_CMP_MASKED_EQ",
];

/// Generates values whose halves collide often.
fn value() -> impl Strategy<Value = u64> {
    let half = || prop_oneof![0u64..3, Just(u64::from(u32::MAX)), Just(0x8000_0000u64)];
    (half(), half()).prop_map(|(high, low)| high << 32 | low)
}

proptest! {
    #[test]
    fn every_operator_compares_all_64_bits(
        op in 0usize..7, index in 0usize..6, argument in value(), wanted in value(), second in value(),
    ) {
        let op = OPERATORS[op];
        let filter = filter(json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{
                "names": ["read"], "action": "SCMP_ACT_ERRNO",
                "args": [{"index": index, "value": wanted, "valueTwo": second, "op": op}],
            }],
        }));
        let mut args = [u64::MAX; 6];
        args[index] = argument;
        let answer = if holds(op, argument, wanted, second) { EPERM } else { ALLOW };
        prop_assert_eq!(call(&filter, "read", args), answer);
    }

    /// For any set of numbers, the search finds each of them and the default between.
    #[test]
    fn search_finds_every_number(rules in prop::collection::btree_map(0u32..460, 0u32..3, 0..300)) {
        let chains = rules.iter().map(|(number, action)| (*number, Chain::Always(0x0005_0000 | (action + 1)))).collect();
        let mut program = vec![Instruction::plain(LOAD, OFFSET_NR)];
        program.extend(search(&segments(chains, ALLOW)));
        let filter = Filter { packed: program.into_iter().map(pack).collect(), flags: 0 };
        for number in 0..470 {
            let wanted = rules.get(&number).map_or(ALLOW, |action| 0x0005_0000 | (action + 1));
            prop_assert_eq!(run(&filter, ARCH, number, [0; 6]), wanted, "{}", number);
        }
    }
}

/// Installs a program in the kernel, in a separate thread because it cannot be removed.
#[test]
fn install_kernel_enforces_the_filter() {
    let filter = filter(json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["getpriority"], "action": "SCMP_ACT_ERRNO", "errnoRet": 76,
             "args": [{"index": 1, "value": 0xff, "valueTwo": 0x11, "op": "SCMP_CMP_MASKED_EQ"}]},
        ],
    }));
    let child = std::thread::spawn(move || {
        nix::sys::prctl::set_no_new_privs().unwrap();
        install::install(&filter).unwrap();
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let mode = status
            .lines()
            .find(|line| line.starts_with("Seccomp:"))
            .map(str::to_owned);
        let priority =
            |who| rustix::process::getpriority_process(rustix::process::Pid::from_raw(who));
        (
            mode,
            priority(0x11),
            priority(std::process::id() as i32 & !0xff | 0x12).err(),
        )
    });
    let (mode, masked, other) = child.join().unwrap();
    assert_eq!(mode.as_deref(), Some("Seccomp:\t2"));
    assert_eq!(masked.unwrap_err().raw_os_error(), 76);
    assert_ne!(other.map(|errno| errno.raw_os_error()), Some(76));
}

#[test]
fn fuzz_profile_is_compiled_or_refused() {
    let words = [
        "\"args\":",
        "\"names\":",
        "SCMP_ACT_ERRNO",
        "SCMP_CMP_MASKED_EQ",
        "18446744073709551615",
        "-1",
        "[",
        "{",
    ];
    boxlite_fuzz::Fuzz::new("seccomp")
        .words(&words)
        .run(|input| {
            if let Ok(profile) = serde_json::from_slice::<LinuxSeccomp>(input)
                && let Ok(filter) = Filter::compile(&profile)
            {
                assert!(filter.instructions().len() <= MAX_INSTRUCTIONS);
            }
        });
}
