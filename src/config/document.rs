//! From TOML text, environment and secret files to a [`Config`]; knows on which line each key stands.

use std::{borrow::Cow, collections::HashMap, ops::Range, path::Path};

use serde::Deserialize;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{Config, FURTHER_SECRETS, Fault, PATHS, SECRETS};

/// What names of overriding variables begin with; the key follows, `__` between its parts.
pub(super) const ENVIRONMENT_PREFIX: &str = "DYNABASE__";

/// Faults told at once; a file with more is another kind of file.
const FAULTS_MAX: usize = 50;

/// Where each key stands.
#[derive(Default)]
pub(super) struct Lines(HashMap<String, usize>);

impl Lines {
    /// The line of a key, of its `_file` form, or of the nearest section around it that the file has.
    pub(super) fn line(&self, key: &str) -> Option<usize> {
        let mut key = key;
        loop {
            if let Some(line) = self.0.get(key).or_else(|| self.0.get(&format!("{key}_file"))) {
                return Some(*line);
            }
            key = key.rsplit_once('.')?.0;
        }
    }
}

/// Reads all that can be read and tells all that can't. `None` only when the text is not TOML.
pub(super) fn read(text: &str, folder: &Path, environment: &[(String, String)]) -> (Option<Config>, Lines, Vec<Fault>) {
    let (document, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        let fault = |error: &toml::de::Error| Fault {
            line: error.span().map(|span| line_of(text, span.start)),
            key: String::new(),
            what: error.message().to_owned(),
        };
        return (None, Lines::default(), errors.iter().take(FAULTS_MAX).map(fault).collect());
    }
    let span = document.span();
    let mut table = document.into_inner();
    let mut lines = Lines::default();
    collect(&table, "", text, &mut lines);
    let mut faults = Vec::new();
    let overridden = override_from(&mut table, text.len() + 1, environment, &mut faults);
    read_secret_files(&mut table, folder, &lines, &mut faults);
    for key in PATHS {
        resolve(&mut table, key, folder);
    }
    // A section with every key commented out is one that is not there.
    for section in ["tls", "identity", "catalog"] {
        if entry(&mut table, section).is_some_and(|value| value.get_ref().as_table().is_some_and(DeTable::is_empty)) {
            table.remove(section);
        }
    }
    let config = deserialize(table, span, text, &overridden, &mut faults);
    (config, lines, faults)
}

/// Deserializes; on a fault remembers it, takes the key away and goes on, so that one run tells them all.
fn deserialize(
    mut table: DeTable<'_>,
    span: Range<usize>,
    text: &str,
    overridden: &HashMap<String, &str>,
    faults: &mut Vec<Fault>,
) -> Option<Config> {
    let places: HashMap<usize, String> =
        overridden.keys().filter_map(|key| Some((entry(&mut table, key)?.span().start, key.clone()))).collect();
    let mut as_text = overridden.clone();
    while faults.len() < FAULTS_MAX {
        let deserializer = toml::Deserializer::from(Spanned::new(span.clone(), table.clone()));
        let error = match Config::deserialize(deserializer) {
            Ok(config) => return Some(config),
            Err(error) => error,
        };
        let place = error.span().map_or(0, |span| span.start);
        let key = match places.get(&place) {
            Some(key) => Some(key.clone()),
            None => error.span().and_then(|span| key_at(&table, "", &span)),
        };
        let Some(key) = key else {
            faults.push(Fault { line: None, key: String::new(), what: error.message().to_owned() });
            return None;
        };
        // `DYNABASE__ADMIN__TOKEN=12345…` reads as a number, but may be meant as text.
        if let (Some(raw), Some(value)) = (as_text.remove(&key), entry(&mut table, &key))
            && !value.get_ref().is_str()
        {
            *value = Spanned::new(place..place, DeValue::String(Cow::Owned(raw.to_owned())));
            continue;
        }
        let from_environment = overridden.contains_key(&key);
        let line = (!from_environment).then(|| line_of(text, place));
        let secret = SECRETS.iter().chain(&FURTHER_SECRETS).any(|secret| *secret == key);
        let mut what = if secret { "is not text".to_owned() } else { error.message().replace('\n', " ") };
        if from_environment {
            what.push_str(&format!(" (from {})", variable(&key)));
        }
        faults.push(Fault { line, key: key.clone(), what });
        if !remove(&mut table, &key) {
            return None;
        }
    }
    None
}

/// Gives a value, and what is in it, one place.
fn move_to(value: &mut Spanned<DeValue<'_>>, place: usize) {
    let mut inner = std::mem::replace(value.get_mut(), DeValue::Boolean(false));
    if let DeValue::Array(list) = &mut inner {
        list.iter_mut().for_each(|item| move_to(item, place));
    }
    *value = Spanned::new(place..place, inner);
}

/// The environment's name of a key.
fn variable(key: &str) -> String {
    format!("{ENVIRONMENT_PREFIX}{}", key.to_uppercase().replace('.', "__"))
}

/// Puts the environment's values into the table: as TOML values where they are such, else as text. Gives the keys
/// with their raw values. Each gets a place of its own from `place` on, beyond the text, to be recognised by in errors.
fn override_from<'i>(
    table: &mut DeTable<'i>,
    place: usize,
    environment: &'i [(String, String)],
    faults: &mut Vec<Fault>,
) -> HashMap<String, &'i str> {
    let mut keys = HashMap::new();
    for (place, (name, raw)) in (place..).zip(environment) {
        let Some(key) = name.strip_prefix(ENVIRONMENT_PREFIX) else { continue };
        let key = key.to_lowercase().replace("__", ".");
        let text = |_| Spanned::new(0..0, DeValue::String(Cow::Borrowed(raw.as_str())));
        let mut value = DeValue::parse(raw).unwrap_or_else(text);
        move_to(&mut value, place);
        // The environment wins over the file's other form of a secret too.
        remove(table, &format!("{key}_file"));
        remove(table, &key);
        if insert(table, &key, value) {
            keys.insert(key, raw.as_str());
        } else {
            faults.push(Fault { line: None, key, what: format!("is no key (from {name})") });
        }
    }
    keys
}

/// Replaces `<key>_file` by what the file holds.
fn read_secret_files(table: &mut DeTable<'_>, folder: &Path, lines: &Lines, faults: &mut Vec<Fault>) {
    for key in SECRETS {
        let file_key = format!("{key}_file");
        let Some(value) = entry(table, &file_key) else { continue };
        let span = value.span();
        let Some(path) = value.get_ref().as_str().map(str::to_owned) else { continue };
        let both = entry(table, key).is_some();
        remove(table, &file_key);
        let mut fault = |what: String| faults.push(Fault { line: lines.line(&file_key), key: file_key.clone(), what });
        if both {
            fault(format!("and {key} are both set: keep one"));
            continue;
        }
        match std::fs::read_to_string(folder.join(&path)) {
            Ok(secret) => {
                let secret = secret.trim_end_matches(['\r', '\n']).to_owned();
                insert(table, key, Spanned::new(span, DeValue::String(Cow::Owned(secret))));
            }
            Err(error) => fault(format!("{path}: {error}")),
        }
    }
}

/// Makes a relative path one from the configuration's folder.
fn resolve(table: &mut DeTable<'_>, key: &str, folder: &Path) {
    if let Some(value) = entry(table, key)
        && let Some(path) = value.get_ref().as_str()
    {
        let path = folder.join(path).to_string_lossy().into_owned();
        let span = value.span();
        *value = Spanned::new(span, DeValue::String(Cow::Owned(path)));
    }
}

/// Remembers the line of every key.
fn collect(table: &DeTable<'_>, prefix: &str, text: &str, lines: &mut Lines) {
    for (key, value) in table {
        let path = join(prefix, key.get_ref());
        lines.0.insert(path.clone(), line_of(text, key.span().start));
        if let DeValue::Table(inner) = value.get_ref() {
            collect(inner, &path, text, lines);
        }
    }
}

/// The innermost key whose name or value stands at `span`.
fn key_at(table: &DeTable<'_>, prefix: &str, span: &Range<usize>) -> Option<String> {
    for (key, value) in table {
        let path = join(prefix, key.get_ref());
        if key.span().start == span.start {
            return Some(path);
        }
        if let DeValue::Table(inner) = value.get_ref()
            && let Some(found) = key_at(inner, &path, span)
        {
            return Some(found);
        }
        if value.span().start <= span.start && span.end <= value.span().end {
            return Some(path);
        }
    }
    None
}

fn entry<'t, 'i>(table: &'t mut DeTable<'i>, key: &str) -> Option<&'t mut Spanned<DeValue<'i>>> {
    let mut parts = key.split('.');
    let mut found = table.get_mut(parts.next()?)?;
    for part in parts {
        match found.get_mut() {
            DeValue::Table(inner) => found = inner.get_mut(part)?,
            _ => return None,
        }
    }
    Some(found)
}

/// Sets a key, making its sections where they are missing. Says whether there was place for it.
fn insert<'i>(table: &mut DeTable<'i>, key: &str, value: Spanned<DeValue<'i>>) -> bool {
    let place = value.span();
    let named = |name: &str| Spanned::new(place.clone(), Cow::Owned(name.to_owned()));
    match key.split_once('.') {
        None => {
            table.insert(named(key), value);
            !key.is_empty()
        }
        Some((section, rest)) => {
            if !table.contains_key(section) {
                table.insert(named(section), Spanned::new(place.clone(), DeValue::Table(DeTable::new())));
            }
            match table.get_mut(section).map(Spanned::get_mut) {
                Some(DeValue::Table(inner)) => insert(inner, rest, value),
                _ => false,
            }
        }
    }
}

fn remove(table: &mut DeTable<'_>, key: &str) -> bool {
    match key.rsplit_once('.') {
        None => table.remove(key).is_some(),
        Some((section, last)) => match entry(table, section).map(Spanned::get_mut) {
            Some(DeValue::Table(inner)) => inner.remove(last).is_some(),
            _ => false,
        },
    }
}

fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") }
}

fn line_of(text: &str, at: usize) -> usize {
    1 + text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count()
}
