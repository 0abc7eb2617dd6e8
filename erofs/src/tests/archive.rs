//! Archives byte by byte, well-formed or not, beyond what the crate tar would write.

/// A tar stream under construction. Headers are GNU ones of the crate tar; every other byte is made here.
pub struct Archive {
    bytes: Vec<u8>,
}

impl Archive {
    pub fn new() -> Self {
        Self { bytes: Vec::new() }
    }

    /// The stream with its end mark.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.extend([0; 1024]);
        self.bytes
    }

    /// The stream without one.
    pub fn cut(self) -> Vec<u8> {
        self.bytes
    }

    pub fn entry(
        &mut self,
        name: &str,
        kind: char,
        set: impl FnOnce(&mut tar::Header),
        body: &[u8],
    ) {
        self.raw(name.as_bytes(), kind as u8, set, body);
    }

    /// An entry with any bytes as its name, up to 100 of them.
    pub fn raw(&mut self, name: &[u8], kind: u8, set: impl FnOnce(&mut tar::Header), body: &[u8]) {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(body.len() as u64);
        header.set_entry_type(tar::EntryType::new(kind));
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        set(&mut header);
        header.set_cksum();
        self.bytes.extend(header.as_bytes());
        self.body(body);
    }

    pub fn file(&mut self, name: &str, body: &[u8], set: impl FnOnce(&mut tar::Header)) {
        self.entry(name, '0', set, body);
    }

    pub fn link(&mut self, name: &str, kind: char, target: &str) {
        self.entry(
            name,
            kind,
            |h| h.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes()),
            b"",
        );
    }

    pub fn device(&mut self, name: &str, kind: char, major: u32, minor: u32) {
        let set = |h: &mut tar::Header| {
            h.set_device_major(major).unwrap();
            h.set_device_minor(minor).unwrap();
        };
        self.entry(name, kind, set, b"");
    }

    /// A PAX header for the next entry.
    pub fn pax(&mut self, records: &[(&str, &[u8])]) {
        let mut body = Vec::new();
        for (key, value) in records {
            // The length counts itself.
            let bare = key.len() + value.len() + 3;
            let length = (bare..).find(|l| l.to_string().len() + bare == *l).unwrap();
            body.extend(format!("{length} {key}=").as_bytes());
            body.extend(*value);
            body.push(b'\n');
        }
        self.entry("PaxHeaders/x", 'x', |_| {}, &body);
    }

    /// GNU's long name (`L`) or link target (`K`) of the next entry.
    pub fn gnu_long(&mut self, kind: u8, text: &[u8]) {
        self.raw(b"././@LongLink", kind, |_| {}, &[text, b"\0"].concat());
    }

    /// A sparse file of GNU's old format, up to four pieces.
    pub fn old_sparse(&mut self, name: &str, size: u64, pieces: &[(u64, &[u8])]) {
        let body: Vec<u8> = pieces
            .iter()
            .flat_map(|(_, bytes)| bytes.iter().copied())
            .collect();
        let set = |h: &mut tar::Header| {
            let gnu = h.as_gnu_mut().unwrap();
            for (slot, (offset, bytes)) in gnu.sparse.iter_mut().zip(pieces) {
                slot.set_offset(*offset);
                slot.set_length(bytes.len() as u64);
            }
            gnu.set_real_size(size);
        };
        self.entry(name, 'S', set, &body);
    }

    fn body(&mut self, body: &[u8]) {
        self.bytes.extend(body);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
    }
}
