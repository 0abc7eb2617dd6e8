//! Stop signals: the CRI's enum is alphabetical, images have text, and the guest expects Linux numbers (equal on
//! x86-64 and arm64).

use boxlite_proto::cri::v1::Signal as CriSignal;

/// SIGTERM, the default if image and request name no signal.
pub(crate) const TERM: u32 = 15;
/// Prefix of the enum's names since Kubernetes 1.37.
const ENUM_PREFIX: &str = "SIGNAL_";
/// First and last real-time signal in glibc's numbering.
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;
/// Number of signals named relative to RTMIN; the rest is named relative to RTMAX.
const RTMIN_STEPS: u32 = 15;

/// Names and numbers except real-time signals. The second name of a number is an alias.
const NAMES: [(&str, u32); 34] = [
    ("SIGHUP", 1),
    ("SIGINT", 2),
    ("SIGQUIT", 3),
    ("SIGILL", 4),
    ("SIGTRAP", 5),
    ("SIGABRT", 6),
    ("SIGIOT", 6),
    ("SIGBUS", 7),
    ("SIGFPE", 8),
    ("SIGKILL", 9),
    ("SIGUSR1", 10),
    ("SIGSEGV", 11),
    ("SIGUSR2", 12),
    ("SIGPIPE", 13),
    ("SIGALRM", 14),
    ("SIGTERM", 15),
    ("SIGSTKFLT", 16),
    ("SIGCHLD", 17),
    ("SIGCLD", 17),
    ("SIGCONT", 18),
    ("SIGSTOP", 19),
    ("SIGTSTP", 20),
    ("SIGTTIN", 21),
    ("SIGTTOU", 22),
    ("SIGURG", 23),
    ("SIGXCPU", 24),
    ("SIGXFSZ", 25),
    ("SIGVTALRM", 26),
    ("SIGPROF", 27),
    ("SIGWINCH", 28),
    ("SIGIO", 29),
    ("SIGPOLL", 29),
    ("SIGPWR", 30),
    ("SIGSYS", 31),
];

/// Returns the Linux number of a CRI signal; `None` for RUNTIME_DEFAULT and unknown values.
pub(crate) fn from_cri(signal: i32) -> Option<u32> {
    let name = CriSignal::try_from(signal).ok()?.as_str_name();
    let name = name.strip_prefix(ENUM_PREFIX).unwrap_or(name);
    // The enum writes SIGRTMINPLUS3 and SIGRTMAXMINUS3.
    let text = name.replace("PLUS", "+").replace("MINUS", "-");
    from_text(&text)
}

/// Returns the CRI signal of a Linux number, or RUNTIME_DEFAULT if there is none.
pub(crate) fn to_cri(number: u32) -> CriSignal {
    let name = match number {
        RTMIN => "SIGRTMIN".to_owned(),
        RTMAX => "SIGRTMAX".to_owned(),
        n if (RTMIN..=RTMIN + RTMIN_STEPS).contains(&n) => format!("SIGRTMINPLUS{}", n - RTMIN),
        n if (RTMIN..=RTMAX).contains(&n) => format!("SIGRTMAXMINUS{}", RTMAX - n),
        n => match NAMES.iter().find(|(_, have)| *have == n) {
            Some((name, _)) => (*name).to_owned(),
            None => return CriSignal::RuntimeDefault,
        },
    };
    CriSignal::from_str_name(&format!("{ENUM_PREFIX}{name}")).unwrap_or(CriSignal::RuntimeDefault)
}

/// Parses an image's `StopSignal`: a number, or a name with or without SIG, in any case; also `RTMIN+3` and
/// `RTMAX-2`.
pub(crate) fn from_text(text: &str) -> Option<u32> {
    if let Ok(number) = text.parse::<u32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") {
        upper
    } else {
        format!("SIG{upper}")
    };
    if let Some((_, number)) = NAMES.iter().find(|(have, _)| *have == name) {
        return Some(*number);
    }
    let number = match (name.strip_prefix("SIGRTMIN"), name.strip_prefix("SIGRTMAX")) {
        (Some(""), _) => RTMIN,
        (_, Some("")) => RTMAX,
        (Some(step), _) => RTMIN.checked_add(step.strip_prefix('+')?.parse().ok()?)?,
        (_, Some(step)) => RTMAX.checked_sub(step.strip_prefix('-')?.parse().ok()?)?,
        _ => return None,
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cri_signals_map_to_linux_numbers() {
        for (cri, number) in [
            (CriSignal::Sigterm, 15),
            (CriSignal::Sigkill, 9),
            (CriSignal::Sigquit, 3),
            (CriSignal::Sigabrt, 6),
            (CriSignal::Sigiot, 6),
            (CriSignal::Sigpoll, 29),
            (CriSignal::Sigwinch, 28),
            (CriSignal::Sigrtmin, 34),
            (CriSignal::Sigrtminplus3, 37),
            (CriSignal::Sigrtmaxminus14, 50),
            (CriSignal::Sigrtmax, 64),
        ] {
            assert_eq!(from_cri(cri as i32), Some(number), "{cri:?}");
        }
        assert_eq!(from_cri(0), None);
        assert_eq!(from_cri(999), None);
    }

    #[test]
    fn every_number_round_trips() {
        for number in (1..=31).chain(34..=64) {
            assert_eq!(from_cri(to_cri(number) as i32), Some(number), "{number}");
        }
        for number in [0, 32, 33, 65, 4000] {
            assert_eq!(to_cri(number), CriSignal::RuntimeDefault);
        }
    }

    #[test]
    fn every_signal_of_the_enum_has_a_number() {
        for cri in 1..=65 {
            assert!(from_cri(cri).is_some(), "{cri}");
        }
    }

    #[test]
    fn image_stop_signal_text_is_parsed() {
        for (text, number) in [
            ("SIGQUIT", Some(3)),
            ("quit", Some(3)),
            ("9", Some(9)),
            ("RTMIN+3", Some(37)),
            ("sigrtmax-2", Some(62)),
            ("0", None),
            ("65", None),
            ("RTMIN+99", None),
            ("SIGFOO", None),
            ("", None),
            ("RTMIN+4294967295", None),
        ] {
            assert_eq!(from_text(text), number, "{text}");
        }
    }
}
