//! One-time tokens: what an Exec, Attach or PortForward call allowed, until its URL is used or expires.
//!
//! A token is 128 random bits, good once and for [`TOKEN_LIFETIME`]; at most [`MAX_TOKENS`] wait at a time. Whoever has one may do
//! what its call asked for and nothing else, so tokens are in no log. Unknown, used and expired ones look the same.

use boxlite_sys::sync::Mutex;
use rand::RngCore;
use std::collections::{HashMap, VecDeque};
use std::time::Duration;
use tokio::time::Instant;

/// What a client may take from the call's answer to the connection; the kubelet connects at once.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(60);
/// Tokens that wait for their use.
pub const MAX_TOKENS: usize = 1000;

/// More calls than tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{MAX_TOKENS} streaming requests wait for their clients already; one expires {TOKEN_LIFETIME:?} after its call"
)]
pub struct TooManyPending;

/// Tokens and what they stand for.
#[derive(Debug)]
pub struct Tokens<T> {
    inner: Mutex<Inner<T>>,
}

#[derive(Debug)]
struct Inner<T> {
    entries: HashMap<String, T>,
    /// In the order of their expiry; a used one stays until then.
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
    /// A token for `what`.
    ///
    /// # Errors
    /// Too many wait.
    pub fn issue(&self, what: T) -> Result<String, TooManyPending> {
        let now = Instant::now();
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

    /// What `token` stands for, once.
    pub fn redeem(&self, token: &str) -> Option<T> {
        let mut inner = self.inner.lock();
        inner.expire(Instant::now());
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

    #[tokio::test(start_paused = true)]
    async fn a_token_is_good_once_and_for_a_while() {
        let tokens = Tokens::default();
        let (a, b) = (tokens.issue(1).unwrap(), tokens.issue(2).unwrap());
        assert_ne!(a, b);
        assert_eq!(a.len(), 32);
        assert_eq!(tokens.redeem(&a), Some(1));
        assert_eq!(tokens.redeem(&a), None);
        assert_eq!(tokens.redeem("nothing"), None);
        tokio::time::advance(TOKEN_LIFETIME).await;
        assert_eq!(tokens.redeem(&b), None);
    }

    #[tokio::test(start_paused = true)]
    async fn their_number_is_bounded_and_expiry_makes_room() {
        let tokens = Tokens::default();
        for number in 0..MAX_TOKENS {
            tokens.issue(number).unwrap();
        }
        assert_eq!(tokens.issue(0), Err(TooManyPending));
        tokio::time::advance(TOKEN_LIFETIME).await;
        assert!(tokens.issue(0).is_ok());
    }
}
