//! The steps of a tenant's life, by the same journal and the same machine as its tiers.
//!
//! ```text
//!           prepare                        commit point                    finish
//! create    a place on every database      it is served                    –
//! suspend   –                              refused                         –
//! resume    –                              served                          –
//! rotate    next credentials beside old    next generation                 old ones no longer valid
//! delete    –                              refused, data kept for a while  –
//! restore   –                              as it was before                –
//! purge     –                              no way back                     data, keys, and the record last
//! forget    –                              no way back                     the home that its databases have left
//! ```
//!
//! Invariants:
//! - The record is there before anything of a tenant is made, and goes after everything of it is gone: nothing is ever
//!   left that nobody knows of. A tenant that is not wholly made has epoch 0 and is refused.
//! - That record says where its PostgreSQL home is, from the first word on: tiers decide it for new tenants only.
//! - What was interrupted is taken up as a tier transition is; repeating the command goes on.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Coordinator, Refused,
    coordinator::{LOOK_WITHIN, new_id},
    participant::{Holding, Order, Progress, Stage, Trouble},
};
use crate::{
    catalog::{
        Deed, Deletion, Entry, Expect, Fault, LedgerFault, Part, Phase, Record, Step, date,
        ledger::{failpoint::reach, lease},
        now_ms,
    },
    tenant::{OrgId, Protocol, Routes, Status, Tenant, Tier, unit},
    transition::coordinator::LEASE,
};

/// Longest time for making a tenant's place or its next credentials, all databases together: a project at Neon takes a
/// minute, a busy server's `CREATE DATABASE` as long. Shorter in tests, which wait for it.
const PREPARE_WITHIN: Duration = Duration::from_millis(if cfg!(test) { 3_000 } else { 600_000 });

/// `[tenants]`: how deleted ones are purged.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Purging {
    /// How long a deleted tenant's data is kept unless something else is said; 0s is no grace.
    #[serde(deserialize_with = "unit::duration")]
    pub grace: Duration,
    /// Between two looks for tenants whose grace is over, from 1s on.
    #[serde(deserialize_with = "unit::duration")]
    pub interval: Duration,
}

impl Default for Purging {
    fn default() -> Self {
        Self { grace: Duration::from_secs(7 * 24 * 3600), interval: Duration::from_secs(60) }
    }
}

/// Longest grace that can be asked for: a century, so that its end is a date.
pub(super) const GRACE_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// What is to be done with a tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Make it.
    Create(Tier),
    /// Refuse it and end its sessions; its data stays.
    Suspend,
    /// Serve it again.
    Resume,
    /// As suspend, and have its data purged after this long.
    Delete(Duration),
    /// Take a deletion back.
    Restore,
    /// Take away all of a deleted tenant's data, and its record.
    Purge,
    /// Give it the next generation of derived credentials.
    Rotate,
    /// Take away the home that its SQL databases have left.
    Forget,
}

impl Act {
    fn deed(self) -> Deed {
        match self {
            Act::Create(_) => Deed::Create,
            Act::Suspend => Deed::Suspend,
            Act::Resume => Deed::Resume,
            Act::Delete(_) => Deed::Delete,
            Act::Restore => Deed::Restore,
            Act::Purge => Deed::Purge,
            Act::Rotate => Deed::Rotate,
            Act::Forget => Deed::Forget,
        }
    }
}

/// A request for a step of a tenant's life.
#[derive(Clone, Debug)]
pub struct Errand {
    /// Whose.
    pub org: OrgId,
    /// What.
    pub act: Act,
    /// Who asks: `cli`, `admin`, `grace`.
    pub by: &'static str,
}

/// What one database holds of a tenant; `None`: this installation has no such database.
pub type Held = (Protocol, Option<Result<Vec<Holding>, Trouble>>);

impl Coordinator {
    /// Begins a step of a tenant's life. Give its entry to [`Self::drive`].
    ///
    /// # Errors
    /// Why it did not begin. Nothing was changed; of a creation a record that is not served may be there.
    pub async fn begin_errand(&self, errand: &Errand) -> Result<Entry, Refused> {
        let record = match errand.act {
            Act::Create(tier) => self.draft(&errand.org, tier).await?,
            _ => self.catalog().get(&errand.org).await.map_err(|fault| Refused::from(LedgerFault::from(fault)))?,
        };
        let tenant = &record.tenant;
        match self.catalog().open_transition(&errand.org).await {
            Ok(open) => return Err(Refused::Busy { id: open.id }),
            Err(Fault::Unknown) => {}
            Err(fault) => return Err(Refused::Catalog(fault)),
        }
        may(errand.act, tenant)?;
        let deletion = match errand.act {
            Act::Delete(grace) => {
                let until = SystemTime::now() + grace.min(GRACE_MAX);
                Some(Deletion { purge_after: date::format(until), was: tenant.status })
            }
            Act::Restore => record.deletion(),
            _ => None,
        };
        let kept = match errand.act {
            Act::Forget => Some(record.kept().ok_or(Refused::Same)?),
            _ => None,
        };
        let deed = errand.act.deed();
        let asked = self.present_for(deed);
        let participants = Protocol::ALL.into_iter().zip(asked).map(|(database, asked)| Part {
            database: database.label().to_owned(),
            step: if asked { Step::Untouched } else { Step::Absent },
            prior: Value::Null,
            note: String::new(),
            calls: 0,
        });
        let entry = Entry {
            id: new_id(tenant),
            deed,
            org: tenant.org.clone(),
            from: tenant.tier,
            to: tenant.tier,
            from_epoch: tenant.epoch,
            deletion,
            from_generation: tenant.generation,
            force: false,
            phase: Phase::Preparing,
            participants: participants.collect(),
            reason: None,
            over: Vec::new(),
            pins: Routes::default(),
            kept,
            by: errand.by.to_owned(),
            owner: self.owner().to_owned(),
            fence: 0,
            lease_until_ms: lease(LEASE),
            deadline_ms: lease(PREPARE_WITHIN),
            cancel: false,
            began_ms: now_ms(),
            closed_ms: None,
        };
        reach("before the intent");
        let entry = self.catalog().begin(entry).await?;
        reach("after the intent");
        tracing::info!(org = %entry.org, id = entry.id, deed = entry.deed.word(), "a step of a tenant's life begun");
        self.tell(&entry);
        Ok(entry)
    }

    /// The record of a tenant that is being made: known and refused.
    async fn draft(&self, org: &OrgId, tier: Tier) -> Result<Record, Refused> {
        match self.catalog().get(org).await {
            Ok(record) if record.tenant.epoch == 0 && record.tenant.tier == tier => return Ok(record),
            Ok(record) if record.tenant.epoch == 0 => return Err(Refused::OtherTier { begun: record.tenant.tier }),
            Ok(_) => return Err(Refused::Exists),
            Err(Fault::Unknown) => {}
            Err(fault) => return Err(Refused::Catalog(fault)),
        }
        let mut tenant = Tenant { epoch: 0, status: Status::Suspended, ..Tenant::new(org.clone(), tier) };
        tenant.routes.postgres = Some(self.home_for(tier));
        reach("before a draft");
        match self.catalog().put(Record::new(tenant), Expect::Absent).await {
            Ok(()) => {}
            Err(Fault::Exists) => return Err(Refused::Exists),
            Err(fault) => return Err(Refused::Catalog(fault)),
        }
        reach("after a draft");
        self.catalog().get(org).await.map_err(Refused::Catalog)
    }

    /// Repeats what making a tenant does on every database: after a new logical database, or something done by hand.
    /// Gives what each said; `None`: this installation has no such database.
    ///
    /// # Errors
    /// The catalog's.
    pub async fn provision(&self, org: &OrgId) -> Result<Vec<(Protocol, Option<Result<String, Trouble>>)>, Fault> {
        let tenant = self.catalog().get(org).await?.tenant;
        let limits = self.limits(tenant.tier);
        let mut said = Vec::new();
        for (seat, database) in Protocol::ALL.into_iter().enumerate() {
            let answer = match self.participant(seat) {
                None => None,
                Some(participant) => {
                    let order = Order {
                        tenant: tenant.clone(),
                        from: Arc::clone(&limits),
                        to_tier: tenant.tier,
                        to: Arc::clone(&limits),
                        force: false,
                        homes: None,
                        returns: false,
                        left: None,
                        prior: Value::Null,
                        fence: 0,
                        progress: Progress::default(),
                    };
                    let done = participant.live(Stage::Make, &order).await;
                    Some(done.map(|()| order.progress.take().unwrap_or_default()))
                }
            };
            said.push((database, answer));
        }
        Ok(said)
    }

    /// What every database holds of a tenant: what a purge would take away.
    ///
    /// # Errors
    /// The catalog's.
    pub async fn holdings(&self, org: &OrgId) -> Result<(Record, Vec<Held>), Fault> {
        let record = self.catalog().get(org).await?;
        let mut held = Vec::new();
        for (seat, database) in Protocol::ALL.into_iter().enumerate() {
            let answer = match self.participant(seat) {
                None => None,
                Some(participant) => {
                    let late = || Err(Trouble::Failed(format!("no answer in {LOOK_WITHIN:?}")));
                    let looking = participant.holdings(&record.tenant);
                    Some(tokio::time::timeout(LOOK_WITHIN, looking).await.unwrap_or_else(|_| late()))
                }
            };
            held.push((database, answer));
        }
        Ok((record, held))
    }

    /// Tenants, and homes that they have left, whose grace is over: what is to be done.
    pub(super) async fn overdue(&self) -> Vec<(OrgId, Act)> {
        let mut leaving = self.catalog().leaving();
        let mut overdue = Vec::new();
        let now = SystemTime::now();
        while let Some(record) = leaving.recv().await {
            let Ok(record) = record else { continue };
            // Without a date (a record of an earlier version, or one written by hand) nobody has said when.
            let is_due = |said: &str| date::parse(said).is_some_and(|due| due <= now);
            let act = match record.tenant.status {
                Status::Deleting => record.deletion().filter(|it| is_due(&it.purge_after)).map(|_| Act::Purge),
                _ => record.kept().filter(|it| is_due(&it.purge_after)).map(|_| Act::Forget),
            };
            overdue.extend(act.map(|act| (record.tenant.org, act)));
        }
        overdue
    }

    /// Takes the keys of a tenant whose data is gone.
    pub(super) async fn revoke_keys(&self, org: &OrgId) -> Result<(), Fault> {
        let mut keys = self.catalog().list_keys(Some(org));
        let mut own = Vec::new();
        while let Some(key) = keys.recv().await {
            match key {
                Ok(record) => own.push(record.key.hash),
                Err(fault @ Fault::Unavailable(_)) => return Err(fault),
                // A damaged one opens nothing.
                Err(fault) => tracing::warn!(%org, %fault, "a service key that can't be read is left"),
            }
        }
        for hash in own {
            match self.catalog().revoke_key(&hash).await {
                Ok(()) | Err(Fault::Unknown) => {}
                Err(fault) => return Err(fault),
            }
        }
        Ok(())
    }
}

/// Whether the tenant is where the step begins.
fn may(act: Act, tenant: &Tenant) -> Result<(), Refused> {
    let unmade = tenant.epoch == 0;
    match (act, tenant.status) {
        (Act::Create(_), _) => Ok(()),
        (Act::Delete(_), Status::Deleting) => Err(Refused::Same),
        // Whatever was made of it goes.
        (Act::Delete(_), _) => Ok(()),
        (Act::Restore | Act::Purge, Status::Deleting) => Ok(()),
        (Act::Restore | Act::Purge, _) => Err(Refused::NotDeleted),
        (_, Status::Deleting) => Err(Refused::Deleting),
        (Act::Suspend | Act::Resume | Act::Rotate | Act::Forget, _) if unmade => Err(Refused::Unmade),
        (Act::Suspend, Status::Suspended) | (Act::Resume, Status::Active) => Err(Refused::Same),
        (Act::Suspend | Act::Resume | Act::Rotate | Act::Forget, _) => Ok(()),
    }
}

/// What is held, for machines.
pub fn holdings_json(record: &Record, held: &[Held]) -> Value {
    let databases: Vec<Value> = held
        .iter()
        .map(|(database, answer)| match answer {
            None => json!({ "database": database.label(), "holdings": [], "why": "not there" }),
            Some(Ok(holdings)) => json!({ "database": database.label(), "holdings": holdings, "why": null }),
            Some(Err(trouble)) => json!({ "database": database.label(), "holdings": null, "why": trouble.to_string() }),
        })
        .collect();
    json!({
        "org_id": record.tenant.org,
        "status": record.tenant.status,
        "purge_after": record.deletion().map(|deletion| deletion.purge_after),
        "databases": databases,
    })
}
