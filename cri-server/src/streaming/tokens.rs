//! One-time tokens: the request of an Exec, Attach or PortForward call until its URL is used or expires.
//!
//! A token is 128 random bits, valid once and for [`TOKEN_LIFETIME`]; at most [`MAX_TOKENS`] are pending. A token
//! grants its request and nothing else, and is not logged. Unknown, used and expired tokens are indistinguishable.

use boxlite_sys::sync::Mutex;
use rand::RngCore;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// Time between the call's response and the connection of the client; the kubelet connects immediately.
pub(crate) const TOKEN_LIFETIME: Duration = Duration::from_secs(60);
/// Maximum number of pending tokens.
pub(crate) const MAX_TOKENS: usize = 1000;

/// Too many pending tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many pending streaming sessions (maximum {MAX_TOKENS})")]
pub(crate) struct TooManyPending;

/// Tokens with their requests.
#[derive(Debug)]
pub(crate) struct Tokens<T> {
    inner: Mutex<Inner<T>>,
}

#[derive(Debug)]
struct Inner<T> {
    entries: HashMap<String, T>,
    /// Sorted by expiry; a used token remains until then.
    expiry: VecDeque<(Instant, String)>,
}

impl<T> Default for Tokens<T> {
    fn default() -> Self {
        Self {
            inner: Mutex::new(Inner {
                entries: HashMap::new(),
                expiry: VecDeque::new(),
            }),
        }
    }
}

impl<T> Tokens<T> {
    /// Creates a token for `what`.
    ///
    /// # Errors
    /// Too many tokens are pending.
    pub(crate) fn issue(&self, what: T) -> Result<String, TooManyPending> {
        self.issue_at(what, Instant::now())
    }

    fn issue_at(&self, what: T, now: Instant) -> Result<String, TooManyPending> {
        let mut inner = self.inner.lock();
        inner.expire(now);
        if inner.entries.len() >= MAX_TOKENS {
            return Err(TooManyPending);
        }
        let mut bytes = [0; 16];
        rand::rng().fill_bytes(&mut bytes);
        let token = hex::encode(bytes);
        inner
            .expiry
            .push_back((now + TOKEN_LIFETIME, token.clone()));
        inner.entries.insert(token.clone(), what);
        Ok(token)
    }

    /// Returns the request of `token`, once.
    pub(crate) fn redeem(&self, token: &str) -> Option<T> {
        self.redeem_at(token, Instant::now())
    }

    fn redeem_at(&self, token: &str, now: Instant) -> Option<T> {
        let mut inner = self.inner.lock();
        inner.expire(now);
        inner.entries.remove(token)
    }
}

impl<T> Inner<T> {
    fn expire(&mut self, now: Instant) {
        while self.expiry.front().is_some_and(|(until, _)| *until <= now) {
            if let Some((_, token)) = self.expiry.pop_front() {
                self.entries.remove(&token);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_is_valid_once_until_expiry() {
        let tokens = Tokens::default();
        let begin = Instant::now();
        let issue = |what| tokens.issue_at(what, begin).expect("room");
        let (a, b, c) = (issue(1), issue(2), issue(3));
        assert_ne!(a, b);
        assert_eq!(a.len(), 32);
        assert_eq!(tokens.redeem(&a), Some(1));
        assert_eq!(tokens.redeem(&a), None);
        assert_eq!(tokens.redeem("nothing"), None);
        let end = begin + TOKEN_LIFETIME;
        assert_eq!(tokens.redeem_at(&b, end - Duration::from_nanos(1)), Some(2));
        assert_eq!(tokens.redeem_at(&c, end), None);
    }

    #[test]
    fn tokens_are_bounded_and_expire() {
        let tokens = Tokens::default();
        let begin = Instant::now();
        for number in 0..MAX_TOKENS {
            tokens.issue_at(number, begin).expect("room");
        }
        assert_eq!(tokens.issue(0), Err(TooManyPending));
        assert!(tokens.issue_at(0, begin + TOKEN_LIFETIME).is_ok());
    }
}
