//! Import cycles between modules.
//!
//! Text based: a file imports the modules that its `crate::`, `super::` and `self::` paths name. A name that a module
//! re-exports or imports counts as the module it comes from. In every module the imports between its submodules, each with
//! everything below it, must not form a cycle; a module and its own submodules may use each other. Tests may import
//! anything.

use super::{code, fail, sources};
use std::collections::{BTreeMap, BTreeSet};

/// Cycles between files of one folder that are accepted: crate, file, file, reason.
const ACCEPTED: [(&str, &str, &str, &str); 1] = [(
    "portal",
    "interfaces::execution",
    "interfaces::follow",
    "ExecutionInterface returns an OutputFollower, which reopens its stream by ExecutionInterface",
)];

type Module = Vec<String>;

/// A source file.
struct File {
    module: Module,
    path: String,
    code: String,
}

/// Files of every crate.
fn crates() -> BTreeMap<String, Vec<File>> {
    let mut crates: BTreeMap<String, Vec<File>> = BTreeMap::new();
    for (path, text) in sources() {
        let Some((name, file)) = path.split_once("/src/") else {
            continue;
        };
        let parts = file.trim_end_matches(".rs").split('/');
        let mut module: Module = parts.map(str::to_owned).collect();
        let is_root = module.len() == 1 && matches!(module[0].as_str(), "lib" | "main");
        if is_root || module.last().is_some_and(|last| last == "mod") {
            module.pop();
        }
        let is_other_target = module.first().is_some_and(|first| first == "bin");
        if !name.contains('/') && !is_other_target && !module.iter().any(|m| m == "tests") {
            let name = name.to_owned();
            let code = code(&text);
            crates
                .entry(name)
                .or_default()
                .push(File { module, path, code });
        }
    }
    crates
}

/// Appends the paths of the use tree at the beginning of `text`, each behind `base`.
fn expand(text: &str, base: &[String], paths: &mut Vec<Module>) {
    let text = text.trim_start();
    if let Some(list) = text.strip_prefix('{') {
        let (mut depth, mut start) = (1, 0);
        for (at, c) in list.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 || depth == 1 && c == ',' {
                expand(&list[start..at], base, paths);
                start = at + 1;
            }
            if depth == 0 {
                return;
            }
        }
        return;
    }
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    let (name, rest) = text.split_at(end.unwrap_or(text.len()));
    let mut path = base.to_vec();
    if !name.is_empty() && name != "self" {
        path.push(name.to_owned());
    }
    match rest.strip_prefix("::") {
        Some(rest) if !name.is_empty() => expand(rest, &path, paths),
        _ => paths.push(path),
    }
}

/// Absolute paths that a file names.
fn paths(file: &File) -> Vec<Module> {
    let mut paths = Vec::new();
    for (prefix, mut base) in [
        ("crate::", Module::new()),
        ("self::", file.module.clone()),
        ("super::", file.module.clone()),
    ] {
        if prefix == "super::" && base.pop().is_none() {
            continue;
        }
        for (at, _) in file.code.match_indices(prefix) {
            let before = file.code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            let (mut base, mut rest) = (base.clone(), &file.code[at + prefix.len()..]);
            while let Some(further) = rest.strip_prefix("super::") {
                base.pop();
                rest = further;
            }
            expand(rest, &base, &mut paths);
        }
    }
    paths
}

/// Names that a module's `use` statements bring in, with their absolute paths.
fn imported(file: &File, modules: &BTreeSet<Module>) -> BTreeMap<String, Module> {
    let mut names = BTreeMap::new();
    let mut add = |found: Vec<Module>| {
        for path in found {
            if let Some(name) = path.last() {
                names.insert(name.clone(), path.clone());
            }
        }
    };
    add(paths(file));
    for statement in file.code.split(';') {
        let Some((_, tree)) = statement.rsplit_once("use ") else {
            continue;
        };
        let mut found = Vec::new();
        expand(tree, &file.module, &mut found);
        // Paths that begin with a submodule; others begin with a crate.
        let below = file.module.len() + 1;
        found.retain(|path| path.get(..below).is_some_and(|p| modules.contains(p)));
        add(found);
    }
    names
}

/// Imports between the submodules of a module: module → submodule → imported submodule → files.
type Imports = BTreeMap<Module, BTreeMap<String, BTreeMap<String, BTreeSet<String>>>>;

fn imports(files: &[File]) -> Imports {
    let modules: BTreeSet<Module> = files.iter().map(|file| file.module.clone()).collect();
    let mut names: BTreeMap<&Module, BTreeMap<String, Module>> = BTreeMap::new();
    for file in files {
        let imported = imported(file, &modules);
        names.entry(&file.module).or_default().extend(imported);
    }
    // The module that defines what `path` names. Chains of re-exports are short.
    let resolve = |path: &Module| {
        let mut path = path.clone();
        for _ in 0..4 {
            let known = (0..=path.len())
                .rev()
                .find(|n| modules.contains(&path[..*n]));
            let known = known.unwrap_or(0);
            let (module, rest) = path.split_at(known);
            let next = rest
                .first()
                .and_then(|name| names.get(&module.to_vec())?.get(name));
            match next {
                Some(next) if *next != path => path = next.clone(),
                _ => return module.to_vec(),
            }
        }
        path
    };
    let mut imports = Imports::new();
    for file in files {
        for target in paths(file).iter().map(resolve) {
            let common = file.module.iter().zip(&target).take_while(|(a, b)| a == b);
            let depth = common.count();
            if let (Some(from), Some(to)) = (file.module.get(depth), target.get(depth)) {
                let level = imports.entry(target[..depth].to_vec()).or_default();
                let targets = level.entry(from.clone()).or_default();
                let files = targets.entry(to.clone()).or_default();
                files.insert(file.path.clone());
            }
        }
    }
    imports
}

/// Submodules that `from` reaches.
fn reached<'a>(
    imports: &'a BTreeMap<String, BTreeMap<String, BTreeSet<String>>>,
    from: &'a str,
) -> BTreeSet<&'a str> {
    let (mut seen, mut queue) = (BTreeSet::new(), vec![from]);
    while let Some(module) = queue.pop() {
        for next in imports.get(module).into_iter().flat_map(|m| m.keys()) {
            if seen.insert(next.as_str()) {
                queue.push(next);
            }
        }
    }
    seen
}

#[test]
fn modules_do_not_import_each_other_in_cycles() {
    let mut mistakes = Vec::new();
    let mut accepted = BTreeSet::new();
    for (name, files) in crates() {
        for (level, imports) in imports(&files) {
            for (module, targets) in &imports {
                for (target, files) in targets {
                    if !reached(&imports, target).contains(module.as_str()) {
                        continue;
                    }
                    let full = |last: &str| {
                        let parts = level.iter().map(String::as_str).chain([last]);
                        parts.collect::<Vec<_>>().join("::")
                    };
                    let (from, to) = (full(module), full(target));
                    let known = ACCEPTED.iter().position(|(krate, a, b, _)| {
                        *krate == name && ((*a, *b) == (&from, &to) || (*b, *a) == (&from, &to))
                    });
                    match known {
                        Some(known) => drop(accepted.insert(known)),
                        None => mistakes.push(format!("{name}: {from} → {to} in {files:?}")),
                    }
                }
            }
        }
    }
    for (at, (name, a, b, _)) in ACCEPTED.iter().enumerate() {
        if !accepted.contains(&at) {
            mistakes.push(format!("{name}: {a} and {b} are listed, without a cycle"));
        }
    }
    fail(&mistakes);
}

#[test]
fn cycles_through_re_exports_and_nested_folders_are_found() {
    let file = |module: &str, code: &str| File {
        module: module
            .split("::")
            .filter(|m| !m.is_empty())
            .map(str::to_owned)
            .collect(),
        path: module.to_owned(),
        code: code.to_owned(),
    };
    let files = [
        file("", "mod a; mod b;"),
        file("a", "mod x; pub(crate) use x::{Thing, Other as Renamed};"),
        file("a::x", "use super::y::helper; use crate::b::{self, B};"),
        file("a::y", "use super::Thing;"),
        file("b", "pub use crate::a::y::helper;"),
    ];
    let imports = imports(&files);
    let edges = |level: &[&str]| {
        let level: Module = level.iter().map(|m| (*m).to_owned()).collect();
        let imports = &imports[&level];
        let of = |(from, to): (&String, &BTreeMap<String, BTreeSet<String>>)| {
            to.keys()
                .map(|to| format!("{from} → {to}"))
                .collect::<Vec<_>>()
        };
        imports.iter().flat_map(of).collect::<Vec<_>>()
    };
    assert_eq!(edges(&[]), ["a → b", "b → a"]);
    assert_eq!(edges(&["a"]), ["x → y", "y → x"]);
}
