//! [`Attack`] and [`Containers`]: the attacks in progress, which the services read.

use boxlite_proto::names::GUEST_SHARE;
use serde_json::Value;
use std::collections::BTreeMap;
use tokio::sync::watch;

/// Path of the volume below which mounts are exported.
const VOLUME: &str = "/volume";

/// An attack, by the second word of a container's command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attack {
    /// Events of unknown containers, of other pods' containers, and OOM kills of the container without end.
    Events,
    /// Exits at once, with impossible values, and goes on as if it had not.
    Exits,
    /// Empty lines as output of the container, as fast as the host reads them.
    Logs,
    /// Long lists of exported mounts with paths that lead out of the volume.
    Mounts,
    /// Exports a mount, answers FUSE_INIT and nothing else.
    Fuse,
    /// All ports of the host, without end.
    Ports,
    /// Statistics with impossible values, which decrease.
    Stats,
    /// Errors with long texts in answer to each call.
    Errors,
    /// Answers no call but List, for which CreateContainer waits.
    Hang,
    /// No attack.
    None,
}

impl Attack {
    fn named(name: &str) -> Self {
        match name {
            "events" => Self::Events,
            "exits" => Self::Exits,
            "logs" => Self::Logs,
            "mounts" => Self::Mounts,
            "fuse" => Self::Fuse,
            "ports" => Self::Ports,
            "stats" => Self::Stats,
            "errors" => Self::Errors,
            "hang" => Self::Hang,
            _ => Self::None,
        }
    }
}

/// A container without a process.
#[derive(Debug, Clone)]
pub(crate) struct Container {
    /// Its id.
    pub id: String,
    /// Its attack.
    pub attack: Attack,
    /// Third word of its command: an id that is not this pod's.
    pub foreign: String,
    /// Fourth word of its command: number of lines in its output.
    pub lines: u64,
    /// Its volume at [`VOLUME`], as a path below the share.
    pub volume: String,
    /// True after Start.
    pub started: bool,
    /// True after Kill.
    pub killed: bool,
}

impl Container {
    /// Reads the attack and the volume from an OCI spec.
    pub(crate) fn parse(id: &str, spec: &[u8]) -> Self {
        let spec: Value = serde_json::from_slice(spec).unwrap_or_default();
        let word = |n: usize| spec["process"]["args"][n].as_str().unwrap_or_default();
        let mounts = spec["mounts"].as_array().into_iter().flatten();
        let volumes = mounts.filter(|mount| mount["destination"] == VOLUME);
        let volume = volumes.filter_map(|mount| mount["source"].as_str()).next();
        let volume = volume.and_then(|source| source.strip_prefix(GUEST_SHARE));
        Self {
            id: id.to_owned(),
            attack: Attack::named(word(1)),
            foreign: word(2).to_owned(),
            lines: word(3).parse().unwrap_or(0),
            volume: volume.unwrap_or_default().trim_matches('/').to_owned(),
            started: false,
            killed: false,
        }
    }
}

/// The containers by id. Waiters see each change.
#[derive(Debug)]
pub(crate) struct Containers(watch::Sender<BTreeMap<String, Container>>);

impl Containers {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(BTreeMap::new()))
    }

    /// Adds a container, or replaces it.
    pub(crate) fn add(&self, container: Container) {
        self.0.send_modify(|all| {
            all.insert(container.id.clone(), container);
        });
    }

    /// Changes a container, if it exists.
    pub(crate) fn change(&self, id: &str, change: impl FnOnce(&mut Container)) {
        self.0.send_modify(|all| {
            if let Some(container) = all.get_mut(id) {
                change(container);
            }
        });
    }

    /// Removes a container.
    pub(crate) fn remove(&self, id: &str) {
        self.0.send_modify(|all| {
            all.remove(id);
        });
    }

    /// Returns the ids.
    pub(crate) fn ids(&self) -> Vec<String> {
        self.0.borrow().keys().cloned().collect()
    }

    /// Returns the attack of a container, `None` if it does not exist.
    pub(crate) fn attack(&self, id: &str) -> Attack {
        let all = self.0.borrow();
        all.get(id)
            .map_or(Attack::None, |container| container.attack)
    }

    /// Waits until a container matches, and returns a copy.
    pub(crate) async fn wait(&self, matches: impl Fn(&Container) -> bool) -> Container {
        let mut seen = self.0.subscribe();
        loop {
            let found = seen
                .borrow_and_update()
                .values()
                .find(|c| matches(c))
                .cloned();
            if let Some(container) = found {
                return container;
            }
            // The sender lives as long as the agent.
            let _ = seen.changed().await;
        }
    }

    /// Waits until a container with this attack has started.
    pub(crate) async fn attacking(&self, attack: Attack) -> Container {
        self.wait(|c| c.started && c.attack == attack).await
    }
}
