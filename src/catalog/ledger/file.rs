//! The ledger in the file catalog: `transitions/open/<ORG>.json` and `transitions/closed/<ID>.json`; the stamp in
//! `orgs/<ORG>.json`. All writers hold the folder's lock.
//!
//! A crash between two of the writes leaves one of: an entry that its tenant's document does not know (it never began:
//! it is put away as aborted), an entry one step behind the document (the document is right), or an open entry beside
//! its closed one (the closed one is right).

use std::{path::Path, time::Duration};

use serde_json::Value;
use tokio::sync::mpsc;

use super::{
    super::{
        Fault, FileCatalog, Record,
        file::{Folder, known, named, read, unavailable, write},
        source::Found,
    },
    Change, DELETION, Decision, Deed, Entry, KEPT, LedgerFault, Phase, STAMP, Stamp, failpoint, is_dead, lease, now_ms,
};
use crate::tenant::OrgId;

/// The stamp of a document; `None` when it never had a transition.
fn stamp(record: &Record) -> Result<Option<Stamp>, Fault> {
    match record.more.get(STAMP) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => serde_json::from_value(value.clone())
            .map(Some)
            .map_err(|_| Fault::Damaged("its field transition is not what was written".to_owned())),
    }
}

fn put_stamp(record: &mut Record, stamp: &Stamp) {
    // Texts and numbers always have a JSON form.
    record.more.insert(STAMP.to_owned(), serde_json::to_value(stamp).unwrap_or_default());
}

/// Writes what the commit of an entry changes besides tier, epoch and routes.
fn change(record: &mut Record, entry: &Entry) {
    let Change { status, generation, deletion, kept } = entry.change();
    record.tenant.status = status.unwrap_or(record.tenant.status);
    record.tenant.generation = generation.unwrap_or(record.tenant.generation);
    match deletion {
        None => {}
        Some(None) => drop(record.more.remove(DELETION)),
        Some(Some(deletion)) => {
            record.more.insert(DELETION.to_owned(), serde_json::to_value(&deletion).unwrap_or_default());
        }
    }
    match kept {
        None => {}
        Some(None) => drop(record.more.remove(KEPT)),
        Some(Some(kept)) => drop(record.more.insert(KEPT.to_owned(), serde_json::to_value(&kept).unwrap_or_default())),
    }
}

fn parse(bytes: &[u8]) -> Result<Entry, String> {
    let entry: Entry = serde_json::from_slice(bytes).map_err(|_| "not a transition's document".to_owned())?;
    match Entry::org_of(&entry.id) {
        Some(org) if org == entry.org => Ok(entry),
        _ => Err("its _id is not its organisation's".to_owned()),
    }
}

fn put(folder: &Path, name: &str, entry: &Entry) -> Result<(), Fault> {
    failpoint::reach("before an entry");
    let mut text = serde_json::to_vec_pretty(entry).unwrap_or_default();
    text.push(b'\n');
    parse(&text).map_err(Fault::Damaged)?;
    write(folder, name, &text).map_err(unavailable)?;
    failpoint::reach("after an entry");
    Ok(())
}

impl Folder {
    fn record(&self, org: &OrgId) -> Result<Record, Fault> {
        known(self.org(org))
    }

    fn put_record(&self, record: &Record) -> Result<(), Fault> {
        failpoint::reach("before a record");
        let text = record.to_json();
        Record::parse(&text, &record.tenant.org).map_err(Fault::Damaged)?;
        write(&self.orgs, record.tenant.org.as_str(), &text).map_err(unavailable)?;
        failpoint::reach("after a record");
        Ok(())
    }

    fn open(&self, org: &OrgId) -> Result<Entry, Fault> {
        known(read(&self.open_transitions, org.as_str(), parse))
    }

    fn closed(&self, id: &str) -> Result<Entry, Fault> {
        known(read(&self.closed_transitions, id, parse))
    }

    /// The open entry with the phase that the tenant's document gives it; `None` when it never began or is over.
    fn settled_view(&self, mut entry: Entry) -> Result<Option<Entry>, Fault> {
        let record = match self.record(&entry.org) {
            // A tenant that is gone has nothing to move any more, but the entry has to be put away.
            Err(Fault::Unknown) => return Ok(Some(entry)),
            other => other?,
        };
        match stamp(&record)? {
            Some(stamp) if stamp.id == entry.id && !stamp.phase.is_closed() => {
                entry.phase = stamp.phase;
                Ok(Some(entry))
            }
            _ => Ok(None),
        }
    }

    /// The tenant's document and its stamp, on condition that they are this coordinator's.
    fn owned(&self, entry: &Entry) -> Result<(Record, Stamp), LedgerFault> {
        let record = self.record(&entry.org)?;
        match stamp(&record)? {
            Some(stamp) if stamp.id == entry.id && stamp.fence == entry.fence => Ok((record, stamp)),
            _ => Err(LedgerFault::Overtaken),
        }
    }
}

impl FileCatalog {
    pub(super) async fn begin(&self, mut entry: Entry) -> Result<Entry, LedgerFault> {
        self.ledger(move |folder| {
            let _turn = folder.lock()?;
            let mut record = folder.record(&entry.org)?;
            let before = stamp(&record)?;
            if let Some(open) = before.as_ref().filter(|stamp| !stamp.phase.is_closed()) {
                return Err(LedgerFault::Busy { id: open.id.clone() });
            }
            if record.tenant.epoch != entry.from_epoch || record.tenant.tier != entry.from {
                return Err(LedgerFault::Outdated);
            }
            entry.phase = Phase::Preparing;
            entry.fence = before.map_or(0, |stamp| stamp.fence) + 1;
            put(&folder.open_transitions, entry.org.as_str(), &entry)?;
            let stamp = Stamp { id: entry.id.clone(), fence: entry.fence, phase: entry.phase, still: false };
            put_stamp(&mut record, &stamp);
            folder.put_record(&record)?;
            Ok(entry)
        })
        .await
    }

    pub(super) async fn claim(&self, org: &OrgId, owner: &str, length: Duration) -> Result<Entry, LedgerFault> {
        let (org, owner) = (org.clone(), owner.to_owned());
        self.ledger(move |folder| {
            let _turn = folder.lock()?;
            let mut entry = folder.open(&org)?;
            if entry.owner != owner && entry.lease_until_ms > now_ms() && !is_dead(&entry.owner) {
                return Err(LedgerFault::Overtaken);
            }
            let mut record = match folder.record(&org) {
                Ok(record) => record,
                Err(Fault::Unknown) => {
                    let (phase, reason) = entry.without_its_tenant();
                    folder.put_away(entry, phase, reason)?;
                    return Err(Fault::Unknown.into());
                }
                Err(fault) => return Err(fault.into()),
            };
            match stamp(&record)? {
                Some(mut stamp) if stamp.id == entry.id && !stamp.phase.is_closed() => {
                    stamp.fence += 1;
                    stamp.still = false;
                    put_stamp(&mut record, &stamp);
                    folder.put_record(&record)?;
                    entry.fence = stamp.fence;
                    entry.phase = stamp.phase;
                    entry.owner = owner;
                    entry.lease_until_ms = lease(length);
                    put(&folder.open_transitions, org.as_str(), &entry)?;
                    Ok(entry)
                }
                Some(stamp) if stamp.id == entry.id => {
                    folder.put_away(entry, stamp.phase, "")?;
                    Err(Fault::Unknown.into())
                }
                _ => {
                    folder.put_away(entry, Phase::Aborted, "it never began: the process ended first")?;
                    Err(Fault::Unknown.into())
                }
            }
        })
        .await
    }

    pub(super) async fn save(&self, mut entry: Entry) -> Result<bool, LedgerFault> {
        self.ledger(move |folder| {
            let _turn = folder.lock()?;
            folder.owned(&entry)?;
            entry.cancel |= folder.open(&entry.org).is_ok_and(|present| present.id == entry.id && present.cancel);
            put(&folder.open_transitions, entry.org.as_str(), &entry)?;
            Ok(entry.cancel)
        })
        .await
    }

    pub(super) async fn still(&self, entry: Entry) -> Result<(), LedgerFault> {
        self.ledger(move |folder| {
            let _turn = folder.lock()?;
            let (mut record, mut stamp) = folder.owned(&entry)?;
            if stamp.phase != Phase::Preparing {
                return Err(LedgerFault::Overtaken);
            }
            stamp.still = true;
            put_stamp(&mut record, &stamp);
            Ok(folder.put_record(&record)?)
        })
        .await
    }

    pub(super) async fn decide(&self, entry: Entry, decision: Decision) -> Result<Decision, LedgerFault> {
        self.ledger(move |folder| {
            let _turn = folder.lock()?;
            let (mut record, mut stamp) = folder.owned(&entry)?;
            if let Some(decided) = stamp.phase.decision() {
                return Ok(decided);
            }
            stamp.still = false;
            stamp.phase = match decision {
                Decision::Abort => Phase::Aborting,
                Decision::Commit => {
                    if record.tenant.epoch != entry.from_epoch || record.tenant.tier != entry.from {
                        return Err(LedgerFault::Outdated);
                    }
                    record.tenant.tier = entry.to;
                    record.tenant.epoch += 1;
                    let routes = &mut record.tenant.routes;
                    routes.postgres = entry.pins.postgres.or(routes.postgres);
                    routes.sql = entry.pins.sql.or(routes.sql);
                    routes.mongodb = entry.pins.mongodb.or(routes.mongodb);
                    change(&mut record, &entry);
                    Phase::Committed
                }
            };
            put_stamp(&mut record, &stamp);
            folder.put_record(&record)?;
            Ok(decision)
        })
        .await
    }

    pub(super) async fn close(&self, mut entry: Entry) -> Result<(), LedgerFault> {
        self.ledger(move |folder| {
            let _turn = folder.lock()?;
            let (mut record, mut stamp) = folder.owned(&entry)?;
            stamp.phase = stamp.phase.closed();
            entry.phase = stamp.phase;
            entry.closed_ms = Some(now_ms());
            put(&folder.closed_transitions, &entry.id, &entry)?;
            if entry.deed == Deed::Purge && stamp.phase == Phase::Done {
                // The last of the tenant; who comes too late for this finds the closed entry.
                failpoint::reach("before a record");
                folder.remove_locked(&folder.orgs, entry.org.as_str())?;
                failpoint::reach("after a record");
            } else {
                put_stamp(&mut record, &stamp);
                folder.put_record(&record)?;
            }
            match folder.remove_locked(&folder.open_transitions, entry.org.as_str()) {
                Ok(()) | Err(Fault::Unknown) => Ok(()),
                Err(fault) => Err(fault.into()),
            }
        })
        .await
    }

    pub(super) async fn cancel(&self, org: &OrgId) -> Result<(), LedgerFault> {
        let org = org.clone();
        self.ledger(move |folder| {
            let _turn = folder.lock()?;
            let mut entry = folder.open(&org)?;
            entry.cancel = true;
            put(&folder.open_transitions, org.as_str(), &entry)?;
            Ok(())
        })
        .await
    }

    pub(super) async fn transition(&self, id: &str) -> Result<Entry, Fault> {
        let org = Entry::org_of(id).ok_or(Fault::Unknown)?;
        let id = id.to_owned();
        self.blocking(move |folder| {
            let open = match folder.open(&org) {
                Ok(entry) if entry.id == id => folder.settled_view(entry)?,
                Ok(_) | Err(Fault::Unknown) => None,
                Err(fault) => return Err(fault),
            };
            match open {
                Some(entry) => Ok(entry),
                None => folder.closed(&id),
            }
        })
        .await
    }

    pub(super) async fn open_transition(&self, org: &OrgId) -> Result<Entry, Fault> {
        let org = org.clone();
        self.blocking(move |folder| folder.settled_view(folder.open(&org)?)?.ok_or(Fault::Unknown)).await
    }

    pub(super) fn open_transitions(&self) -> mpsc::Receiver<Result<Entry, Fault>> {
        self.stream(
            |folder| &folder.open_transitions,
            |folder, stem| {
                let org = OrgId::parse(stem).filter(|org| org.as_str() == stem)?;
                named(stem, read(&folder.open_transitions, org.as_str(), parse))
            },
        )
    }

    pub(super) fn transitions(&self, org: OrgId) -> mpsc::Receiver<Result<Entry, Fault>> {
        let of = format!("{org}.");
        let closed = self.stream(
            |folder| &folder.closed_transitions,
            move |folder, stem| {
                stem.starts_with(&of).then(|| named(stem, read(&folder.closed_transitions, stem, parse))).flatten()
            },
        );
        let open = self.clone();
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut closed = closed;
            while let Some(entry) = closed.recv().await {
                if sender.send(entry).await.is_err() {
                    return;
                }
            }
            match open.open_transition(&org).await {
                Err(Fault::Unknown) => {}
                other => drop(sender.send(other).await),
            }
        });
        receiver
    }

    async fn ledger<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Folder) -> Result<T, LedgerFault> + Send + 'static,
    ) -> Result<T, LedgerFault> {
        let folder = self.folder();
        let done = tokio::task::spawn_blocking(move || work(&folder)).await;
        done.unwrap_or_else(|_| Err(Fault::Unavailable("the process is stopping".to_owned()).into()))
    }
}

impl Folder {
    /// Takes an entry that has nothing left to do out of the open ones.
    fn put_away(&self, mut entry: Entry, phase: Phase, reason: &str) -> Result<(), Fault> {
        if matches!(read(&self.closed_transitions, &entry.id, parse), Found::Absent) {
            entry.phase = phase;
            entry.closed_ms = Some(now_ms());
            if !reason.is_empty() {
                entry.reason = Some(reason.to_owned());
            }
            put(&self.closed_transitions, &entry.id, &entry)?;
        }
        self.remove_locked(&self.open_transitions, entry.org.as_str())
    }
}
