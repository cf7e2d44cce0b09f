//! Does what the machine says: writes the journal, calls the participants, takes the answers back. Any number of
//! processes may run one; the ledger's fence says who has a transition.
//!
//! A transition's work is a task of its own, never part of a client's or an operator's request: who asked may go.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{
    Refused,
    life::{Errand, GRACE_MAX, Purging},
    participant::{Look, Participant, Participants, ReadBack, Trouble, moves, rehomes},
    state::{SEATS, State},
    work::Work,
};
use crate::{
    catalog::{
        Catalog, Decision, Deed, Entry, Fault, Kept, LedgerFault, Over, Part, Phase, Step, date,
        ledger::{failpoint::reach, lease, this_process},
        now_ms,
    },
    tenant::{Home, Limits, OrgId, Protocol, Routes, Status, Tenant, Tier, Tiers},
};

/// Longest time for preparing, all participants together. These are shorter in tests, which wait for them.
const PREPARE_WITHIN: Duration = Duration::from_millis(if cfg!(test) { 1_500 } else { 60_000 });

/// The same where a tenant's documents are moved.
const MOVE_WITHIN: Duration = Duration::from_millis(if cfg!(test) { 1_500 } else { 1_800_000 });

/// Longest look at one participant before anything begins.
pub(super) const LOOK_WITHIN: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 20_000 });

/// How long a transition is left to its coordinator after the last sign of it.
pub(super) const LEASE: Duration = Duration::from_secs(15);

/// News kept for who listens slowly; older ones are lost to it.
const NEWS: usize = 256;

/// Random bytes of an id.
const ID_BYTES: usize = 10;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Whose tier.
    pub org: OrgId,
    /// Which one.
    pub to: Tier,
    /// Also when the tenant has more than that allows: it may then only shrink.
    pub force: bool,
    /// Who asks: `cli`, `admin`.
    pub by: &'static str,
}

/// One database's answer to "are you where the decided tier is?".
#[derive(Clone, Debug, PartialEq)]
pub struct Verified {
    /// Which database.
    pub database: Protocol,
    /// What it holds; `None`: this installation has no such database.
    pub answer: Option<Result<ReadBack, Trouble>>,
}

impl Verified {
    /// Whether nothing speaks against it.
    pub fn agrees(&self) -> bool {
        self.answer.as_ref().is_none_or(|answer| answer.as_ref().is_ok_and(|it| it.agrees))
    }
}

/// Moves tenants between tiers. Cheap to clone.
#[derive(Clone)]
pub struct Coordinator(Arc<Inner>);

struct Inner {
    catalog: Catalog,
    tiers: ArcSwap<Tiers>,
    participants: Participants,
    owner: String,
    purging: ArcSwap<Purging>,
    news: broadcast::Sender<Arc<Entry>>,
    asks: mpsc::Sender<Asked>,
    /// Taken by the one [`Coordinator::run`] of this process.
    asked: Mutex<Option<mpsc::Receiver<Asked>>>,
}

/// Requests that wait to be begun; one takes as long as the slowest database's look.
const ASKS: usize = 64;

/// What the running coordinator is asked for.
#[derive(Clone, Debug)]
pub(super) enum Ask {
    Tier(Request),
    Life(Errand),
}

/// A request for the running coordinator, and who waits for its beginning.
pub(super) type Asked = (Ask, oneshot::Sender<Result<Entry, Refused>>);

impl Coordinator {
    /// Over these databases.
    pub fn new(catalog: Catalog, tiers: Tiers, participants: Participants) -> Self {
        let (news, _) = broadcast::channel(NEWS);
        let (asks, asked) = mpsc::channel(ASKS);
        Self(Arc::new(Inner {
            catalog,
            tiers: ArcSwap::from_pointee(tiers),
            participants,
            owner: this_process(),
            purging: ArcSwap::from_pointee(Purging::default()),
            news,
            asks,
            asked: Mutex::new(Some(asked)),
        }))
    }

    /// The catalog it writes to.
    pub fn catalog(&self) -> &Catalog {
        &self.0.catalog
    }

    /// Takes new numbers for the tiers. Transitions under way keep the ones they began with.
    pub fn set_tiers(&self, tiers: Tiers) {
        self.0.tiers.store(Arc::new(tiers));
    }

    /// Every change of a transition that this process works on, from now on.
    pub fn news(&self) -> broadcast::Receiver<Arc<Entry>> {
        self.0.news.subscribe()
    }

    /// Has [`Self::run`] begin a transition and carry it to its end; gives how it begins. Whoever asks may go: the work
    /// is not theirs.
    ///
    /// # Errors
    /// Why it did not begin; [`Fault::Unavailable`] when nobody runs the coordinator.
    pub async fn submit(&self, request: Request) -> Result<Entry, Refused> {
        self.ask(Ask::Tier(request)).await
    }

    /// As [`Self::submit`], for a step of a tenant's life.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub async fn submit_errand(&self, errand: Errand) -> Result<Entry, Refused> {
        self.ask(Ask::Life(errand)).await
    }

    async fn ask(&self, request: Ask) -> Result<Entry, Refused> {
        let away = || Refused::Catalog(Fault::Unavailable("the process is starting or stopping".to_owned()));
        let (answer, begun) = oneshot::channel();
        self.0.asks.try_send((request, answer)).map_err(|_| away())?;
        begun.await.unwrap_or_else(|_| Err(away()))
    }

    pub(super) fn asked(&self) -> Option<mpsc::Receiver<Asked>> {
        self.0.asked.lock().take()
    }

    /// One database, if it is there.
    pub(super) fn participant(&self, seat: usize) -> Option<Arc<dyn Participant>> {
        self.0.participants.0[seat].clone()
    }

    /// Whether this process works on it.
    pub(super) fn is_mine(&self, entry: &Entry) -> bool {
        entry.owner == self.0.owner
    }

    /// This process.
    pub(super) fn owner(&self) -> &str {
        &self.0.owner
    }

    /// Which databases take part in a deed.
    pub(super) fn present_for(&self, deed: Deed) -> [bool; SEATS] {
        match deed.asks_databases() {
            true => self.0.participants.present(),
            false => [false; SEATS],
        }
    }

    /// How often tenants are looked for whose grace is over.
    pub(super) fn purge_every(&self) -> Duration {
        self.0.purging.load().interval
    }

    /// How long a deleted tenant's data is kept unless something else is said.
    pub fn grace(&self) -> Duration {
        self.0.purging.load().grace
    }

    /// Says how deleted tenants are purged.
    #[must_use]
    pub fn purging(self, purging: Purging) -> Self {
        self.0.purging.store(Arc::new(purging));
        self
    }

    /// Tells who listens.
    pub(super) fn tell(&self, entry: &Entry) {
        // Nobody listening is no failure.
        let _ = self.0.news.send(Arc::new(entry.clone()));
    }

    /// The numbers of a tier.
    pub(super) fn limits(&self, tier: Tier) -> Arc<Limits> {
        Arc::clone(self.0.tiers.load().limits(tier))
    }

    /// The home of a tenant that is made on `tier`: where the tier says, and on the main server where there are no Neon
    /// homes.
    pub fn home_for(&self, tier: Tier) -> Home {
        let there = self.0.participants.0[Protocol::Neon as usize].is_some();
        match self.limits(tier).postgres.home {
            Home::Neon if there => Home::Neon,
            Home::Neon | Home::Main => Home::Main,
        }
    }

    /// Looks at every database and begins a transition. Give its entry to [`Self::drive`].
    ///
    /// # Errors
    /// Why it did not begin: nothing was changed.
    pub async fn begin(&self, request: &Request) -> Result<Entry, Refused> {
        let record = self.0.catalog.get(&request.org).await.map_err(|fault| Refused::from(LedgerFault::from(fault)))?;
        let tenant = record.tenant;
        if tenant.status == Status::Deleting {
            return Err(Refused::Deleting);
        }
        if tenant.epoch == 0 {
            return Err(Refused::Unmade);
        }
        match self.0.catalog.open_transition(&request.org).await {
            Ok(open) => return Err(Refused::Busy { id: open.id }),
            Err(Fault::Unknown) => {}
            Err(fault) => return Err(Refused::Catalog(fault)),
        }
        if tenant.tier == request.to {
            return Err(Refused::Same);
        }
        let (from, to) = (self.limits(tenant.tier), self.limits(request.to));
        let homes = rehomes(&tenant, &to, self.0.participants.0[Protocol::Neon as usize].is_some());
        let looks = self.look(&tenant, &to).await?;
        let over: Vec<Over> = looks.iter().flatten().flat_map(|look| look.over.clone()).collect();
        if !over.is_empty() && !request.force {
            return Err(Refused::Over(over));
        }
        let moves = moves(&tenant, &from, &to).is_some() || homes.is_some();
        let participants = Protocol::ALL
            .into_iter()
            .zip(looks)
            .map(|(database, look)| Part {
                database: database.label().to_owned(),
                step: if look.is_some() { Step::Untouched } else { Step::Absent },
                prior: look.map_or(Value::Null, |look| look.prior),
                note: String::new(),
                calls: 0,
            })
            .collect();
        let entry = Entry {
            id: new_id(&tenant),
            deed: Deed::Tier,
            org: tenant.org.clone(),
            from: tenant.tier,
            to: request.to,
            from_epoch: tenant.epoch,
            deletion: None,
            from_generation: tenant.generation,
            force: request.force,
            phase: Phase::Preparing,
            participants,
            reason: None,
            over,
            pins: pins(homes),
            kept: homes.map(|(home, _)| self.keeping(home)),
            by: request.by.to_owned(),
            owner: self.0.owner.clone(),
            fence: 0,
            lease_until_ms: lease(LEASE),
            deadline_ms: lease(if moves { MOVE_WITHIN } else { PREPARE_WITHIN }),
            cancel: false,
            began_ms: now_ms(),
            closed_ms: None,
        };
        reach("before the intent");
        let entry = self.0.catalog.begin(entry).await?;
        reach("after the intent");
        tracing::info!(org = %entry.org, id = entry.id, from = %entry.from, to = %entry.to, "tier transition begun");
        self.tell(&entry);
        Ok(entry)
    }

    /// What the record will say of a home that is left now.
    fn keeping(&self, home: Home) -> Kept {
        Kept { home, purge_after: date::format(SystemTime::now() + self.grace().min(GRACE_MAX)) }
    }

    async fn look(&self, tenant: &Tenant, to: &Limits) -> Result<[Option<Look>; SEATS], Refused> {
        let looks = self.0.participants.0.each_ref().map(|participant| async move {
            let Some(participant) = participant else { return Ok(None) };
            let database = participant.database();
            match tokio::time::timeout(LOOK_WITHIN, participant.look(tenant, to)).await {
                Ok(Ok(look)) => Ok(Some(look)),
                Ok(Err(why)) => Err(Refused::Participant { database, why }),
                Err(_) => {
                    let why = Trouble::Failed(format!("no answer in {LOOK_WITHIN:?}"));
                    Err(Refused::Participant { database, why })
                }
            }
        });
        let mut answers = futures_util::future::join_all(looks).await.into_iter();
        let mut found: [Option<Look>; SEATS] = Default::default();
        for place in &mut found {
            *place = answers.next().transpose()?.flatten();
        }
        Ok(found)
    }

    /// Carries a transition that this process has just begun to its end.
    ///
    /// # Errors
    /// [`LedgerFault::Overtaken`]: another process has it; [`Fault::Unknown`]: the tenant is gone.
    ///
    /// # Cancel safety
    /// Dropped, it stays where it is until somebody takes it up ([`Self::take_up`]).
    pub async fn drive(&self, entry: Entry) -> Result<Entry, LedgerFault> {
        let state = State::new(self.present_for(entry.deed));
        self.work(entry, state).await
    }

    /// Takes up a transition that nobody works on, and carries it to its end.
    ///
    /// # Errors
    /// As [`Self::drive`]; [`LedgerFault::Overtaken`] while its coordinator still gives signs.
    ///
    /// # Cancel safety
    /// As [`Self::drive`].
    pub async fn take_up(&self, org: &OrgId) -> Result<Entry, LedgerFault> {
        let mut entry = self.0.catalog.claim(org, &self.0.owner, LEASE).await?;
        reach("after a claim");
        tracing::info!(org = %entry.org, id = entry.id, phase = entry.phase.word(), "tier transition taken up");
        let present = self.0.participants.present();
        let mut steps = [Step::Absent; SEATS];
        for ((step, part), present) in steps.iter_mut().zip(&mut entry.participants).zip(present) {
            match (part.step, present) {
                (known, true) => *step = known,
                (Step::Absent, false) => {}
                // It took part and is no longer configured: nobody can settle it.
                (_, false) => part.set_note("no longer configured: left as it is"),
            }
        }
        let state = State { phase: Phase::Preparing, steps, wish: None }.taken_over();
        self.work(entry, state).await
    }

    /// Says where every database stands beside the tenant's record.
    ///
    /// # Errors
    /// The catalog's.
    pub async fn verify(&self, org: &OrgId) -> Result<(Tenant, Vec<Verified>), Fault> {
        let tenant = self.0.catalog.get(org).await?.tenant;
        let limits = self.limits(tenant.tier);
        let mut answers = Vec::new();
        for database in Protocol::ALL {
            let answer = match &self.0.participants.0[database as usize] {
                None if database == tenant.home().protocol() => Some(Err(Trouble::No(
                    "the tenant's home is there, and this installation has no such database".into(),
                ))),
                None => None,
                Some(participant) => {
                    let reading = participant.read_back(&tenant, &limits);
                    let late = || Err(Trouble::Failed(format!("no answer in {LOOK_WITHIN:?}")));
                    Some(tokio::time::timeout(LOOK_WITHIN, reading).await.unwrap_or_else(|_| late()))
                }
            };
            answers.push(Verified { database, answer });
        }
        Ok((tenant, answers))
    }

    async fn work(&self, entry: Entry, state: State) -> Result<Entry, LedgerFault> {
        let mut work = Work::new(self.clone(), entry, state);
        let done = work.run().await;
        match &done {
            Ok(()) => {
                let entry = &work.entry;
                let reason = entry.reason.as_deref().unwrap_or_default();
                metrics::counter!("dynabase_tier_transitions_total", "outcome" => entry.phase.word()).increment(1);
                tracing::info!(org = %entry.org, id = entry.id, outcome = entry.phase.word(), reason, "tier transition over");
            }
            Err(fault) => tracing::warn!(org = %work.entry.org, id = work.entry.id, %fault, "tier transition left"),
        }
        done.map(|()| work.entry)
    }
}

/// What the commit writes of where the tenant's SQL databases are: the new home, also for the Neon door, which leads
/// there from now on. What does not move stays where the record has said since the tenant was made.
fn pins(homes: Option<(Home, Home)>) -> Routes {
    let there = homes.map(|(_, there)| there);
    Routes { postgres: there, sql: there, ..Routes::default() }
}

/// `<org>.<epoch after>.<random>`.
pub(super) fn new_id(tenant: &Tenant) -> String {
    let mut bytes = [0; ID_BYTES];
    // Without random bytes there is no TLS and no token either; ids would only be less unlike each other.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    let random = data_encoding::BASE32_NOPAD.encode(&bytes).to_lowercase();
    format!("{}.{}.{random}", tenant.org, tenant.epoch + 1)
}

/// A transition as operators see it.
pub fn described(entry: &Entry) -> Value {
    let parts: Vec<Value> = entry
        .participants
        .iter()
        .map(|part| json!({ "database": part.database, "state": word(part.step, entry.phase), "calls": part.calls, "note": part.note }))
        .collect();
    json!({
        "id": entry.id,
        "deed": entry.deed.word(),
        "org_id": entry.org,
        "from": entry.from,
        "to": entry.to,
        "epoch": entry.from_epoch + 1,
        "state": entry.phase.word(),
        "force": entry.force,
        "by": entry.by,
        "participants": parts,
        "reason": entry.reason,
        "over": entry.over,
        "began_ms": entry.began_ms,
        "closed_ms": entry.closed_ms,
    })
}

/// A participant's state in the words of the transition's phase.
pub fn word(step: Step, phase: Phase) -> &'static str {
    match (step, phase.decision()) {
        (Step::Absent, _) => "not there",
        (Step::Untouched, _) => "untouched",
        (Step::Refused, _) => "refused",
        (Step::Settled, Some(Decision::Abort)) => "restored",
        (Step::Settled, _) => "done",
        (_, Some(Decision::Commit)) => "finishing",
        (_, Some(Decision::Abort)) => "restoring",
        (Step::Prepared, None) => "prepared",
        (Step::Asked | Step::Doubt, None) => "preparing",
    }
}
