//! Base layer of every test image: Debian's dynamic busybox with its libraries, one hard link for each applet (masking
//! one must not hide another), and the user database of the user tests.

use super::layer::{Compression, Layer, LayerTar};
use crate::failure::{During, Result};
use crate::namespaces::run;
use std::path::Path;

/// `/etc/passwd` of the image.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/sh\n\
    app:x:1000:1000:app:/home/app:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n";
/// `/etc/group` of the image: `app` is a member of two more groups.
const GROUP: &str = "root:x:0:\nwww-data:x:33:\napp:x:1000:\nextra:x:50000:app\nmore:x:50001:app,www-data\n\
    nobody:x:65534:\n";

/// Returns the layer with the given compression.
pub(crate) fn layer(busybox: &Path, compression: Compression) -> Result<Layer> {
    let mut tar = LayerTar::default();
    for dir in [
        "bin",
        "etc",
        "lib",
        "lib/x86_64-linux-gnu",
        "lib64",
        "usr",
        "usr/bin",
        "var",
        "var/www",
        "proc",
        "sys",
        "dev",
    ] {
        tar.dir(dir, 0o755)?;
    }
    tar.dir("tmp", 0o1777)?
        .dir("root", 0o700)?
        .dir("home", 0o755)?;
    tar.owned_dir("home/app", 0o755, (1000, 1000))?;
    let program = std::fs::read(busybox).during(busybox.display())?;
    tar.file("bin/busybox", 0o755, &program)?;
    let path = busybox.to_str().unwrap_or("/bin/busybox");
    for applet in run(path, &["--list"])?.lines().filter(|a| *a != "busybox") {
        tar.hard_link_of_mode(&format!("bin/{applet}"), "bin/busybox", 0o755)?;
    }
    add_libraries(&mut tar, path)?;
    tar.file("etc/passwd", 0o644, PASSWD.as_bytes())?;
    tar.file("etc/group", 0o644, GROUP.as_bytes())?;
    tar.file("var/www/index.html", 0o644, b"hello from the pod\n")?;
    tar.finish(compression)
}

/// Adds a program of this machine as `target`, together with the libraries that it loads.
pub(crate) fn with_libraries(tar: &mut LayerTar, program: &Path, target: &str) -> Result {
    let bytes = std::fs::read(program).during(program.display())?;
    tar.file(target, 0o755, &bytes)?;
    add_libraries(tar, &program.to_string_lossy())
}

fn add_libraries(tar: &mut LayerTar, program: &str) -> Result {
    for library in libraries(program)? {
        let bytes = std::fs::read(&library).during(&library)?;
        tar.file(library.trim_start_matches('/'), 0o755, &bytes)?;
    }
    Ok(())
}

/// Returns the paths that the dynamic linker loads, its own included.
pub(crate) fn libraries(program: &str) -> Result<Vec<String>> {
    Ok(listed_libraries(&run("ldd", &[program])?))
}

/// Returns the paths in the output of ldd.
pub(crate) fn listed_libraries(listing: &str) -> Vec<String> {
    listing
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(str::to_owned)
        .collect()
}
