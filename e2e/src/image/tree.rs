//! Random images: layers of random trees, and what a guest must see of them.
//!
//! [`random`] writes each layer's tar and keeps a model beside it that knows the rules of OCI layers only (entries replace,
//! whiteouts remove, opaque directories hide what is below). The model knows nothing of EROFS or overlayfs. One number
//! makes everything, so that a failure can be made again.

use super::layer::{Compression, Layer, LayerTar};
use crate::lister::Entry;
use crate::outcome::Result;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use tar::EntryType;

/// The directory of an image that holds its random tree.
pub const TOP: &str = "tree";
/// Entries that one layer adds or replaces.
const ENTRIES: std::ops::Range<usize> = 10..40;
/// Longest name, as on every Linux file system.
const NAME_MAX: usize = 255;

/// Paths below [`TOP`] to what is there; the top itself is "".
pub type Model = BTreeMap<Vec<u8>, Entry>;

/// Layers, lowest first, and the tree they make together.
pub fn random(seed: u64) -> Result<(Vec<Layer>, Model)> {
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

/// `first` of each entry is the inode's mark so far; afterwards it is the first of the paths that are left of it.
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

/// The first few differences, in words a reader can use.
pub fn compare(model: &Model, seen: &[Entry]) -> std::result::Result<(), String> {
    let seen: BTreeMap<&str, &Entry> = seen.iter().map(|e| (e.path.as_str(), e)).collect();
    let wanted: BTreeMap<&str, &Entry> = model.values().map(|e| (e.path.as_str(), e)).collect();
    let all: BTreeSet<&str> = seen.keys().chain(wanted.keys()).copied().collect();
    let differences: Vec<String> = all
        .into_iter()
        .filter(|path| seen.get(path) != wanted.get(path))
        .map(|path| {
            let name = hex::decode(path).unwrap_or_default();
            format!(
                "{:?}: the guest sees {:?}, and the model has {:?}",
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

/// One layer under construction.
struct Writer<'a> {
    rng: &'a mut StdRng,
    tar: LayerTar,
    model: &'a mut Model,
    /// Paths that this layer has written: a second entry of one name has no defined meaning.
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

/// Where a path of the model is in the image.
fn placed(path: &[u8]) -> Vec<u8> {
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
    /// A name of any bytes but those that mean something to tar or to layers.
    fn name(&mut self) -> Vec<u8> {
        let odd: [&[u8]; 6] = [b"a\nb", b"\xff\xfe", b" ", b"-n", b"\\134", b"\xc3\xa4"];
        let mut name = match self.rng.random_range(0..10) {
            0 => vec![b'x'; self.rng.random_range(90..NAME_MAX - 30)],
            1..4 => odd.choose(self.rng).unwrap_or(&odd[0]).to_vec(),
            4 => (0..12)
                .map(|_| self.rng.random_range(1..=255))
                .filter(|b| *b != b'/')
                .collect(),
            _ => b"n".to_vec(),
        };
        // Dots alone, and the names of whiteouts, are no names of files.
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

    /// Random facts for an entry of this type.
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
            // Names the inode, until all layers are there.
            first: format!("{:x}", self.rng.next_u64()),
        }
    }

    /// A directory of the merged tree, which this layer names too, as every tool that writes layers does.
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

    /// Writes a directory: new facts for one that is there, whose content stays.
    fn directory(&mut self, path: &[u8]) -> Result {
        let entry = self.entry(path, libc::S_IFDIR);
        self.put(path, entry, EntryType::Directory, b"", &[])
    }

    /// Whiteouts and opaque directories for what the layers below have.
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
            // A directory that this layer has entries in is not removed by it.
            if self.written.iter().any(|path| is_below(path, &victim)) {
                continue;
            }
            let cut = victim.iter().rposition(|byte| *byte == b'/');
            let parent = victim[..cut.unwrap_or(0)].to_vec();
            self.name_parents(&parent)?;
            let directory = self.model[&victim].mode & libc::S_IFMT == libc::S_IFDIR;
            if directory && self.rng.random() {
                self.directory(&victim)?;
                let mark = joined(&placed(&victim), b".wh..wh..opq");
                self.tar.bytes_file(EntryType::Regular, &mark, 0o644, b"")?;
                self.model.retain(|path, _| !is_below(path, &victim));
            } else {
                let name = &victim[cut.map_or(0, |at| at + 1)..];
                let mark = joined(&placed(&parent), &[b".wh.", name].concat());
                if name.len() + 4 > NAME_MAX {
                    continue;
                }
                self.tar.bytes_file(EntryType::Regular, &mark, 0o644, b"")?;
                self.model
                    .retain(|path, _| *path != victim && !is_below(path, &victim));
                // The same name again in this layer would contradict it.
                self.written.insert(victim);
            }
        }
        Ok(())
    }

    /// Writes a directory and those above it, as far as this layer has not.
    fn name_parents(&mut self, path: &[u8]) -> Result {
        if self.written.contains(path) {
            return Ok(());
        }
        if let Some(cut) = path.iter().rposition(|byte| *byte == b'/') {
            self.name_parents(&path[..cut])?;
        }
        self.directory(path)
    }

    /// One more entry: a new name, or one that replaces what a layer below has.
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
            // Holes: as zeros in the archive, and below as a sparse file of it.
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
                ("GNU.sparse.name", &placed(path)),
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
        // The file it is of may have been replaced; then there is nothing to link to.
        let Some(mut entry) = self.model.get(&target).cloned() else {
            return Ok(());
        };
        entry.path = hex::encode(path);
        self.forget(path, false);
        self.tar
            .bytes_link(EntryType::Link, &placed(path), &placed(&target))?;
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
        // A character device 0:0 is overlayfs's own whiteout.
        let numbers = (numbers.0.max(1), numbers.1);
        if entry_type != EntryType::Fifo {
            entry.content = format!("{}:{}", numbers.0, numbers.1);
        }
        self.forget(path, false);
        self.facts(&entry, &[])?;
        self.tar
            .bytes_device(entry_type, &placed(path), entry.mode & 0o7777, numbers)?;
        self.written.insert(path.to_vec());
        self.model.insert(path.to_vec(), entry);
        Ok(())
    }

    /// The PAX records that carry what a plain header cannot.
    fn facts(&mut self, entry: &Entry, more: &[(&str, &[u8])]) -> Result {
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
        self.facts(&entry, more)?;
        self.tar
            .bytes_file(kind, &placed(path), entry.mode & 0o7777, body)?;
        self.written.insert(path.to_vec());
        self.model.insert(path.to_vec(), entry);
        Ok(())
    }

    /// What was at the path goes; below it too, unless a directory takes a directory's place.
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

/// A time as PAX writes it: -1.25 is a quarter of a second before -1.
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

    /// The comparison must be able to fail, for every fact of an entry.
    #[test]
    fn every_difference_is_seen() {
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

    /// A dozen images have everything in them that an image can have; the same number makes the same one.
    #[test]
    fn everything_occurs() {
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
