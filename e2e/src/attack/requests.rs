//! Requests with random operations and lengths.

use super::fuse::{ROOT, SILENT, Session, operation, words};
use super::{PAUSE_BEFORE_ATTEMPT, report, say};
use crate::failure::Result;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

/// Random requests.
const RANDOM_REQUESTS: usize = 150;

/// Sends requests with random operations, lengths, nodes and bodies. The seed is fixed, and each is printed before it is sent.
///
/// # Errors
/// The server does not start again.
pub(super) fn run(session: &mut Session) -> Result {
    let mut random = StdRng::seed_from_u64(1);
    let mut silent = 0;
    for number in 0..RANDOM_REQUESTS {
        let operation = random.random_range(0..operation::END);
        // FORGET, INTERRUPT and BATCH_FORGET have no answer.
        if matches!(operation, 2 | 36 | 42) {
            continue;
        }
        let node = [0, ROOT, 2, u64::MAX, random.random()][random.random_range(0..5)];
        let mut body = vec![0; random.random_range(0..200)];
        random.fill(&mut body[..]);
        if random.random_bool(0.5) {
            // Zeros are likelier to pass the first checks.
            body.fill(0);
        }
        let length = match random.random_range(0..4) {
            0 => random.random(),
            1 => 0,
            _ => (40 + body.len()) as u32,
        };
        say(&json!({"operation": operation, "length": length, "node": node, "bytes": body.len()}));
        if number == 0 {
            std::thread::sleep(PAUSE_BEFORE_ATTEMPT);
        }
        if session.call_with(length, operation, node, &body).err() == Some(SILENT) {
            silent += 1;
            session.restart()?;
        }
    }
    // A write that claims 4 GiB, and a read of as much.
    let mut body = 0_u64.to_le_bytes().to_vec();
    body.extend(words(&[0, 0, u32::MAX, 0, 0, 0, 0, 0]));
    for operation in [operation::WRITE, operation::READ, operation::READDIR] {
        report(
            "share",
            "4 GiB",
            &operation.to_string(),
            session.call(operation, ROOT, &body),
        );
    }
    say(&json!({"random": RANDOM_REQUESTS, "silent": silent}));
    Ok(())
}
