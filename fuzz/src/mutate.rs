//! [`Mutator`]: a deterministic sequence of inputs derived from seeds.

/// Largest input.
const MAX_INPUT_BYTES: usize = 64 << 10;
/// Largest number of mutations of one input.
const MAX_MUTATIONS: u64 = 6;
/// Largest number of bytes that one mutation inserts, removes or copies.
const MAX_RANGE_BYTES: u64 = 256;
/// Numbers at the limits of integer types, which length fields and counters go wrong with.
const LIMITS: [u64; 14] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    i64::MAX as u64,
    u64::MAX,
];

/// Derives inputs from seeds.
pub struct Mutator<'a> {
    state: u64,
    seeds: &'a [Vec<u8>],
    words: &'a [Vec<u8>],
}

impl<'a> Mutator<'a> {
    /// Creates the sequence that starts with `first`. There must be a seed.
    pub fn new(first: u64, seeds: &'a [Vec<u8>], words: &'a [Vec<u8>]) -> Self {
        Self {
            // A state of 0 would never change.
            state: first.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            seeds,
            words,
        }
    }

    /// Returns the next input.
    pub fn next_input(&mut self) -> Vec<u8> {
        let mut input = self.seed().to_vec();
        for _ in 0..=self.below(MAX_MUTATIONS) {
            self.mutate(&mut input);
        }
        input.truncate(MAX_INPUT_BYTES);
        input
    }

    /// Xorshift.
    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    /// Returns a number below `limit`, or 0.
    fn below(&mut self, limit: u64) -> u64 {
        self.next().checked_rem(limit).unwrap_or(0)
    }

    fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).unwrap_or(0)
    }

    fn seed(&mut self) -> &'a [u8] {
        let index = self.index(self.seeds.len());
        &self.seeds[index]
    }

    /// Returns a range of at most `MAX_RANGE_BYTES` of an input.
    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.index(length);
        let most = (length - start).min(MAX_RANGE_BYTES as usize);
        start..start + self.index(most + 1)
    }

    fn mutate(&mut self, input: &mut Vec<u8>) {
        let at = self.index(input.len() + 1);
        let byte = self.index(input.len());
        match self.below(10) {
            0 if !input.is_empty() => input[byte] ^= 1 << self.below(8),
            1 if !input.is_empty() => input[byte] = self.next().to_le_bytes()[0],
            2 => self.overwrite_number(input, byte),
            3 => {
                let range = self.range(input.len());
                drop(input.drain(range));
            }
            4 => {
                let range = self.range(input.len());
                let copy = input[range].to_vec();
                input.splice(at..at, copy);
            }
            5 => {
                let seed = self.seed();
                let range = self.range(seed.len());
                input.splice(at..at, seed[range].iter().copied());
            }
            6 => input.truncate(at),
            7 if !self.words.is_empty() => {
                let word = self.index(self.words.len());
                let word = &self.words[word];
                input.splice(at..at, word.iter().copied());
            }
            8 => self.repeat(input, at),
            _ => {
                let noise: Vec<u8> = (0..self.below(16))
                    .map(|_| self.next().to_le_bytes()[0])
                    .collect();
                input.splice(at..at, noise);
            }
        }
    }

    /// Writes a limit as a number of 1, 2, 4 or 8 bytes in either order.
    fn overwrite_number(&mut self, input: &mut [u8], at: usize) {
        let limit = LIMITS[self.index(LIMITS.len())];
        let width = 1 << self.index(4);
        let mut bytes = limit.to_le_bytes()[..width].to_vec();
        if self.below(2) == 0 {
            bytes.reverse();
        }
        for (target, byte) in input.iter_mut().skip(at).zip(bytes) {
            *target = byte;
        }
    }

    /// Repeats a few bytes up to some thousand times: deep nesting, long names.
    fn repeat(&mut self, input: &mut Vec<u8>, at: usize) {
        let start = self.index(input.len());
        let length = (input.len() - start).min(1 + self.index(4));
        let times = 1 << self.index(12);
        let copies = input[start..start + length].repeat(times);
        input.splice(at..at, copies);
        input.truncate(MAX_INPUT_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequence_is_repeatable_and_varied() {
        let seeds = [b"hello".to_vec(), Vec::new()];
        let inputs = |first| {
            let mut mutator = Mutator::new(first, &seeds, &[]);
            (0..200).map(|_| mutator.next_input()).collect::<Vec<_>>()
        };
        assert_eq!(inputs(7), inputs(7));
        assert_ne!(inputs(7), inputs(8));
        let distinct: std::collections::BTreeSet<_> = inputs(7).into_iter().collect();
        assert!(distinct.len() > 100, "{}", distinct.len());
        assert!(distinct.iter().all(|input| input.len() <= MAX_INPUT_BYTES));
    }
}
