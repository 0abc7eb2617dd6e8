//! Random images: layers of random trees, and a model of the merged tree that a guest must see.
//!
//! [`random`] writes each layer's tar together with a model based only on the rules of OCI layers (entries replace,
//! whiteouts remove, opaque directories hide the content below). The model is independent of EROFS and overlayfs. A
//! single seed determines everything, so that failures are reproducible.

use super::layer::{Compression, Layer, LayerTar};
use crate::failure::Result;
use crate::lister::Entry;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use tar::EntryType;

/// Directory of the image with the random tree.
pub(crate) const TOP: &str = "tree";
/// Number of entries that a layer adds or replaces.
const ENTRIES: std::ops::Range<usize> = 10..40;
/// Maximum length of a name on Linux file systems.
const MAX_NAME_BYTES: usize = 255;

/// Entries by path relative to [`TOP`]; the top itself is "".
pub(crate) type Model = BTreeMap<Vec<u8>, Entry>;

/// Generates layers, lowest first, and the merged tree.
pub(crate) fn random(seed: u64) -> Result<(Vec<Layer>, Model)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut model = Model::new();
    let mut layers = Vec::new();
    for number in 0..rng.random_range(2..5) {
        let mut layer = Writer {
            rng: &mut rng,
            tar: LayerTar::default(),
            model: &mut model,
            written: BTreeSet::new(),
            files: Vec::new(),
        };
        layer.directory(b"")?;
        if number > 0 {
            layer.remove_some()?;
        }
        for _ in 0..layer.rng.random_range(ENTRIES) {
            layer.add()?;
        }
        let kinds = [Compression::Gzip, Compression::Zstd, Compression::Plain];
        let kind = *kinds.choose(layer.rng).unwrap_or(&Compression::Gzip);
        layers.push(layer.tar.finish(kind)?);
    }
    Ok((layers, linked(model)))
}

/// Replaces the inode marks in `first` by the first remaining path of each inode.
fn linked(mut model: Model) -> Model {
    let mut firsts = BTreeMap::new();
    for (path, entry) in &model {
        firsts
            .entry(entry.first.clone())
            .or_insert_with(|| hex::encode(path));
    }
    for entry in model.values_mut() {
        if let Some(first) = firsts.get(&entry.first) {
            entry.first.clone_from(first);
        }
    }
    model
}

/// Compares the trees. The error lists the first few differences.
pub(crate) fn compare(model: &Model, seen: &[Entry]) -> std::result::Result<(), String> {
    let seen: BTreeMap<&str, &Entry> = seen.iter().map(|e| (e.path.as_str(), e)).collect();
    let wanted: BTreeMap<&str, &Entry> = model.values().map(|e| (e.path.as_str(), e)).collect();
    let all: BTreeSet<&str> = seen.keys().chain(wanted.keys()).copied().collect();
    let differences: Vec<String> = all
        .into_iter()
        .filter(|path| seen.get(path) != wanted.get(path))
        .map(|path| {
            let name = hex::decode(path).unwrap_or_default();
            format!(
                "{:?}: the guest has {:?}, the model has {:?}",
                String::from_utf8_lossy(&name),
                seen.get(path),
                wanted.get(path)
            )
        })
        .collect();
    match differences.len() {
        0 => Ok(()),
        n => Err(format!(
            "{n} of {} entries differ: {}",
            wanted.len(),
            differences[..n.min(3)].join("; ")
        )),
    }
}

/// A layer under construction.
struct Writer<'a> {
    rng: &'a mut StdRng,
    tar: LayerTar,
    model: &'a mut Model,
    /// Paths written by this layer: a second entry of the same name has no defined meaning.
    written: BTreeSet<Vec<u8>>,
    /// Regular files of this layer, for hard links.
    files: Vec<Vec<u8>>,
}

fn joined(parent: &[u8], name: &[u8]) -> Vec<u8> {
    match parent {
        b"" => name.to_vec(),
        _ => [parent, b"/", name].concat(),
    }
}

/// Returns the path in the image for a path of the model.
fn image_path(path: &[u8]) -> Vec<u8> {
    match path {
        b"" => TOP.as_bytes().to_vec(),
        _ => joined(TOP.as_bytes(), path),
    }
}

fn is_below(path: &[u8], parent: &[u8]) -> bool {
    parent.is_empty() && !path.is_empty()
        || path
            .strip_prefix(parent)
            .is_some_and(|rest| rest.first() == Some(&b'/'))
}

impl Writer<'_> {
    /// Returns a random name without bytes that are special in tar or layers.
    fn name(&mut self) -> Vec<u8> {
        let odd: [&[u8]; 6] = [b"a\nb", b"\xff\xfe", b" ", b"-n", b"\\134", b"\xc3\xa4"];
        let mut name = match self.rng.random_range(0..10) {
            0 => vec![b'x'; self.rng.random_range(90..MAX_NAME_BYTES - 30)],
            1..4 => odd.choose(self.rng).unwrap_or(&odd[0]).to_vec(),
            4 => (0..12)
                .map(|_| self.rng.random_range(1..=255))
                .filter(|b| *b != b'/')
                .collect(),
            _ => b"n".to_vec(),
        };
        // Names of dots only and whiteout names are not valid file names.
        name.extend(format!("{}", self.rng.random_range(0..1000)).bytes());
        name
    }

    fn time(&mut self) -> (i64, i64) {
        match self.rng.random_range(0..6) {
            0 => (0, 0),
            1 => (self.rng.random_range(-1 << 33..1 << 33), 0),
            _ => (
                self.rng.random_range(0..1 << 33),
                self.rng.random_range(0..1_000_000_000),
            ),
        }
    }

    fn xattrs(&mut self) -> BTreeMap<String, String> {
        let mut some = BTreeMap::new();
        for number in 0..self.rng.random_range(0..8_u32).saturating_sub(4) {
            let space = if self.rng.random() {
                "user"
            } else {
                "security"
            };
            let mut value = vec![0; *[0, 1, 300, 1800].choose(self.rng).unwrap_or(&1)];
            self.rng.fill_bytes(&mut value);
            some.insert(format!("{space}.e2e.{number}"), hex::encode(value));
        }
        some
    }

    /// Returns random metadata for an entry of this type.
    fn entry(&mut self, path: &[u8], kind: u32) -> Entry {
        let link = kind == libc::S_IFLNK;
        let plain = kind == libc::S_IFREG || kind == libc::S_IFDIR;
        let mut owner = || match self.rng.random_range(0..4) {
            0 => self.rng.random_range(0..u32::MAX),
            _ => self.rng.random_range(0..2) * 1000,
        };
        let owner = (owner(), owner());
        let mode = self.rng.random_range(0..0o10000);
        Entry {
            path: hex::encode(path),
            mode: kind | if link { 0o777 } else { mode },
            owner,
            mtime: self.time(),
            size: 0,
            content: String::new(),
            xattrs: if plain {
                self.xattrs()
            } else {
                BTreeMap::new()
            },
            // Identifies the inode until all layers are written.
            first: format!("{:x}", self.rng.next_u64()),
        }
    }

    /// Returns a directory of the merged tree, which this layer also lists, as all layer tools do.
    fn parent(&mut self) -> Result<Vec<u8>> {
        let all: Vec<Vec<u8>> = self
            .model
            .iter()
            .filter(|(path, entry)| {
                entry.mode & libc::S_IFMT == libc::S_IFDIR
                    && path.iter().filter(|byte| **byte == b'/').count() < 4
            })
            .map(|(path, _)| path.clone())
            .collect();
        let parent = all.choose(self.rng).cloned().unwrap_or_default();
        let mut above = parent.clone();
        let mut missing = Vec::new();
        while !self.written.contains(&above) {
            missing.push(above.clone());
            let cut = above.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
            above.truncate(cut);
        }
        for path in missing.into_iter().rev() {
            self.directory(&path)?;
        }
        Ok(parent)
    }

    /// Writes a directory: new metadata for an existing one, whose content remains.
    fn directory(&mut self, path: &[u8]) -> Result {
        let entry = self.entry(path, libc::S_IFDIR);
        self.put(path, entry, EntryType::Directory, b"", &[])
    }

    /// Writes whiteouts and opaque directories for entries of the layers below.
    fn remove_some(&mut self) -> Result {
        for _ in 0..self.rng.random_range(0..6) {
            let below: Vec<Vec<u8>> = self
                .model
                .keys()
                .filter(|path| !path.is_empty() && !self.written.contains(*path))
                .cloned()
                .collect();
            let Some(victim) = below.choose(self.rng).cloned() else {
                return Ok(());
            };
            // A layer cannot remove a directory in which it has entries.
            if self.written.iter().any(|path| is_below(path, &victim)) {
                continue;
            }
            let cut = victim.iter().rposition(|byte| *byte == b'/');
            let parent = victim[..cut.unwrap_or(0)].to_vec();
            self.name_parents(&parent)?;
            let directory = self.model[&victim].mode & libc::S_IFMT == libc::S_IFDIR;
            if directory && self.rng.random() {
                self.directory(&victim)?;
                let mark = joined(&image_path(&victim), b".wh..wh..opq");
                self.tar.bytes_file(EntryType::Regular, &mark, 0o644, b"")?;
                self.model.retain(|path, _| !is_below(path, &victim));
            } else {
                let name = &victim[cut.map_or(0, |at| at + 1)..];
                let mark = joined(&image_path(&parent), &[b".wh.", name].concat());
                if name.len() + 4 > MAX_NAME_BYTES {
                    continue;
                }
                self.tar.bytes_file(EntryType::Regular, &mark, 0o644, b"")?;
                self.model
                    .retain(|path, _| *path != victim && !is_below(path, &victim));
                // The same name again in this layer would be contradictory.
                self.written.insert(victim);
            }
        }
        Ok(())
    }

    /// Writes a directory and its parents unless this layer already has them.
    fn name_parents(&mut self, path: &[u8]) -> Result {
        if self.written.contains(path) {
            return Ok(());
        }
        if let Some(cut) = path.iter().rposition(|byte| *byte == b'/') {
            self.name_parents(&path[..cut])?;
        }
        self.directory(path)
    }

    /// Adds an entry with a new name, or one that replaces an entry of a lower layer.
    fn add(&mut self) -> Result {
        let parent = self.parent()?;
        let mut path = joined(&parent, &self.name());
        let below: Vec<Vec<u8>> = self
            .model
            .keys()
            .filter(|path| {
                !path.is_empty() && !self.written.iter().any(|w| w == *path || is_below(w, path))
            })
            .cloned()
            .collect();
        if self.rng.random_range(0..6) == 0
            && let Some(old) = below.choose(self.rng)
        {
            path.clone_from(old);
            let cut = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
            let parent = path[..cut].to_vec();
            self.name_parents(&parent)?;
        }
        if self.written.contains(&path)
            || self.model.contains_key(&path) && self.written.iter().any(|w| is_below(w, &path))
        {
            return Ok(());
        }
        match self.rng.random_range(0..12) {
            0..3 => self.directory(&path),
            3 => self.symlink(&path),
            4 => self.hard_link(&path),
            5 => {
                let kind = *[
                    (libc::S_IFIFO, EntryType::Fifo),
                    (libc::S_IFCHR, EntryType::Char),
                    (libc::S_IFBLK, EntryType::Block),
                ]
                .choose(self.rng)
                .unwrap_or(&(libc::S_IFIFO, EntryType::Fifo));
                self.special(&path, kind)
            }
            _ => self.file(&path),
        }
    }

    fn file(&mut self, path: &[u8]) -> Result {
        let mut entry = self.entry(path, libc::S_IFREG);
        let size = match self.rng.random_range(0..8) {
            0 => 0,
            1 => self.rng.random_range(4090..4100),
            2 => self.rng.random_range(65_000..300_000),
            3 => self.rng.random_range(1 << 20..3 << 20),
            _ => self.rng.random_range(1..2000),
        };
        let mut body = vec![0; size];
        self.rng.fill_bytes(&mut body);
        if self.rng.random() {
            // Holes: zeros in the archive, and a sparse file below.
            let start = self.rng.random_range(0..=size);
            body[start..].fill(0);
        }
        entry.size = size as u64;
        entry.content = super::digest(&body).replace("sha256:", "");
        let holes = body.iter().rev().take_while(|byte| **byte == 0).count();
        let kept = size - holes / 512 * 512;
        if kept < size && kept % 512 == 0 && self.rng.random() {
            let mut sparse = format!("1\n0\n{kept}\n").into_bytes();
            sparse.resize(512, 0);
            sparse.extend(&body[..kept]);
            let real = size.to_string();
            let records: [(&str, &[u8]); 4] = [
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.name", &image_path(path)),
                ("GNU.sparse.realsize", real.as_bytes()),
            ];
            self.put(path, entry, EntryType::Regular, &sparse, &records)?;
        } else {
            self.put(path, entry, EntryType::Regular, &body, &[])?;
        }
        self.files.push(path.to_vec());
        Ok(())
    }

    fn symlink(&mut self, path: &[u8]) -> Result {
        let mut entry = self.entry(path, libc::S_IFLNK);
        let length = self.rng.random_range(1..300);
        let target: Vec<u8> = (0..length)
            .map(|_| self.rng.random_range(1..=255))
            .collect();
        entry.content = hex::encode(&target);
        self.put(
            path,
            entry,
            EntryType::Symlink,
            b"",
            &[("linkpath", &target)],
        )
    }

    fn hard_link(&mut self, path: &[u8]) -> Result {
        let Some(target) = self.files.choose(self.rng).cloned() else {
            return Ok(());
        };
        // The target may have been replaced; then there is nothing to link to.
        let Some(mut entry) = self.model.get(&target).cloned() else {
            return Ok(());
        };
        entry.path = hex::encode(path);
        self.forget(path, false);
        self.tar
            .bytes_link(EntryType::Link, &image_path(path), &image_path(&target))?;
        self.written.insert(path.to_vec());
        self.model.insert(path.to_vec(), entry);
        Ok(())
    }

    fn special(&mut self, path: &[u8], (kind, entry_type): (u32, EntryType)) -> Result {
        let mut entry = self.entry(path, kind);
        let numbers: (u32, u32) = (
            self.rng.random_range(0..4096),
            self.rng.random_range(0..1 << 20),
        );
        // A character device 0:0 is overlayfs's whiteout.
        let numbers = (numbers.0.max(1), numbers.1);
        if entry_type != EntryType::Fifo {
            entry.content = format!("{}:{}", numbers.0, numbers.1);
        }
        self.forget(path, false);
        self.metadata(&entry, &[])?;
        self.tar
            .bytes_device(entry_type, &image_path(path), entry.mode & 0o7777, numbers)?;
        self.written.insert(path.to_vec());
        self.model.insert(path.to_vec(), entry);
        Ok(())
    }

    /// Writes the PAX records for metadata that a plain header cannot hold.
    fn metadata(&mut self, entry: &Entry, more: &[(&str, &[u8])]) -> Result {
        let mut records: Vec<(String, Vec<u8>)> = vec![
            ("uid".into(), entry.owner.0.to_string().into_bytes()),
            ("gid".into(), entry.owner.1.to_string().into_bytes()),
            ("mtime".into(), seconds(entry.mtime).into_bytes()),
        ];
        for (name, value) in &entry.xattrs {
            let value = hex::decode(value)?;
            records.push((format!("SCHILY.xattr.{name}"), value));
        }
        records.extend(
            more.iter()
                .map(|(key, value)| ((*key).to_owned(), value.to_vec())),
        );
        self.tar.pax(&records)
    }

    fn put(
        &mut self,
        path: &[u8],
        entry: Entry,
        kind: EntryType,
        body: &[u8],
        more: &[(&str, &[u8])],
    ) -> Result {
        self.forget(path, kind == EntryType::Directory);
        self.metadata(&entry, more)?;
        self.tar
            .bytes_file(kind, &image_path(path), entry.mode & 0o7777, body)?;
        self.written.insert(path.to_vec());
        self.model.insert(path.to_vec(), entry);
        Ok(())
    }

    /// Removes the entry at the path, and those below it unless a directory replaces a directory.
    fn forget(&mut self, path: &[u8], directory: bool) {
        let stays = directory
            && self
                .model
                .get(path)
                .is_some_and(|old| old.mode & libc::S_IFMT == libc::S_IFDIR);
        if !stays {
            self.model.retain(|other, _| !is_below(other, path));
        }
    }
}

/// Formats a time for PAX: -1.25 is a quarter of a second before -1.
fn seconds((seconds, nanos): (i64, i64)) -> String {
    match seconds {
        0.. => format!("{seconds}.{nanos:09}"),
        _ if nanos == 0 => seconds.to_string(),
        _ => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanos),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The comparison detects a difference in every field of an entry.
    #[test]
    fn compare_reports_every_difference() {
        let (_, model) = random(7).expect("a tree");
        let seen: Vec<Entry> = model.values().cloned().collect();
        assert_eq!(compare(&model, &seen), Ok(()));
        let changes: [fn(&mut Entry); 8] = [
            |e| e.path.push_str("00"),
            |e| e.mode ^= 1,
            |e| e.owner.0 ^= 1,
            |e| e.mtime.1 += 1,
            |e| e.size += 1,
            |e| e.content.push('0'),
            |e| drop(e.xattrs.insert("user.more".into(), String::new())),
            |e| e.first.push('0'),
        ];
        for change in changes {
            let mut other = seen.clone();
            change(&mut other[3]);
            assert!(compare(&model, &other).is_err());
        }
        assert!(compare(&model, &seen[1..]).is_err());
    }

    /// A dozen images cover every kind of entry, and the same seed produces the same image.
    #[test]
    fn random_covers_every_entry_and_is_reproducible() {
        let (first, again) = (random(1).expect("a tree"), random(1).expect("a tree"));
        assert_eq!(first.1, again.1);
        let kind = |mode: u32| mode & libc::S_IFMT;
        let all: Vec<Entry> = (0..12)
            .flat_map(|seed| random(seed).expect("a tree").1.into_values())
            .collect();
        for wanted in [
            libc::S_IFREG,
            libc::S_IFDIR,
            libc::S_IFLNK,
            libc::S_IFIFO,
            libc::S_IFCHR,
            libc::S_IFBLK,
        ] {
            assert!(all.iter().any(|e| kind(e.mode) == wanted), "{wanted:o}");
        }
        assert!(all.iter().any(|e| e.first != e.path), "hard links");
        assert!(all.iter().any(|e| !e.xattrs.is_empty()), "attributes");
        assert!(all.iter().any(|e| e.path.contains("0a")), "newlines");
        assert!(all.iter().any(|e| e.mode & 0o4000 != 0), "setuid");
    }
}
