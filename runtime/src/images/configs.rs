//! [`Configs`]: gets an image's config, once, however many pulls want it at the same time.
//!
//! What is in the store already is read there; the rest is downloaded by one of the callers while the others wait for it.
//! A config is named by its digest, so whose download it was makes no difference; a failure is the downloader's alone, and
//! the next one in the queue tries with its own credentials. It parses nothing. Called by `pull`; layers are `layer`'s.

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

/// A config. While it lives, who wants the same one gets it from here: the store has it only when a pull is through.
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

/// See the module's header.
pub(super) struct Configs {
    store: Arc<Store>,
    /// Empty once the last of the callers that wait for it or have it is gone.
    under_way: Mutex<HashMap<String, Weak<OnceCell<Bytes>>>>,
}

impl Configs {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            under_way: Mutex::default(),
        }
    }

    /// The config `id`, by `download` when nobody has it or is getting it. Dropping the future hands the download over to
    /// the next caller.
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
            let (store, wanted) = (self.store.clone(), id.clone());
            match blocking(move || store.config(&wanted)).await? {
                Some(here) => Ok(Bytes::from(here)),
                None => download().await.map(Bytes::from),
            }
        };
        let bytes = cell.get_or_try_init(get).await?.clone();
        Ok(Config { bytes, _cell: cell })
    }

    fn cell(&self, id: &Digest) -> Arc<OnceCell<Bytes>> {
        let mut all = self.under_way.lock();
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
    async fn a_config_that_a_pull_still_has_is_not_downloaded_again() {
        let dir = tempfile::tempdir().unwrap();
        let configs = Configs::new(Store::open(dir.path()).unwrap());
        let id = Digest::of(b"{}");
        let first = configs.obtain(&id, async || Ok(b"{}".to_vec())).await;
        let none = async || {
            let what = "the config".into();
            Err(ImageError::NotFound { what, host: None })
        };
        let second = configs.obtain(&id, none).await.unwrap();
        assert_eq!(&*second, b"{}");
        drop((first, second));
        assert!(configs.obtain(&id, none).await.is_err(), "nobody has it");
    }
}
