//! Import cycles between the top-level modules of a crate.
//!
//! Text based: a module imports another if one of its files names `crate::other` or reaches it through `super::`. Names that
//! lib.rs or main.rs re-export count as the module they come from. Tests may import anything.

use super::{fail, sources};
use std::collections::{BTreeMap, BTreeSet};

/// Imports of one crate: module → imported module → files.
type Imports = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

/// The code of a file without comments and without its inline tests.
fn code(text: &str) -> String {
    let end = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    let lines = text[..end].lines();
    let code = lines.map(|line| line.split("//").next().unwrap_or_default());
    code.collect::<Vec<_>>().join("\n")
}

/// The identifier at the beginning of `text`.
fn identifier(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    &text[..end.unwrap_or(text.len())]
}

/// First identifiers behind `prefix::`, those of a braced list included.
fn names_behind<'a>(code: &'a str, prefix: &str) -> Vec<&'a str> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        match rest.strip_prefix('{') {
            None => names.push(identifier(rest)),
            Some(list) => {
                let (mut depth, mut start) = (1, true);
                for (at, c) in list.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        _ => {}
                    }
                    if depth == 0 {
                        break;
                    }
                    if start && !c.is_whitespace() {
                        names.push(identifier(&list[at..]));
                        start = false;
                    }
                    start |= c == ',' && depth == 1;
                }
            }
        }
    }
    names
}

/// Imports of every crate.
fn imports() -> BTreeMap<String, Imports> {
    let mut files: BTreeMap<String, Vec<(Vec<String>, String, String)>> = BTreeMap::new();
    for (path, text) in sources() {
        let Some((name, file)) = path.split_once("/src/") else {
            continue;
        };
        let mut module: Vec<String> = file
            .trim_end_matches(".rs")
            .split('/')
            .map(str::to_owned)
            .collect();
        if module.len() > 1 && module.last().is_some_and(|last| last == "mod") {
            module.pop();
        }
        if !name.contains('/') && module[0] != "bin" && !module.iter().any(|m| m == "tests") {
            let file = (module, path.clone(), code(&text));
            files.entry(name.to_owned()).or_default().push(file);
        }
    }
    let of_crate = |files: &Vec<(Vec<String>, String, String)>| {
        let is_root = |module: &[String]| matches!(module[0].as_str(), "lib" | "main");
        let modules: BTreeSet<&str> = files
            .iter()
            .filter(|(module, ..)| !is_root(module))
            .map(|(module, ..)| module[0].as_str())
            .collect();
        let mut reexports = BTreeMap::new();
        for (_, _, root) in files.iter().filter(|(module, ..)| is_root(module)) {
            for statement in root.split("pub use ").skip(1) {
                let statement = statement.split(';').next().unwrap_or_default();
                let from = identifier(statement);
                let words = statement.split(|c: char| !c.is_alphanumeric() && c != '_');
                reexports.extend(words.map(|word| (word, from)));
            }
        }
        let mut imports = Imports::new();
        for (module, path, code) in files.iter().filter(|(module, ..)| !is_root(module)) {
            let to_root = "super::".repeat(module.len());
            let mut names = names_behind(code, "crate::");
            names.extend(names_behind(code, &to_root));
            for name in names {
                let target = *modules.get(name).or(reexports.get(name)).unwrap_or(&"");
                if modules.contains(target) && target != module[0] {
                    let from = imports.entry(module[0].clone()).or_default();
                    let files = from.entry(target.to_owned()).or_default();
                    files.insert(path.clone());
                }
            }
        }
        imports
    };
    files
        .iter()
        .map(|(name, files)| (name.clone(), of_crate(files)))
        .collect()
}

/// Modules that `from` reaches.
fn reached<'a>(imports: &'a Imports, from: &'a str) -> BTreeSet<&'a str> {
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
    for (name, imports) in &imports() {
        for (module, targets) in imports {
            for (target, files) in targets {
                if reached(imports, target).contains(module.as_str()) {
                    mistakes.push(format!("{name}: {module} → {target} in {files:?}"));
                }
            }
        }
    }
    fail(&mistakes);
}
