//! Moving a tenant's documents between shared collections and databases of its own, while it goes on writing.
//!
//! A round ([`Upstream::carry_over`]) makes the place to go to like the place they are in: what is missing or different
//! there is written, what is there alone is deleted. Rounds are repeated while writes go on, and once more while nobody
//! writes; then count and digest of both places have to be equal. Nothing is deleted in the place they are
//! in until it is no longer the tenant's ([`Upstream::clear`]).
//!
//! Documents are carried over byte for byte but for `org_id`, which a shared one has and one of the tenant's own has not.
//! Every batch is written only while no later coordinator has been here: in one transaction with that look (`fenced`).

mod clear;
mod fenced;
mod index;
mod walk;

use std::collections::{BTreeMap, HashMap};

use aws_lc_rs::digest;
use bson::doc;
use walk::{Bare, bares};

use super::{
    Error, Reply, Upstream,
    account::{collections, decode, run},
    holdings::number,
};
use crate::{
    catalog::ledger::failpoint::reach,
    tenant::{Isolation, OrgId},
    wire::mongo::bson::{self as wire, Document, kind},
};

/// Documents of one batch, and about as many bytes: well below a message's cap, and short enough for a lock.
const BATCH: i32 = 500;
const BATCH_BYTES: usize = 8 << 20;

/// Shared collections of a tenant that comes from databases of its own: more than any tier lets it have.
const ROOM_OF_MOVED: u32 = 1_000_000;

/// The field that tells whose a shared document is.
const ORG: &str = "org_id";

/// `DuplicateKey`.
const DUPLICATE_KEY: i64 = 11000;

/// What is moved.
#[derive(Clone, Debug)]
pub struct Move {
    /// Whose documents.
    pub org: OrgId,
    /// Where they are.
    pub from: Isolation,
    /// Where they are to be.
    pub to: Isolation,
    /// The coordinator's fence.
    pub fence: u64,
}

/// What a round came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Documents in the place they are in, and the exclusive or of their digests.
    pub source: (u64, [u8; 32]),
    /// Documents that were written or deleted.
    pub changed: u64,
}

/// Why documents were not moved.
#[derive(Debug)]
pub enum MoveError {
    /// A later coordinator was here.
    Overtaken,
    /// They can't be where they are to be.
    Unfit(String),
    /// The deployment's own.
    Upstream(Error),
}

impl From<Error> for MoveError {
    fn from(error: Error) -> Self {
        MoveError::Upstream(error)
    }
}

impl From<crate::wire::Error> for MoveError {
    fn from(error: crate::wire::Error) -> Self {
        MoveError::Upstream(error.into())
    }
}

/// A tenant's collections by their logical names.
type Places = BTreeMap<(String, String), String>;

/// What is known to be in the place to go to, which nobody else writes: a digest for each id. Some hundred bytes each.
#[derive(Debug, Default)]
pub struct Known(HashMap<(String, String), HashMap<Vec<u8>, [u8; 32]>>);

/// Most documents that are moved: what is known of them is kept in memory.
const DOCUMENTS_MAX: u64 = 2_000_000;

/// The digest of a bare document and where it is.
fn digest_of(name: &(String, String), bare: &[u8]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in [name.0.as_bytes(), b".", name.1.as_bytes(), b"\0", bare] {
        context.update(part);
    }
    let mut bytes = [0; 32];
    bytes.copy_from_slice(context.finish().as_ref());
    bytes
}

fn add(sum: &mut (u64, [u8; 32]), one: &[u8; 32]) {
    sum.0 += 1;
    sum.1.iter_mut().zip(one).for_each(|(sum, byte)| *sum ^= byte);
}

/// Kind and bytes of a document's `_id`.
fn id(document: Document<'_>) -> Result<Vec<u8>, MoveError> {
    let id = document.get("_id")?.ok_or(Error::Protocol("a document without an _id"))?;
    let mut bytes = vec![id.kind];
    bytes.extend_from_slice(id.value);
    Ok(bytes)
}

fn put_id(out: &mut Vec<u8>, key: &str, id: &[u8]) {
    let (kind, value) = id.split_first().unwrap_or((&kind::NULL, &[]));
    wire::put_head(out, *kind, key.as_bytes());
    out.extend_from_slice(value);
}

/// The document as it is without the tenant's mark.
fn bare(document: Document<'_>) -> Result<Vec<u8>, MoveError> {
    let mut out = Vec::with_capacity(document.bytes().len());
    let open = wire::open(&mut out);
    for element in document {
        let element = element?;
        if element.key != ORG.as_bytes() {
            wire::put(&mut out, &element);
        }
    }
    wire::close(&mut out, open);
    Ok(out)
}

impl Move {
    /// The document as it is in the place to go to.
    fn carried(&self, bare: &[u8], out: &mut Vec<u8>) {
        match self.to {
            Isolation::Database => out.extend_from_slice(bare),
            Isolation::Filter => {
                let open = wire::open(out);
                // Without its length and its end.
                out.extend_from_slice(bare.get(4..bare.len().saturating_sub(1)).unwrap_or_default());
                wire::put_str(out, ORG, self.org.as_str());
                wire::close(out, open);
            }
        }
    }

    fn put_mine(&self, isolation: Isolation, out: &mut Vec<u8>) {
        if isolation == Isolation::Filter {
            wire::put_str(out, ORG, self.org.as_str());
        }
    }
}

impl Upstream {
    /// Goes on only while no later coordinator has been here.
    async fn fence(&self, org: &OrgId, fence: u64) -> Result<(), MoveError> {
        match self.standing_fence(org).await? {
            Some(present) if present > fence => Err(MoveError::Overtaken),
            _ => Ok(()),
        }
    }

    /// Says what of a tenant can't be where it is to be. Changes nothing.
    ///
    /// # Errors
    /// [`MoveError::Unfit`], the deployment's.
    pub async fn fit(&self, it: &Move) -> Result<(), MoveError> {
        let target = self.place(&it.org, it.to);
        for ((database, collection), physical) in self.places(&it.org, it.from).await? {
            let name = format!("{database}.{collection}");
            if target.physical(&database).is_none() {
                return Err(MoveError::Unfit(format!("database {database}: its name is too long there")));
            }
            if it.to == Isolation::Database {
                continue;
            }
            let ask = doc! { "listCollections": 1, "filter": { "name": &collection }, "$db": &physical };
            let told = decode(&run(self, ask).await?)?;
            let batch = told.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch"));
            let found = batch.ok().and_then(|batch| batch.first()?.as_document().cloned()).unwrap_or_default();
            let options = found.get_document("options").cloned().unwrap_or_default();
            if let Some(option) = options.keys().next() {
                return Err(MoveError::Unfit(format!("collection {name} has {option}, which a shared one can't have")));
            }
            for index in self.indexes(&physical, &collection).await? {
                let key = index.get_document("key").cloned().unwrap_or_default();
                if index.contains_key("collation") || key.values().any(|it| it.as_str() == Some("text")) {
                    let index = index.get_str("name").unwrap_or_default();
                    return Err(MoveError::Unfit(format!("index {index} of {name} can't be in a shared collection")));
                }
            }
        }
        if it.from == Isolation::Database {
            let own = self.place(&it.org, it.from);
            for physical in self.databases().await? {
                let Some(database) = own.logical(&physical) else { continue };
                let views =
                    doc! { "listCollections": 1, "filter": { "type": { "$ne": "collection" } }, "$db": &physical };
                let told = decode(&run(self, views).await?)?;
                let batch = told.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch"));
                if let Some(view) = batch.ok().and_then(|batch| batch.first()?.as_document()?.get_str("name").ok()) {
                    return Err(MoveError::Unfit(format!("{database}.{view} is no plain collection")));
                }
            }
        }
        Ok(())
    }

    /// Notes the shared collections that a move will bring into being as the tenant's doing, whatever its room: who
    /// decided on the move has looked at it.
    ///
    /// # Errors
    /// The deployment's.
    pub async fn note_moved(&self, it: &Move) -> Result<(), MoveError> {
        if it.to == Isolation::Database {
            return Ok(());
        }
        let target = self.place(&it.org, it.to);
        let physical = |(database, collection): (String, String)| {
            let database = target.physical(&database)?;
            Some(format!("{database}.{collection}"))
        };
        let names: Vec<String> = self.places(&it.org, it.from).await?.into_keys().filter_map(physical).collect();
        let absent = self.absent(&names).await?;
        if !absent.is_empty() {
            self.note_made(&it.org, &absent, ROOM_OF_MOVED).await?;
        }
        Ok(())
    }

    /// A tenant's collections in one kind of place. Shared ones in which it has no document are among them.
    async fn places(&self, org: &OrgId, isolation: Isolation) -> Result<Places, MoveError> {
        let place = self.place(org, isolation);
        let mut found = Places::new();
        for physical in self.databases().await? {
            let Some(logical) = place.logical(&physical) else { continue };
            for collection in collections(self, &physical).await? {
                found.insert((logical.to_owned(), collection), physical.clone());
            }
        }
        Ok(found)
    }

    /// Reads what is in the place to go to, from an earlier attempt or from before.
    ///
    /// # Errors
    /// The deployment's.
    pub async fn known(&self, it: &Move) -> Result<Known, MoveError> {
        let mut known = Known::default();
        for (name, physical) in self.places(&it.org, it.to).await? {
            let mut cursor = self.walk(it, it.to, &physical, &name.1).await?;
            while let Some(batch) = cursor.next(self).await? {
                for (id, bare) in bares(&batch)? {
                    let digest = digest_of(&name, &bare);
                    known.0.entry(name.clone()).or_default().insert(id, digest);
                }
            }
        }
        Ok(known)
    }

    /// Count and digest of what is in the place to go to.
    ///
    /// # Errors
    /// The deployment's.
    pub async fn sum(&self, it: &Move) -> Result<(u64, [u8; 32]), MoveError> {
        let mut sum = (0, [0; 32]);
        for digests in self.known(it).await?.0.values() {
            digests.values().for_each(|digest| add(&mut sum, digest));
        }
        Ok(sum)
    }

    /// One round: the place to go to becomes like the place they are in, as it was read. `say` is told how many
    /// documents have been looked at.
    ///
    /// # Errors
    /// [`MoveError`]; another round goes on with what is known then.
    ///
    /// # Cancel safety
    /// Dropped, the place to go to is unlike either, and what was known of it is not.
    pub async fn carry_over(
        &self,
        it: &Move,
        known: &mut Known,
        say: &(dyn Fn(u64) + Sync),
    ) -> Result<Round, MoveError> {
        let mut round = Round::default();
        let there = self.place(&it.org, it.to);
        let mut before = std::mem::take(&mut known.0);
        for (name, source) in &self.places(&it.org, it.from).await? {
            let target = there.physical(&name.0).ok_or_else(|| MoveError::Unfit(format!("database {}", name.0)))?;
            self.carry_indexes(it, name, source, &target).await?;
            let mut old = before.remove(name).unwrap_or_default();
            let new = known.0.entry(name.clone()).or_default();
            let mut cursor = self.walk(it, it.from, source, &name.1).await?;
            while let Some(batch) = cursor.next(self).await? {
                let mut differing = Vec::new();
                for (id, bare) in bares(&batch)? {
                    let digest = digest_of(name, &bare);
                    add(&mut round.source, &digest);
                    if old.remove(&id) != Some(digest) {
                        differing.push((id.clone(), bare));
                    }
                    new.insert(id, digest);
                }
                if round.source.0 > DOCUMENTS_MAX {
                    return Err(MoveError::Unfit(format!("there are more than {DOCUMENTS_MAX}")));
                }
                round.changed += self.write(it, &target, &name.1, &differing).await?;
                say(round.source.0);
            }
            // Deleted meanwhile; one that moved within the walk was seen before.
            old.retain(|id, _| !new.contains_key(id));
            round.changed += self.delete(it, &target, &name.1, old.into_keys().collect()).await?;
        }
        for (name, old) in before {
            let target = there.physical(&name.0).ok_or_else(|| MoveError::Unfit(format!("database {}", name.0)))?;
            round.changed += self.delete(it, &target, &name.1, old.into_keys().collect()).await?;
        }
        Ok(round)
    }

    /// Writes documents into the place to go to. Says how many.
    async fn write(&self, it: &Move, database: &str, collection: &str, differing: &[Bare]) -> Result<u64, MoveError> {
        let mut left = differing;
        while !left.is_empty() {
            let mut ask = Vec::new();
            let open = wire::open(&mut ask);
            wire::put_str(&mut ask, "update", collection);
            let updates = wire::open_array(&mut ask, "updates");
            let mut at = 0;
            while let Some(((id, bare), rest)) = left.split_first()
                && (at == 0 || ask.len() + bare.len() < BATCH_BYTES)
            {
                let update = wire::open_document(&mut ask, wire::Index::new(at).as_str());
                let query = wire::open_document(&mut ask, "q");
                put_id(&mut ask, "_id", id);
                it.put_mine(it.to, &mut ask);
                wire::close(&mut ask, query);
                wire::put_head(&mut ask, kind::DOCUMENT, b"u");
                it.carried(bare, &mut ask);
                wire::put_bool(&mut ask, "upsert", true);
                wire::close(&mut ask, update);
                at += 1;
                left = rest;
            }
            wire::close(&mut ask, updates);
            wire::put_bool(&mut ask, "ordered", false);
            wire::put_str(&mut ask, "$db", database);
            wire::close(&mut ask, open);
            reach("before a batch");
            let reply = self.fenced(&it.org, it.fence, &ask).await?;
            reach("after a batch");
            written_well(&reply, collection)?;
        }
        Ok(u64::try_from(differing.len()).unwrap_or(u64::MAX))
    }

    /// Deletes documents from the place to go to. Says how many.
    async fn delete(&self, it: &Move, database: &str, collection: &str, ids: Vec<Vec<u8>>) -> Result<u64, MoveError> {
        for ids in ids.chunks(usize::try_from(BATCH).unwrap_or(1)) {
            let mut ask = Vec::new();
            let open = wire::open(&mut ask);
            wire::put_str(&mut ask, "delete", collection);
            let deletes = wire::open_array(&mut ask, "deletes");
            for (at, id) in ids.iter().enumerate() {
                let one = wire::open_document(&mut ask, wire::Index::new(at).as_str());
                let query = wire::open_document(&mut ask, "q");
                put_id(&mut ask, "_id", id);
                it.put_mine(it.to, &mut ask);
                wire::close(&mut ask, query);
                wire::put_i32(&mut ask, "limit", 1);
                wire::close(&mut ask, one);
            }
            wire::close(&mut ask, deletes);
            wire::put_bool(&mut ask, "ordered", false);
            wire::put_str(&mut ask, "$db", database);
            wire::close(&mut ask, open);
            reach("before a batch");
            let reply = self.fenced(&it.org, it.fence, &ask).await?;
            reach("after a batch");
            written_well(&reply, collection)?;
        }
        Ok(u64::try_from(ids.len()).unwrap_or(u64::MAX))
    }
}

/// Whether every write of a batch was done.
fn written_well(reply: &Reply, collection: &str) -> Result<(), MoveError> {
    let told = decode(reply)?;
    let errors = told.get_array("writeErrors").map(Vec::as_slice).unwrap_or_default();
    let Some(first) = errors.first().and_then(|it| it.as_document()) else { return Ok(()) };
    match number(first, "code").and_then(|code| i64::try_from(code).ok()) {
        Some(DUPLICATE_KEY) => Err(MoveError::Unfit(format!(
            "collection {collection}: a document's _id, or a unique field, is taken there"
        ))),
        _ => Err(MoveError::Upstream(Error::Protocol("a document could not be written"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn org() -> OrgId {
        OrgId::parse("acme").expect("an id")
    }

    #[test]
    fn a_document_comes_back_as_it_was() {
        let own =
            bson::serialize_to_vec(&doc! { "_id": 1, "a": { "org_id": "kept" }, "b": [1, 2.5, "x"] }).expect("BSON");
        let it = Move { org: org(), from: Isolation::Database, to: Isolation::Filter, fence: 1 };
        let mut shared = Vec::new();
        it.carried(&own, &mut shared);
        let tree = bson::Document::from_reader(shared.as_slice()).expect("BSON");
        assert_eq!(tree.get_str("org_id").ok(), Some("acme"));
        assert_eq!(bare(Document::new(&shared).expect("whole")).expect("bare"), own);
    }

    #[test]
    fn a_digest_tells_places_and_contents_apart() {
        let of = |database: &str, collection: &str, document: &[u8]| {
            digest_of(&(database.to_owned(), collection.to_owned()), document)
        };
        assert_eq!(of("a", "b", b"x"), of("a", "b", b"x"));
        assert!(of("a", "b", b"x") != of("a", "c", b"x") && of("a", "b", b"x") != of("a", "b", b"y"));
    }
}
