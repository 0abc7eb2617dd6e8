//! [`Fuzz`]: calls a parser with mutated inputs and fails at a panic or a slow input.
//!
//! A fuzz test is an ordinary unit test named `fuzz_…` beside the code it tests, so it reaches private functions and runs in
//! every `cargo test`, with a fixed sequence of inputs. With `BOXLITE_FUZZ_SECONDS` (`make fuzz`) it runs that long with
//! new inputs. Its seeds are in `fuzz/seeds/<name>/`; an input that failed is added there and remains a test. The mutations
//! know nothing of the code's branches (docs/decisions/0030).

mod mutate;

pub use mutate::Mutator;

use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Duration of a long run, in seconds.
const SECONDS_VARIABLE: &str = "BOXLITE_FUZZ_SECONDS";
/// First number of the random sequence, to repeat a run.
const SEED_VARIABLE: &str = "BOXLITE_FUZZ_SEED";
/// Number of inputs of an ordinary test run.
const TEST_INPUTS: u64 = 300;
/// Seed of an ordinary test run.
const TEST_SEED: u64 = 1;
/// Longest time for one input. Inputs take microseconds to milliseconds; a busy machine may stop the test for seconds.
const MAX_INPUT_TIME: Duration = Duration::from_secs(30);

/// A fuzz test.
pub struct Fuzz {
    name: &'static str,
    seeds: Vec<Vec<u8>>,
    words: Vec<Vec<u8>>,
}

impl Fuzz {
    /// Creates a test with the seeds in `fuzz/seeds/<name>/`, if there is such a directory.
    ///
    /// # Panics
    /// A seed cannot be read.
    pub fn new(name: &'static str) -> Self {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("seeds")
            .join(name);
        let mut paths: Vec<PathBuf> = std::fs::read_dir(&directory)
            .into_iter()
            .flatten()
            .map(|entry| entry.expect("a seed").path())
            .collect();
        paths.sort();
        let read = |path: &PathBuf| std::fs::read(path).expect("failed to read seed");
        Self {
            name,
            seeds: paths.iter().map(read).collect(),
            words: Vec::new(),
        }
    }

    /// Adds a seed made by code.
    #[must_use]
    pub fn seed(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.seeds.push(bytes.into());
        self
    }

    /// Adds words that mutations insert.
    #[must_use]
    pub fn words(mut self, words: &[&str]) -> Self {
        self.words
            .extend(words.iter().map(|word| word.as_bytes().to_vec()));
        self
    }

    /// Calls `target` with each seed, then with mutations.
    ///
    /// # Panics
    /// There is no seed, `target` panicked, or an input took longer than `MAX_INPUT_TIME`. The input is printed.
    pub fn run(self, target: impl Fn(&[u8])) {
        assert!(
            !self.seeds.is_empty(),
            "fuzz test {} has no seed",
            self.name
        );
        for seed in &self.seeds {
            self.call(&target, seed);
        }
        let seconds: Option<u64> = number(SECONDS_VARIABLE);
        let first = match (seconds, number(SEED_VARIABLE)) {
            (_, Some(seed)) => seed,
            (None, None) => TEST_SEED,
            (Some(_), None) => clock_seed(),
        };
        let mut mutator = Mutator::new(first, &self.seeds, &self.words);
        let start = Instant::now();
        let mut inputs = 0;
        loop {
            let more = match seconds {
                Some(seconds) => start.elapsed() < Duration::from_secs(seconds),
                None => inputs < TEST_INPUTS,
            };
            if !more {
                break;
            }
            self.call(&target, &mutator.next_input());
            inputs += 1;
        }
        println!("fuzz {}: {inputs} inputs, seed {first}", self.name);
    }

    fn call(&self, target: &impl Fn(&[u8]), input: &[u8]) {
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| target(input)));
        let took = start.elapsed();
        if let Err(panic) = result {
            eprintln!("fuzz {}: failed with {}", self.name, printed(input));
            resume_unwind(panic);
        }
        assert!(
            took < MAX_INPUT_TIME,
            "fuzz {}: {took:?} for {}",
            self.name,
            printed(input)
        );
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().expect("not a number"))
}

fn clock_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(TEST_SEED, |now| now.subsec_nanos().into())
}

/// Returns the input as a byte string of Rust.
fn printed(input: &[u8]) -> String {
    let mut text = String::from("b\"");
    for byte in input {
        let _infallible = write!(text, "{}", std::ascii::escape_default(*byte));
    }
    text + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fuzz test that cannot find a planted fault finds no other.
    #[test]
    fn run_finds_a_planted_panic() {
        let found = catch_unwind(|| {
            let fuzz = Fuzz::new("none").seed(*b"{\"a\":1}").words(&["\"b\":"]);
            fuzz.run(|input| {
                let text = String::from_utf8_lossy(input);
                assert!(!text.contains("\"b\":"), "planted");
            });
        });
        assert!(found.is_err());
    }

    #[test]
    fn run_passes_a_total_function() {
        let calls = std::cell::Cell::new(0);
        Fuzz::new("none")
            .seed(*b"x")
            .run(|_| calls.set(calls.get() + 1));
        assert!(calls.get() > TEST_INPUTS || std::env::var(SECONDS_VARIABLE).is_ok());
    }

    #[test]
    fn printed_input_is_a_byte_string() {
        assert_eq!(printed(b"a\"\x00\n"), "b\"a\\\"\\x00\\n\"");
    }
}
