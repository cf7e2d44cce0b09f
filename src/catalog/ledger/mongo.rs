//! The ledger in MongoDB: the collection `tier_transitions`, beside the stamp in `orgs`. No transaction: every step that
//! counts is one conditional update of the tenant's own document, so that it works on any server.
//!
//! A crash between two of the writes leaves what the file catalog's leaves, and is put away in the same way.

use std::time::Duration;

use bson::{Bson, Document, doc};
use futures_util::StreamExt;
use mongodb::{
    IndexModel,
    options::{IndexOptions, ReturnDocument},
};
use tokio::sync::mpsc;

use super::{
    super::{
        Fault, MongoCatalog,
        mongo::{ORGS, UPDATED_AT, within},
    },
    Change, DELETION, Decision, Deed, Entry, KEPT, LedgerFault, Phase, STAMP, Stamp, failpoint, is_dead, lease, now_ms,
};
use crate::tenant::OrgId;

/// The collection.
const TRANSITIONS: &str = "tier_transitions";

/// The name of the index that lets one transition of an organisation be open.
const ONE_OPEN: &str = "one_open";

/// Whether the tenant stands still, within the stamp.
const STILL: &str = "transition.still";

/// Entries read ahead of whoever lists them.
const AHEAD: usize = 64;

fn long(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn parse(mut document: Document) -> Result<Entry, Fault> {
    document.remove("open");
    let id = document.get_str("_id").unwrap_or_default().to_owned();
    let entry: Entry = bson::deserialize_from_document(document)
        .map_err(|_| Fault::Damaged(format!("{id}: not a transition's document")))?;
    match Entry::org_of(&entry.id) {
        Some(org) if org == entry.org => Ok(entry),
        _ => Err(Fault::Damaged(format!("{id}: its _id is not its organisation's"))),
    }
}

fn document(entry: &Entry, open: bool) -> Result<Document, Fault> {
    let mut document = bson::serialize_to_document(entry).map_err(|error| Fault::Damaged(error.to_string()))?;
    if open {
        // Absent when it is closed: the index counts only those that have it.
        document.insert("open", true);
    }
    Ok(document)
}

fn stamp_document(stamp: &Stamp) -> Document {
    doc! {"id": &stamp.id, "fence": long(stamp.fence), "phase": stamp.phase.word()}
}

/// The filter of a tenant's document that bears exactly this stamp.
fn bearing(org: &OrgId, stamp: &Stamp) -> Document {
    doc! {
        "_id": org.as_str(), "transition.id": &stamp.id, "transition.fence": long(stamp.fence),
        "transition.phase": stamp.phase.word(),
    }
}

impl MongoCatalog {
    /// Makes the index; the collection comes with it. May be repeated.
    pub(in crate::catalog) async fn init_ledger(&self) -> Result<(), Fault> {
        let options = IndexOptions::builder()
            .name(ONE_OPEN.to_owned())
            .unique(true)
            .partial_filter_expression(doc! {"open": true})
            .build();
        let one = IndexModel::builder().keys(doc! {"org": 1}).options(options).build();
        let of = IndexModel::builder().keys(doc! {"org": 1, "began_ms": 1}).build();
        within(self.documents(TRANSITIONS).create_indexes([one, of])).await.map(drop)
    }

    async fn stamp_of(&self, org: &OrgId) -> Result<Option<Stamp>, Fault> {
        let record = self.get(org).await?;
        match record.more.get(STAMP) {
            None | Some(serde_json::Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value.clone())
                .map(Some)
                .map_err(|_| Fault::Damaged("its field transition is not what was written".to_owned())),
        }
    }

    /// Changes a tenant's document if it fits `filter`; says whether it did.
    async fn restamp(&self, filter: Document, set: Document) -> Result<bool, Fault> {
        self.restamp_without(filter, set, Document::new()).await
    }

    /// The same, and takes fields away.
    async fn restamp_without(&self, filter: Document, set: Document, unset: Document) -> Result<bool, Fault> {
        failpoint::reach("before a record");
        let mut update = doc! {"$set": set, "$currentDate": {UPDATED_AT: true}};
        if !unset.is_empty() {
            update.insert("$unset", unset);
        }
        let done = within(self.documents(ORGS).update_one(filter, update)).await?;
        failpoint::reach("after a record");
        Ok(done.matched_count == 1)
    }

    async fn opened(&self, org: &OrgId) -> Result<Entry, Fault> {
        let filter = doc! {"org": org.as_str(), "open": true};
        within(self.documents(TRANSITIONS).find_one(filter)).await?.map_or(Err(Fault::Unknown), parse)
    }

    async fn put_away(&self, mut entry: Entry, phase: Phase, reason: &str) -> Result<(), Fault> {
        entry.phase = phase;
        entry.closed_ms = Some(now_ms());
        if !reason.is_empty() {
            entry.reason = Some(reason.to_owned());
        }
        failpoint::reach("before an entry");
        within(self.documents(TRANSITIONS).replace_one(doc! {"_id": &entry.id}, document(&entry, false)?)).await?;
        failpoint::reach("after an entry");
        Ok(())
    }

    pub(super) async fn begin(&self, mut entry: Entry) -> Result<Entry, LedgerFault> {
        // A second look only after something was put out of the way.
        for _ in 0..3 {
            let record = self.get(&entry.org).await?;
            let before = self.stamp_of(&entry.org).await?;
            if let Some(open) = before.as_ref().filter(|stamp| !stamp.phase.is_closed()) {
                return Err(LedgerFault::Busy { id: open.id.clone() });
            }
            if record.tenant.epoch != entry.from_epoch || record.tenant.tier != entry.from {
                return Err(LedgerFault::Outdated);
            }
            entry.phase = Phase::Preparing;
            entry.fence = before.as_ref().map_or(0, |stamp| stamp.fence) + 1;
            failpoint::reach("before an entry");
            match within(self.documents(TRANSITIONS).insert_one(document(&entry, true)?)).await {
                Ok(_) => {}
                Err(Fault::Exists) => {
                    match self.opened(&entry.org).await {
                        // It began a moment ago and its stamp is on the way, or its process ended right there.
                        Ok(other)
                            if other.lease_until_ms > now_ms()
                                && !is_dead(&other.owner)
                                && before.as_ref().is_none_or(|it| it.id != other.id) =>
                        {
                            return Err(LedgerFault::Busy { id: other.id });
                        }
                        Ok(other) => self.put_orphan_away(other, before.as_ref()).await?,
                        Err(Fault::Unknown) => {}
                        Err(fault) => return Err(fault.into()),
                    }
                    continue;
                }
                Err(fault) => return Err(fault.into()),
            }
            failpoint::reach("after an entry");
            let mut filter = doc! {
                "_id": entry.org.as_str(), "epoch": long(entry.from_epoch), "tier": entry.from.name(),
            };
            match &before {
                Some(stamp) => filter.extend(bearing(&entry.org, stamp)),
                None => drop(filter.insert(STAMP, Bson::Null)),
            }
            let stamp = Stamp { id: entry.id.clone(), fence: entry.fence, phase: entry.phase, still: false };
            if self.restamp(filter, doc! {STAMP: stamp_document(&stamp)}).await? {
                return Ok(entry);
            }
            self.put_away(entry.clone(), Phase::Aborted, "the tenant's record was changed meanwhile").await?;
            // The id has its closed entry now.
            return Err(match self.stamp_of(&entry.org).await? {
                Some(open) if !open.phase.is_closed() => LedgerFault::Busy { id: open.id },
                _ => LedgerFault::Outdated,
            });
        }
        Err(Fault::Unavailable("other transitions of this tenant come and go".into()).into())
    }

    /// Puts an open entry away that the tenant's document does not know as open.
    async fn put_orphan_away(&self, entry: Entry, stamp: Option<&Stamp>) -> Result<(), Fault> {
        match stamp {
            Some(stamp) if stamp.id == entry.id => self.put_away(entry, stamp.phase, "").await,
            _ => self.put_away(entry, Phase::Aborted, "it never began: the process ended first").await,
        }
    }

    pub(super) async fn claim(&self, org: &OrgId, owner: &str, length: Duration) -> Result<Entry, LedgerFault> {
        let mut entry = self.opened(org).await?;
        if entry.owner != owner && entry.lease_until_ms > now_ms() && !is_dead(&entry.owner) {
            return Err(LedgerFault::Overtaken);
        }
        let stamp = match self.stamp_of(org).await {
            Err(Fault::Unknown) => {
                let (phase, reason) = entry.without_its_tenant();
                self.put_away(entry, phase, reason).await?;
                return Err(Fault::Unknown.into());
            }
            other => other?,
        };
        let mut stamp = match stamp {
            Some(stamp) if stamp.id == entry.id && !stamp.phase.is_closed() => stamp,
            stamp => {
                self.put_orphan_away(entry, stamp.as_ref()).await?;
                return Err(Fault::Unknown.into());
            }
        };
        let filter = bearing(org, &stamp);
        stamp.fence += 1;
        let taken = doc! {"transition.fence": long(stamp.fence), STILL: false};
        if !self.restamp(filter, taken).await? {
            return Err(LedgerFault::Overtaken);
        }
        entry.fence = stamp.fence;
        entry.phase = stamp.phase;
        entry.owner = owner.to_owned();
        entry.lease_until_ms = lease(length);
        entry.cancel = self.keep(&entry).await?;
        Ok(entry)
    }

    /// Writes an open entry unless a later coordinator has; gives whether it was called off.
    async fn keep(&self, entry: &Entry) -> Result<bool, LedgerFault> {
        let mut set = document(entry, true)?;
        set.remove("_id");
        set.remove("cancel");
        let filter = doc! {"_id": &entry.id, "open": true, "fence": {"$lte": long(entry.fence)}};
        failpoint::reach("before an entry");
        let entries = self.documents(TRANSITIONS);
        let after = entries.find_one_and_update(filter, doc! {"$set": set}).return_document(ReturnDocument::After);
        let after = within(after).await?;
        failpoint::reach("after an entry");
        after.map_or(Err(LedgerFault::Overtaken), |after| Ok(after.get_bool("cancel").unwrap_or(false)))
    }

    pub(super) async fn save(&self, entry: Entry) -> Result<bool, LedgerFault> {
        match self.stamp_of(&entry.org).await? {
            Some(stamp) if stamp.id == entry.id && stamp.fence == entry.fence => self.keep(&entry).await,
            _ => Err(LedgerFault::Overtaken),
        }
    }

    pub(super) async fn still(&self, entry: &Entry) -> Result<(), LedgerFault> {
        let open = Stamp { id: entry.id.clone(), fence: entry.fence, phase: Phase::Preparing, still: false };
        match self.restamp(bearing(&entry.org, &open), doc! {STILL: true}).await? {
            true => Ok(()),
            false => Err(LedgerFault::Overtaken),
        }
    }

    pub(super) async fn decide(&self, entry: Entry, decision: Decision) -> Result<Decision, LedgerFault> {
        let open = Stamp { id: entry.id.clone(), fence: entry.fence, phase: Phase::Preparing, still: false };
        let mut filter = bearing(&entry.org, &open);
        let mut unset = Document::new();
        let set = match decision {
            Decision::Abort => doc! {"transition.phase": Phase::Aborting.word(), STILL: false},
            Decision::Commit => {
                filter.insert("epoch", long(entry.from_epoch));
                filter.insert("tier", entry.from.name());
                let mut set = doc! {
                    "transition.phase": Phase::Committed.word(), STILL: false, "tier": entry.to.name(),
                    "epoch": long(entry.from_epoch + 1),
                };
                let pins = bson::serialize_to_document(&entry.pins).map_err(|it| Fault::Damaged(it.to_string()))?;
                set.extend(pins.into_iter().map(|(name, value)| (format!("routes.{name}"), value)));
                let damaged = |error: bson::error::Error| Fault::Damaged(error.to_string());
                let Change { status, generation, deletion, kept } = entry.change();
                if let Some(status) = status {
                    set.insert("status", bson::serialize_to_bson(&status).map_err(damaged)?);
                }
                if let Some(generation) = generation {
                    set.insert("generation", long(generation.into()));
                }
                match deletion {
                    None => {}
                    Some(None) => drop(unset.insert(DELETION, "")),
                    Some(deletion) => drop(set.insert(DELETION, bson::serialize_to_bson(&deletion).map_err(damaged)?)),
                }
                match kept {
                    None => {}
                    Some(None) => drop(unset.insert(KEPT, "")),
                    Some(kept) => drop(set.insert(KEPT, bson::serialize_to_bson(&kept).map_err(damaged)?)),
                }
                set
            }
        };
        if self.restamp_without(filter, set, unset).await? {
            return Ok(decision);
        }
        match self.stamp_of(&entry.org).await? {
            Some(stamp) if stamp.id == entry.id && stamp.fence == entry.fence => match stamp.phase.decision() {
                Some(decided) => Ok(decided),
                None => Err(LedgerFault::Outdated),
            },
            _ => Err(LedgerFault::Overtaken),
        }
    }

    pub(super) async fn close(&self, entry: Entry) -> Result<(), LedgerFault> {
        let stamp = match self.stamp_of(&entry.org).await? {
            Some(stamp) if stamp.id == entry.id && stamp.fence == entry.fence => stamp,
            _ => return Err(LedgerFault::Overtaken),
        };
        let closed = stamp.phase.closed();
        let filter = bearing(&entry.org, &stamp);
        let closes = match (entry.deed, closed) {
            // The last of the tenant; who comes too late for this sees that the tenant is gone.
            (Deed::Purge, Phase::Done) => {
                failpoint::reach("before a record");
                let gone = within(self.documents(ORGS).delete_one(filter)).await?.deleted_count == 1;
                failpoint::reach("after a record");
                gone
            }
            _ => self.restamp(filter, doc! {"transition.phase": closed.word()}).await?,
        };
        if !closes {
            return Err(LedgerFault::Overtaken);
        }
        Ok(self.put_away(entry, closed, "").await?)
    }

    pub(super) async fn cancel(&self, org: &OrgId) -> Result<(), LedgerFault> {
        let filter = doc! {"org": org.as_str(), "open": true};
        let done = within(self.documents(TRANSITIONS).update_one(filter, doc! {"$set": {"cancel": true}})).await?;
        if done.matched_count == 1 { Ok(()) } else { Err(Fault::Unknown.into()) }
    }

    /// An open entry with the phase that the tenant's document gives it; a closed one as it is.
    async fn seen(&self, mut entry: Entry, open: bool) -> Result<Entry, Fault> {
        if open
            && let Some(stamp) = self.stamp_of(&entry.org).await?
            && stamp.id == entry.id
        {
            entry.phase = stamp.phase;
        }
        Ok(entry)
    }

    pub(super) async fn transition(&self, id: &str) -> Result<Entry, Fault> {
        let found = within(self.documents(TRANSITIONS).find_one(doc! {"_id": id})).await?.ok_or(Fault::Unknown)?;
        let open = found.get_bool("open").unwrap_or(false);
        self.seen(parse(found)?, open).await
    }

    pub(super) async fn open_transition(&self, org: &OrgId) -> Result<Entry, Fault> {
        let entry = self.opened(org).await?;
        match self.stamp_of(org).await? {
            Some(stamp) if stamp.id == entry.id && !stamp.phase.is_closed() => {
                Ok(Entry { phase: stamp.phase, ..entry })
            }
            _ => Err(Fault::Unknown),
        }
    }

    pub(super) fn open_transitions(&self) -> mpsc::Receiver<Result<Entry, Fault>> {
        self.entries(doc! {"open": true})
    }

    pub(super) fn transitions(&self, org: OrgId) -> mpsc::Receiver<Result<Entry, Fault>> {
        self.entries(doc! {"org": org.as_str()})
    }

    fn entries(&self, filter: Document) -> mpsc::Receiver<Result<Entry, Fault>> {
        let (sender, receiver) = mpsc::channel(AHEAD);
        let catalog = self.clone();
        // It ends with its receiver, or with the cursor.
        tokio::spawn(async move {
            let mut cursor = match within(catalog.documents(TRANSITIONS).find(filter)).await {
                Ok(cursor) => cursor,
                Err(fault) => return drop(sender.send(Err(fault)).await),
            };
            while let Some(next) = cursor.next().await {
                let item = match next {
                    Ok(found) => {
                        let open = found.get_bool("open").unwrap_or(false);
                        match parse(found) {
                            Ok(entry) => catalog.seen(entry, open).await,
                            Err(fault) => Err(fault),
                        }
                    }
                    Err(_) => Err(Fault::Unavailable("MongoDB broke off".into())),
                };
                let last = matches!(item, Err(Fault::Unavailable(_)));
                if sender.send(item).await.is_err() || last {
                    return;
                }
            }
        });
        receiver
    }
}
