//! Limits of concurrent streaming sessions, in all and per pod sandbox.
//!
//! The kubelet connects on behalf of all users, so the pod sandbox represents the client: the users of one pod cannot take the
//! sessions of another.

use boxlite_sys::sync::Mutex;
use std::collections::HashMap;
use std::sync::Arc;

/// Maximum number of sessions. Each holds at most a few hundred KiB of queued data.
pub(crate) const MAX_SESSIONS: usize = 512;
/// Maximum number of sessions of one pod sandbox.
pub(crate) const MAX_POD_SESSIONS: usize = 128;

/// Reason why a session cannot begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TooManySessions {
    /// All sessions of the node are in use.
    #[error("too many streaming sessions (maximum {MAX_SESSIONS})")]
    InAll,
    /// All sessions of the pod sandbox are in use.
    #[error("too many streaming sessions of the pod sandbox (maximum {MAX_POD_SESSIONS})")]
    OfPod,
}

/// Sessions in progress. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sessions(Arc<Mutex<HashMap<String, usize>>>);

/// A session in progress; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Session {
    sessions: Sessions,
    pod: String,
}

impl Sessions {
    /// Begins a session of a pod sandbox.
    ///
    /// # Errors
    /// A limit is reached.
    pub(crate) fn begin(&self, pod: &str) -> Result<Session, TooManySessions> {
        let mut counts = self.0.lock();
        if counts.values().sum::<usize>() >= MAX_SESSIONS {
            return Err(TooManySessions::InAll);
        }
        let count = counts.entry(pod.to_owned()).or_default();
        if *count >= MAX_POD_SESSIONS {
            return Err(TooManySessions::OfPod);
        }
        *count += 1;
        Ok(Session {
            sessions: self.clone(),
            pod: pod.to_owned(),
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut counts = self.sessions.0.lock();
        if let Some(count) = counts.get_mut(&self.pod) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.pod);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_limited_per_pod_and_in_all() {
        let sessions = Sessions::default();
        let mut held = Vec::new();
        for _ in 0..MAX_POD_SESSIONS {
            held.push(sessions.begin("a").unwrap());
        }
        assert_eq!(sessions.begin("a").unwrap_err(), TooManySessions::OfPod);
        for pod in ["b", "c", "d"] {
            for _ in 0..MAX_POD_SESSIONS {
                held.push(sessions.begin(pod).unwrap());
            }
        }
        assert_eq!(sessions.begin("e").unwrap_err(), TooManySessions::InAll);
        held.remove(0);
        assert_eq!(sessions.begin("b").unwrap_err(), TooManySessions::OfPod);
        sessions.begin("a").unwrap();
        held.clear();
        assert!(sessions.0.lock().is_empty());
    }
}
