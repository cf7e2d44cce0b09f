//! The house's order, read from its source: a module imports only from floors below it, says what it is, and stays
//! readable.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Floors, lowest first. Modules on one floor don't import each other, except as `BESIDE` says.
const FLOORS: [&[&str]; 13] = [
    &["net", "wire"],
    &["tenant"],
    &["refusal"],
    &["identity"],
    &["quota"],
    &["usage"],
    &["catalog"],
    &["upstream"],
    &["session"],
    &["front", "transition"],
    &["admin"],
    &["config"],
    &["app", "cli"],
];

/// Imports along one floor: the commands start the application.
const BESIDE: [(&str, &str); 1] = [("cli", "app")];

/// Lower, but not to be seen: a client's path asks `tenant::directory`, whatever the catalog is.
const HIDDEN: [(&str, &str); 2] = [("session", "catalog"), ("front", "catalog")];

/// Longest file in lines.
const LINES_MAX: usize = 500;

/// Longer files and why they are not split.
const LONG: [(&str, &str); 7] = [
    ("front/mongo/commands.rs", "one table"),
    ("front/mongo/rewrite/message.rs", "one field table and its one rule each: what is not in it is refused"),
    ("front/redis/client.rs", "one client's waiting: what it reads, writes and is told has to be seen together"),
    ("front/redis/commands.rs", "one table"),
    ("upstream/postgres/pool.rs", "queue, budget and idle list share one lock and its invariants"),
    ("wire/mongo/bson.rs", "one codec"),
    ("wire/resp.rs", "one codec"),
];

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Every Rust file under `src`, by its path from there.
fn files() -> BTreeMap<String, String> {
    let root = source();
    let mut found = BTreeMap::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder of the repository") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&root).expect("under src").to_string_lossy().into_owned();
                found.insert(name, fs::read_to_string(path).expect("UTF-8"));
            }
        }
    }
    found
}

/// The top-level module that a file belongs to.
fn module(file: &str) -> &str {
    file.split('/').next().unwrap_or(file).trim_end_matches(".rs")
}

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|modules| modules.contains(&module))
}

/// The code without its comments.
fn code(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The top-level modules that a text names after `crate::`, alone or in braces.
fn imports(text: &str) -> Vec<String> {
    let text = code(text);
    let mut names = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        // `$crate::` and `other_crate::` are not ours.
        if text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &text[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => names.push(word(rest)),
            Some(list) => {
                let mut depth = 0usize;
                let mut expected = true;
                for (index, character) in list.char_indices() {
                    match character {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => expected = true,
                        c if expected && depth == 0 && (c.is_alphanumeric() || c == '_') => {
                            names.push(word(&list[index..]));
                            expected = false;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    names
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// Why `from` may not import `to`, if it may not.
fn fault(from: &str, to: &str) -> Option<String> {
    if from == to || to.starts_with(char::is_uppercase) {
        return None;
    }
    let (Some(own), Some(theirs)) = (floor(from), floor(to)) else {
        return Some(format!("{to} is on no floor"));
    };
    let allowed =
        if own == theirs { BESIDE.contains(&(from, to)) } else { theirs < own && !HIDDEN.contains(&(from, to)) };
    (!allowed).then(|| format!("{from} imports {to}"))
}

#[test]
fn a_module_imports_only_from_floors_below() {
    let mut faults = Vec::new();
    for (file, text) in files() {
        let own = module(&file);
        // Tests of a module may start the servers that it talks to.
        if matches!(own, "lib" | "main") || is_test(&file) {
            continue;
        }
        if floor(own).is_none() {
            faults.push(format!("{file}: {own} is on no floor"));
            continue;
        }
        faults.extend(imports(&text).iter().filter_map(|other| fault(own, other)).map(|why| format!("{file}: {why}")));
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn the_check_sees_what_it_is_for() {
    let text = "use crate::{\n net::{Conn, Peer},\n tenant::Tier, catalog };\nlet x = crate::front::serve();\n// crate::admin\n";
    assert_eq!(imports(text), ["net", "tenant", "catalog", "front"]);
    assert!(fault("net", "tenant").is_some() && fault("tenant", "net").is_none());
    assert!(fault("front", "catalog").is_some() && fault("admin", "catalog").is_none());
    assert!(fault("wire", "net").is_some() && fault("cli", "app").is_none() && fault("app", "cli").is_some());
}

#[test]
fn every_module_says_what_lives_there() {
    let silent: Vec<String> = files()
        .into_iter()
        .filter(|(file, text)| !text.starts_with("//!") && !is_test(file))
        .map(|(file, _)| file)
        .collect();
    assert!(silent.is_empty(), "these begin without a //! line: {silent:?}");
}

#[test]
fn files_stay_readable() {
    let long: Vec<String> = files()
        .iter()
        .map(|(file, text)| (file, text.lines().count()))
        .filter(|(file, lines)| *lines > LINES_MAX && !is_test(file) && !LONG.iter().any(|(long, _)| long == file))
        .map(|(file, lines)| format!("{file}: {lines} lines"))
        .collect();
    assert!(long.is_empty(), "over {LINES_MAX} lines: {long:?}");
    let all = files();
    let stale: Vec<&str> = LONG
        .iter()
        .map(|(file, _)| *file)
        .filter(|file| all.get(*file).is_none_or(|text| text.lines().count() <= LINES_MAX))
        .collect();
    assert!(stale.is_empty(), "no longer long, or gone: {stale:?}");
}

#[test]
fn only_the_configuration_reads_the_environment() {
    let readers: Vec<String> = files()
        .into_iter()
        .filter(|(file, text)| file != "config.rs" && !is_test(file) && code(text).contains("env::var"))
        .map(|(file, _)| file)
        .collect();
    assert!(readers.is_empty(), "{readers:?}");
}

fn is_test(file: &str) -> bool {
    file.ends_with("/tests.rs") || file.contains("/tests/")
}
