//! [`ConfigCache`]: gets an image's config once, however many pulls need it at the same time.
//!
//! A config in the store is read from there; otherwise one caller downloads it while the others wait. Configs are named by
//! their digest, so the result can be shared. A failure is returned to the downloading caller only, and the next waiter
//! tries with its own credentials. Called by `pull`; layers are in `layer`.

use boxlite_sys::sync::Mutex;
use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use tokio::sync::OnceCell;

use super::blocking;
use super::error::ImageResult;
use super::reference::Digest;
use super::store::Store;

/// A config. While it lives, other pulls share it: the store has it only after a pull has completed.
pub(super) struct Config {
    bytes: Bytes,
    _cell: Arc<OnceCell<Bytes>>,
}

impl Deref for Config {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Configs in use, by digest.
pub(super) struct ConfigCache {
    store: Arc<Store>,
    /// Cells that callers hold or wait for.
    cells: Mutex<HashMap<String, Weak<OnceCell<Bytes>>>>,
}

impl ConfigCache {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            cells: Mutex::default(),
        }
    }

    /// Returns the config `id`, which `download` fetches unless it is in the store or another caller has it. Dropping the
    /// future passes the download on to the next waiter.
    pub(super) async fn obtain<F>(
        &self,
        id: &Digest,
        download: impl FnOnce() -> F,
    ) -> ImageResult<Config>
    where
        F: Future<Output = ImageResult<Vec<u8>>>,
    {
        let cell = self.cell(id);
        let get = || async {
            let (store, id) = (self.store.clone(), id.clone());
            match blocking(move || store.config(&id)).await? {
                Some(bytes) => Ok(Bytes::from(bytes)),
                None => download().await.map(Bytes::from),
            }
        };
        let bytes = cell.get_or_try_init(get).await?.clone();
        Ok(Config { bytes, _cell: cell })
    }

    fn cell(&self, id: &Digest) -> Arc<OnceCell<Bytes>> {
        let mut all = self.cells.lock();
        all.retain(|_, cell| cell.strong_count() > 0);
        if let Some(cell) = all.get(id.as_str()).and_then(Weak::upgrade) {
            return cell;
        }
        let cell = Arc::new(OnceCell::new());
        all.insert(id.to_string(), Arc::downgrade(&cell));
        cell
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::ImageError;
    use super::*;

    #[tokio::test]
    async fn obtain_shares_config_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let configs = ConfigCache::new(Store::open(dir.path()).unwrap());
        let id = Digest::of(b"{}");
        let first = configs.obtain(&id, async || Ok(b"{}".to_vec())).await;
        let none = async || {
            let what = "the config".into();
            Err(ImageError::NotFound {
                subject: what,
                host: None,
            })
        };
        let second = configs.obtain(&id, none).await.unwrap();
        assert_eq!(&*second, b"{}");
        drop((first, second));
        assert!(configs.obtain(&id, none).await.is_err(), "no caller has it");
    }
}
