//! Prepared statements that follow their client from one upstream connection to the next.
//!
//! A client's statement names are its own; upstream, a statement goes by a name of ours, shared by all clients of a
//! database that prepare the same text with the same types under the same `search_path`. An unnamed statement whose
//! text comes again is kept prepared under such a name too, which spares the server parsing and planning.
//!
//! Sharing goes stale when a schema changes. Every DDL seen raises the database's epoch, and a statement belongs to
//! the epoch in which it was first prepared: who prepares a text anew gets a new statement, as on a server of its
//! own. Who goes on using an old one on a connection that does not have it yet may meet other types than it was told
//! of; there the types are compared first, and the server's own "cached plan must not change result type" is raised
//! where they differ. DDL that did not pass through here raises the epoch when a server complains of it.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicU64, Ordering},
};

use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
use parking_lot::Mutex;
use std::hash::BuildHasher;

use super::scan::{self, Scan};
use crate::{
    upstream::postgres::connection::{Parameters, Settings, Value},
    wire::postgres::{HEAD, cstr},
};

/// What every statement name of ours begins with. A client's own name that begins so is passed on changed.
pub const PREFIX: &[u8] = b"_dynabase_";

/// Shared statements kept per database, and their bytes; beyond, those that no client holds are dropped.
const SHARED_MAX: usize = 4096;
const SHARED_MAX_BYTES: usize = 16 << 20;

/// Texts remembered as seen once, by hash: a text is worth a name when it comes again.
const SEEN: usize = 1024;

/// Combinations of startup parameters remembered per database.
const PROFILES_MAX: usize = 256;

/// A statement as prepared upstream.
#[derive(Debug)]
pub struct Statement {
    /// Unique in this process.
    pub id: u64,
    /// Its name upstream.
    pub name: Box<[u8]>,
    /// Query text, zero, parameter types: the body of its Parse message behind the name.
    pub definition: Box<[u8]>,
    /// The `search_path` it was written for.
    path: Option<Value>,
    /// The schema epoch in which it was first prepared.
    pub epoch: u64,
    /// What a client was told of its parameters and columns ([`Types::finish`]); 0 while nobody asked.
    pub described: AtomicU64,
    /// What it may do.
    pub scan: Scan,
}

/// What clients of one database share.
#[derive(Debug)]
pub struct Shared {
    epoch: AtomicU64,
    /// Numbers statements for the whole process: connections outlive what their clients share.
    ids: Arc<AtomicU64>,
    table: Mutex<Shelf>,
    settings: Mutex<HashMap<Settings, Weak<Settings>>>,
    profiles: Mutex<HashMap<Arc<Settings>, Arc<Parameters>>>,
}

#[derive(Debug)]
struct Shelf {
    hasher: DefaultHashBuilder,
    statements: HashTable<Arc<Statement>>,
    bytes: usize,
    seen: Box<[u64]>,
}

impl Shared {
    /// Nothing yet; statements are numbered by `ids`.
    pub fn new(ids: Arc<AtomicU64>) -> Self {
        Self {
            epoch: AtomicU64::new(1),
            ids,
            table: Mutex::new(Shelf {
                hasher: DefaultHashBuilder::default(),
                statements: HashTable::new(),
                bytes: 0,
                seen: vec![0; SEEN].into(),
            }),
            settings: Mutex::default(),
            profiles: Mutex::default(),
        }
    }

    /// The schema epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Notes that the schema may have changed.
    pub fn raise_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::Relaxed);
    }

    /// Has every statement that was made up to epoch `other`, of another database, count as one of before a change.
    pub fn raise_above(&self, other: u64) {
        self.epoch.fetch_max(other + 1, Ordering::Relaxed);
    }

    /// The shared statement with this definition, made if need be.
    pub fn statement(&self, definition: &[u8], query: &[u8], path: Option<&Value>) -> Arc<Statement> {
        let shelf = self.table.lock();
        let hash = hash(&shelf.hasher, definition, path);
        if let Some(found) = shelf.find(hash, definition, path, self.epoch()) {
            return found;
        }
        drop(shelf);
        self.add(hash, self.make(definition, query, path))
    }

    /// A statement that nobody else gets: for a client whose names mean something else than others'.
    pub fn private(&self, definition: &[u8], query: &[u8], path: Option<&Value>) -> Arc<Statement> {
        Arc::new(self.make(definition, query, path))
    }

    /// The statement of a text, and whether it is a recurring one, worth a name upstream. The first time it is not.
    pub fn recurring(&self, definition: &[u8], query: &[u8], path: Option<&Value>) -> (Arc<Statement>, bool) {
        let mut shelf = self.table.lock();
        let hash = hash(&shelf.hasher, definition, path);
        if let Some(found) = shelf.find(hash, definition, path, self.epoch()) {
            return (found, true);
        }
        let place = usize::try_from(hash % SEEN as u64).unwrap_or(0);
        let again = std::mem::replace(&mut shelf.seen[place], hash) == hash;
        drop(shelf);
        let made = self.make(definition, query, path);
        if again { (self.add(hash, made), true) } else { (Arc::new(made), false) }
    }

    fn make(&self, definition: &[u8], query: &[u8], path: Option<&Value>) -> Statement {
        // Never 0, which stands for a statement without a name of ours.
        let id = self.ids.fetch_add(1, Ordering::Relaxed) + 1;
        Statement {
            id,
            name: upstream_name(id).into(),
            definition: definition.into(),
            path: path.cloned(),
            epoch: self.epoch(),
            described: AtomicU64::new(0),
            scan: scan::scan(query),
        }
    }

    /// Puts a statement on the shelf, which was made while others could use it; gives the one that is there already.
    fn add(&self, hash: u64, made: Statement) -> Arc<Statement> {
        let mut shelf = self.table.lock();
        if let Some(found) = shelf.find(hash, &made.definition, made.path.as_ref(), made.epoch) {
            return found;
        }
        let statement = Arc::new(made);
        let bytes = statement.definition.len();
        if shelf.statements.len() >= SHARED_MAX || shelf.bytes + bytes > SHARED_MAX_BYTES {
            let epoch = self.epoch();
            shelf.statements.retain(|kept| kept.epoch == epoch && Arc::strong_count(kept) > 1);
            shelf.bytes = shelf.statements.iter().map(|kept| kept.definition.len()).sum();
        }
        if shelf.statements.len() < SHARED_MAX && shelf.bytes + bytes <= SHARED_MAX_BYTES {
            shelf.bytes += bytes;
            let Shelf { hasher, statements, .. } = &mut *shelf;
            let rehash = |kept: &Arc<Statement>| self::hash(hasher, &kept.definition, kept.path.as_ref());
            statements.insert_unique(hash, Arc::clone(&statement), rehash);
        }
        statement
    }

    /// The same settings as one pointer for all who have them.
    pub fn intern(&self, settings: Settings) -> Arc<Settings> {
        let mut known = self.settings.lock();
        if let Some(found) = known.get(&settings).and_then(Weak::upgrade) {
            return found;
        }
        // Dead ones are swept each time: a client that goes on setting leaves one behind with every step.
        known.retain(|_, weak| weak.strong_count() > 0);
        let shared = Arc::new(settings);
        known.insert(Settings::clone(&shared), Arc::downgrade(&shared));
        shared
    }

    /// What a server reports under these settings, if a client asked before.
    pub fn profile(&self, settings: &Settings) -> Option<Arc<Parameters>> {
        self.profiles.lock().get(settings).cloned()
    }

    /// Keeps what a server reports under these settings.
    pub fn keep_profile(&self, settings: Arc<Settings>, reported: Arc<Parameters>) {
        let mut profiles = self.profiles.lock();
        if profiles.len() >= PROFILES_MAX {
            profiles.clear();
        }
        profiles.insert(settings, reported);
    }

    /// Forgets what servers report, after one reported something new.
    pub fn forget_profiles(&self) {
        self.profiles.lock().clear();
    }
}

impl Shelf {
    fn find(&self, hash: u64, definition: &[u8], path: Option<&Value>, epoch: u64) -> Option<Arc<Statement>> {
        let same = |kept: &Arc<Statement>| {
            kept.epoch == epoch && *kept.definition == *definition && kept.path.as_ref() == path
        };
        self.statements.find(hash, same).cloned()
    }
}

fn hash(hasher: &DefaultHashBuilder, definition: &[u8], path: Option<&Value>) -> u64 {
    hasher.hash_one((definition, path))
}

/// The name upstream of the statement with this id.
pub fn upstream_name(id: u64) -> Vec<u8> {
    [PREFIX, format!("{id:x}").as_bytes()].concat()
}

/// What a server says of a statement's types, as one number: parameters, and per column name, type, size, modifier.
/// The tables that columns come from are left out; they may be new ones of the same shape.
///
/// FNV-1a: every client carries one of these, and a collision hides from nobody but the tenant who made it that its
/// own statement has changed.
#[derive(Debug)]
pub struct Types(u64);

impl Default for Types {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Types {
    fn mix(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// Takes a ParameterDescription, RowDescription or NoData.
    pub fn add(&mut self, message: &[u8]) {
        let Some((head, body)) = message.split_at_checked(HEAD) else { return };
        self.mix(&head[..1]);
        if head[0] != b'T' {
            return self.mix(body);
        }
        let mut rest = body.get(2..).unwrap_or_default();
        while let Some((name, column)) = cstr(rest)
            && let Some((column, more)) = column.split_at_checked(18)
        {
            self.mix(name);
            // What ends the name.
            self.mix(&[0]);
            self.mix(&column[6..16]);
            rest = more;
        }
    }

    /// The number; never 0.
    pub fn finish(&self) -> u64 {
        self.0.max(1)
    }
}

/// A client's unnamed statement.
#[derive(Clone, Debug)]
pub struct Unnamed {
    /// What it is.
    pub statement: Arc<Statement>,
    /// Whether it is kept prepared upstream under a name.
    pub named: bool,
}

impl Unnamed {
    /// What it may do.
    pub fn scan(&self) -> &Scan {
        &self.statement.scan
    }
}

/// Prepared statements that one client may hold, and their bytes; beyond, it is held to one connection and its
/// further statements live there.
const NAMES_MAX: usize = 2048;
const NAMES_MAX_BYTES: usize = 8 << 20;

/// One client's prepared statements by its own names.
#[derive(Debug, Default)]
pub struct Names {
    /// Made with the first: most clients that sleep have none.
    named: Option<Box<Named>>,
    /// Its unnamed statement.
    pub unnamed: Option<Unnamed>,
}

#[derive(Debug, Default)]
struct Named {
    map: HashMap<Box<[u8]>, Arc<Statement>>,
    bytes: usize,
}

impl Names {
    /// The statement with this name.
    pub fn find(&self, name: &[u8]) -> Option<&Arc<Statement>> {
        self.named.as_ref()?.map.get(name)
    }

    /// Whether there is room for another.
    pub fn has_room(&self, definition: &[u8]) -> bool {
        let (count, bytes) = self.named.as_ref().map_or((0, 0), |named| (named.map.len(), named.bytes));
        count < NAMES_MAX && bytes + definition.len() <= NAMES_MAX_BYTES
    }

    /// Adds one under a free name.
    pub fn insert(&mut self, name: &[u8], statement: Arc<Statement>) {
        let named = self.named.get_or_insert_default();
        named.bytes += statement.definition.len();
        named.map.insert(name.into(), statement);
    }

    /// Forgets one.
    pub fn remove(&mut self, name: &[u8]) -> Option<Arc<Statement>> {
        let named = self.named.as_mut()?;
        let statement = named.map.remove(name)?;
        named.bytes -= statement.definition.len();
        Some(statement)
    }

    /// Forgets all named ones.
    pub fn clear(&mut self) {
        self.named = None;
    }

    /// The client's own name of the statement that goes by `upstream` there.
    pub fn own_name(&self, upstream: &[u8]) -> Option<&[u8]> {
        let map = &self.named.as_ref()?.map;
        map.iter().find(|(_, statement)| *statement.name == *upstream).map(|(name, _)| &**name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_text_is_one_statement_per_search_path() {
        let shared = Shared::new(Arc::default());
        let a = shared.statement(b"select 1\0\0\0", b"select 1", None);
        assert!(Arc::ptr_eq(&a, &shared.statement(b"select 1\0\0\0", b"select 1", None)));
        let path = Value::Raw("x".into());
        assert_ne!(a.id, shared.statement(b"select 1\0\0\0", b"select 1", Some(&path)).id);
        assert_ne!(a.id, shared.statement(b"select 1\0\0\x01\0\0\0\x17", b"select 1", None).id);
    }

    #[test]
    fn after_ddl_a_text_prepared_anew_is_a_new_statement() {
        let shared = Shared::new(Arc::default());
        let before = shared.statement(b"select 1\0\0\0", b"select 1", None);
        shared.raise_epoch();
        assert_ne!(before.id, shared.statement(b"select 1\0\0\0", b"select 1", None).id);
    }

    #[test]
    fn types_tell_columns_apart_but_not_their_tables() {
        let types = |name: &[u8], table: u8, oid: u8| {
            let column = [name, &[0, 0, 0, 0, table, 0, 1, 0, 0, 0, oid, 0, 4, 255, 255, 255, 255, 0, 0]].concat();
            let mut types = Types::default();
            types.add(&[b"T\0\0\0\0\0\x01", &column[..]].concat());
            types.finish()
        };
        assert_eq!(types(b"a", 1, 23), types(b"a", 2, 23));
        assert_ne!(types(b"a", 1, 23), types(b"a", 1, 25));
        assert_ne!(types(b"a", 1, 23), types(b"b", 1, 23));
    }

    #[test]
    fn no_statement_has_the_number_of_none() {
        let shared = Shared::new(Arc::default());
        assert_ne!(shared.statement(b"select 1\0\0\0", b"select 1", None).id, 0);
    }

    #[test]
    fn an_unnamed_text_gets_a_name_when_it_comes_again() {
        let shared = Shared::new(Arc::default());
        assert!(!shared.recurring(b"select 1\0\0\0", b"select 1", None).1);
        assert!(shared.recurring(b"select 1\0\0\0", b"select 1", None).1);
    }

    #[test]
    fn the_shelf_is_bounded() {
        let shared = Shared::new(Arc::default());
        for n in 0..SHARED_MAX * 2 {
            let definition = format!("select {n}\0\0\0");
            shared.statement(definition.as_bytes(), b"", None);
        }
        let shelf = shared.table.lock();
        assert!(shelf.statements.len() <= SHARED_MAX);
        assert_eq!(shelf.bytes, shelf.statements.iter().map(|kept| kept.definition.len()).sum::<usize>());
    }

    #[test]
    fn equal_settings_are_one_pointer() {
        let shared = Shared::new(Arc::default());
        let one = || Settings::default().with("a", Value::Raw("1".into()));
        assert!(Arc::ptr_eq(&shared.intern(one()), &shared.intern(one())));
    }
}
