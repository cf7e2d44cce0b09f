//! One transition being worked on: events in, what the machine says out.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};

use super::{
    Coordinator,
    coordinator::LEASE,
    participant::{HOME_PAUSE_MAX, Order, Progress, Reply, Stage, Trouble},
    state::{Action, Event, SEATS, State},
};
use crate::{
    catalog::{
        Decision, Deed, Entry, Fault, LedgerFault, Phase, Step,
        ledger::{failpoint::reach, lease},
        now_ms,
    },
    tenant::{Home, Limits, Protocol, Tenant},
};

/// Longest wait for one call of a participant; Neon's operations take tens of seconds.
const CALL_WITHIN: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 45_000 });

/// The same where it makes or takes away a tenant's place: `CREATE DATABASE` waits for a checkpoint, and a purge goes on
/// where it stopped.
const LIFE_CALL_WITHIN: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 120_000 });

/// The same where documents are moved: most of it is copying, and a call that is repeated begins it anew.
const MOVE_CALL_WITHIN: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 600_000 });

/// Longest wait for what is kept up for a moment only.
const SEAL_WITHIN: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 10_000 });

/// How often a sign of life is given; also how soon it is seen that a transition was called off.
const RENEW_EVERY: Duration = Duration::from_millis(if cfg!(test) { 100 } else { 2_000 });

/// The pause after a failed call, doubled with every further one.
const PAUSE_MIN: Duration = Duration::from_millis(if cfg!(test) { 5 } else { 100 });
const PAUSE_MAX: Duration = Duration::from_millis(if cfg!(test) { 100 } else { 10_000 });

/// What a call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Prepare,
    Finish,
    Restore,
}

/// What a call is for in a step of a tenant's life; `None`: nothing is to be done, or it is none.
fn stage(deed: Deed, call: Call) -> Option<Stage> {
    match (deed, call) {
        (Deed::Create, Call::Prepare) => Some(Stage::Make),
        (Deed::Rotate, Call::Prepare) => Some(Stage::TakeNext),
        (Deed::Rotate, Call::Finish) => Some(Stage::DropPrevious),
        (Deed::Rotate, Call::Restore) => Some(Stage::DropNext),
        (Deed::Purge, Call::Finish) => Some(Stage::Purge),
        (Deed::Forget, Call::Finish) => Some(Stage::Forget),
        (Deed::Create | Deed::Purge | Deed::Forget, _) => None,
        (Deed::Tier | Deed::Suspend | Deed::Resume | Deed::Delete | Deed::Restore, _) => None,
    }
}

/// What came back: of a call, or of the pause after one.
enum Came {
    Answer(usize, Call, Result<(), Trouble>),
    Pause(usize),
}

/// Who moves between which limits.
struct Terms {
    tenant: Tenant,
    from: Arc<Limits>,
    to: Arc<Limits>,
    /// The home that the tenant's SQL databases have left before this.
    left: Option<Home>,
}

/// One transition being worked on.
pub(super) struct Work {
    coordinator: Coordinator,
    pub(super) entry: Entry,
    state: State,
    calls: JoinSet<Came>,
    events: VecDeque<Event>,
    failures: [u32; SEATS],
    writes_failed: u32,
    /// When preparing is given up; `None` once it was.
    deadline: Option<Instant>,
    terms: Option<Terms>,
    progress: [Progress; SEATS],
    /// Since when the tenant stands still.
    still: Option<Instant>,
    /// What was said of the pause: the last word about the Postgres databases, if they have moved.
    paused: Option<String>,
}

impl Work {
    /// Goes on from `state`.
    pub(super) fn new(coordinator: Coordinator, entry: Entry, state: State) -> Self {
        let begun = Event::Begun(entry.phase.decision());
        let left = Duration::from_millis(entry.deadline_ms.saturating_sub(now_ms()));
        Self {
            coordinator,
            entry,
            state,
            calls: JoinSet::new(),
            events: VecDeque::from([begun]),
            failures: [0; SEATS],
            writes_failed: 0,
            deadline: Some(Instant::now() + left),
            terms: None,
            progress: Default::default(),
            still: None,
            paused: None,
        }
    }

    /// To its end.
    ///
    /// # Errors
    /// As [`Coordinator::drive`].
    pub(super) async fn run(&mut self) -> Result<(), LedgerFault> {
        let record = self.coordinator.catalog().get(&self.entry.org).await?;
        let left = record.kept().map(|kept| kept.home);
        // As it was when the transition began; what else changes of it meanwhile is nobody's business here.
        let tenant = Tenant {
            tier: self.entry.from,
            epoch: self.entry.from_epoch,
            generation: match self.entry.deed {
                Deed::Rotate => self.entry.from_generation,
                _ => record.tenant.generation,
            },
            ..record.tenant
        };
        let (from, to) = (self.coordinator.limits(self.entry.from), self.coordinator.limits(self.entry.to));
        self.terms = Some(Terms { tenant, from, to, left });
        let mut renew = tokio::time::interval_at(Instant::now() + RENEW_EVERY, RENEW_EVERY);
        renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
        if self.entry.cancel {
            self.give_up("called off");
        }
        loop {
            while let Some(event) = self.events.pop_front() {
                if self.take(event).await? {
                    return Ok(());
                }
            }
            let deadline = self.deadline.filter(|_| self.state.phase == Phase::Preparing);
            tokio::select! {
                Some(came) = self.calls.join_next() => match came {
                    Ok(came) => self.came(came)?,
                    // Cut off when the decision fell.
                    Err(error) if error.is_cancelled() => {}
                    Err(error) => {
                        tracing::error!(id = self.entry.id, %error, "a participant's call panicked");
                        return Err(Fault::Unavailable("a participant's call panicked".into()).into());
                    }
                },
                () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    self.deadline = None;
                    self.give_up("not every database had answered in time");
                }
                _ = renew.tick() => {
                    self.note_progress();
                    if self.save().await? && self.deadline.is_some() {
                        self.deadline = None;
                        self.give_up("called off");
                    }
                }
            }
        }
    }

    fn give_up(&mut self, why: &str) {
        if self.state.phase == Phase::Preparing && self.state.wish.is_none() {
            let waiting: Vec<&str> = Protocol::ALL
                .into_iter()
                .filter(|it| matches!(self.state.steps[*it as usize], Step::Untouched | Step::Asked | Step::Doubt))
                .map(Protocol::label)
                .collect();
            self.entry.reason.get_or_insert_with(|| match waiting.is_empty() {
                true => why.to_owned(),
                false => format!("{why}; not ready: {}", waiting.join(", ")),
            });
        }
        self.events.push_back(Event::GivenUp);
    }

    /// Takes one event and does what follows. Says whether the transition is over.
    async fn take(&mut self, event: Event) -> Result<bool, LedgerFault> {
        let before = self.state;
        let (state, actions) = self.state.on(event);
        self.state = state;
        self.entry.phase = state.phase;
        self.entry.participants.iter_mut().zip(state.steps).for_each(|(part, step)| {
            // One that is no longer configured keeps its last word.
            if step != Step::Absent || part.note.is_empty() {
                part.step = step;
            }
        });
        if event == Event::Closed {
            self.coordinator.tell(&self.entry);
            return Ok(true);
        }
        if before != state {
            self.coordinator.tell(&self.entry);
        }
        if before.phase != state.phase {
            // Calls and pauses of the time before the decision: whatever they do yet is older than what follows.
            self.calls.abort_all();
            self.failures = [0; SEATS];
            tracing::info!(org = %self.entry.org, id = self.entry.id, phase = state.phase.word(), "tier transition");
        }
        // Only what is settled need not be done again: the rest of the journal is for people.
        if before.phase != state.phase || matches!(event, Event::Settled(_)) {
            self.save().await?;
        }
        for action in actions {
            match action {
                Action::Prepare(seat) => self.call(seat, Call::Prepare),
                Action::Finish(seat) => self.call(seat, Call::Finish),
                Action::Restore(seat) => self.call(seat, Call::Restore),
                Action::Pause(seat) => {
                    let pause = pause(self.failures[seat]);
                    self.calls.spawn(async move {
                        tokio::time::sleep(pause).await;
                        Came::Pause(seat)
                    });
                }
                Action::Decide(decision) => self.decide(decision).await?,
                Action::Close => self.close().await?,
            }
        }
        Ok(false)
    }

    fn call(&mut self, seat: usize, call: Call) {
        let (Some(participant), Some(terms)) = (self.coordinator.participant(seat), &self.terms) else { return };
        let order = self.order(seat, terms);
        self.entry.participants[seat].calls += 1;
        let deed = self.entry.deed;
        let within = match deed {
            Deed::Tier if order.moves().is_some() && seat == Protocol::Mongodb as usize => MOVE_CALL_WITHIN,
            Deed::Tier if order.homes.is_some() && seat == Protocol::Postgres as usize => MOVE_CALL_WITHIN,
            Deed::Tier => CALL_WITHIN,
            _ => LIFE_CALL_WITHIN,
        };
        self.calls.spawn(async move {
            reach("before a call");
            let asked: Reply<'_, ()> = match stage(deed, call) {
                Some(stage) => participant.live(stage, &order),
                None => match (deed, call) {
                    (Deed::Tier, Call::Prepare) => participant.prepare(&order),
                    (Deed::Tier, Call::Finish) => participant.finish(&order),
                    (Deed::Tier, Call::Restore) => participant.restore(&order),
                    _ => Box::pin(std::future::ready(Ok(()))),
                },
            };
            let late = || Err(Trouble::Unknown(format!("no answer in {within:?}")));
            let answer = tokio::time::timeout(within, asked).await.unwrap_or_else(|_| late());
            reach("after a call");
            Came::Answer(seat, call, answer)
        });
    }

    /// Keeps what the participants say of how far they are, and tells it.
    fn note_progress(&mut self) {
        let mut said = false;
        for (part, progress) in self.entry.participants.iter_mut().zip(&self.progress) {
            if let Some(word) = progress.take() {
                part.set_note(&word);
                said = true;
            }
        }
        if said {
            self.coordinator.tell(&self.entry);
        }
    }

    fn came(&mut self, came: Came) -> Result<(), LedgerFault> {
        let (seat, call, answer) = match came {
            Came::Pause(seat) => {
                self.events.push_back(Event::Retry(seat));
                return Ok(());
            }
            Came::Answer(seat, call, answer) => (seat, call, answer),
        };
        let part = &mut self.entry.participants[seat];
        let event = match answer {
            Ok(()) => {
                self.failures[seat] = 0;
                part.note.clear();
                if let Some(word) = self.progress[seat].take() {
                    part.set_note(&word);
                } else if let Some(word) = self.paused.as_ref().filter(|_| seat == Protocol::Postgres as usize) {
                    part.set_note(word);
                }
                if call == Call::Prepare { Event::Prepared(seat) } else { Event::Settled(seat) }
            }
            Err(Trouble::Overtaken) => return Err(LedgerFault::Overtaken),
            Err(trouble) => {
                self.failures[seat] += 1;
                part.set_note(&trouble.to_string());
                tracing::warn!(org = %self.entry.org, id = self.entry.id, database = part.database, ?call, %trouble, "a participant failed");
                match (trouble, call) {
                    (Trouble::No(why), Call::Prepare) => {
                        let reason = format!("{} said no: {why}", part.database);
                        self.entry.reason.get_or_insert(reason);
                        Event::Refused(seat)
                    }
                    (Trouble::Failed(_), _) => Event::Failed(seat),
                    // After the decision there is no "no" any more: it is tried until it works.
                    _ => Event::Unknown(seat),
                }
            }
        };
        self.events.push_back(event);
        Ok(())
    }

    fn order(&self, seat: usize, terms: &Terms) -> Order {
        let Terms { tenant, from, to, left } = terms;
        let homes = self.homes();
        Order {
            homes,
            returns: homes.is_some_and(|(_, to)| *left == Some(to)),
            left: self.entry.kept.as_ref().map(|kept| kept.home),
            tenant: tenant.clone(),
            from: Arc::clone(from),
            to_tier: self.entry.to,
            to: Arc::clone(to),
            force: self.entry.force,
            prior: self.entry.participants[seat].prior.clone(),
            fence: self.entry.fence,
            progress: self.progress[seat].clone(),
        }
    }

    /// Between which homes the tenant's SQL databases move. Not from the record, which may be that of after the commit.
    fn homes(&self) -> Option<(Home, Home)> {
        let kept = self.entry.kept.as_ref().filter(|_| self.entry.deed == Deed::Tier)?;
        Some((kept.home, self.entry.pins.postgres?))
    }

    /// Has every database do what can be kept up for a moment only. Says why it can't be committed, if it can't.
    async fn seal(&mut self) -> Result<Option<String>, LedgerFault> {
        if self.entry.deed != Deed::Tier {
            return Ok(None);
        }
        let moves = self.homes().is_some();
        if moves {
            reach("before a standstill");
            if let Err(fault) = self.coordinator.catalog().still(&self.entry).await {
                return match fault {
                    LedgerFault::Catalog(Fault::Unavailable(what)) => Ok(Some(what)),
                    fault => Err(fault),
                };
            }
            self.still = Some(Instant::now());
            reach("after a standstill");
        }
        for (seat, database) in Protocol::ALL.into_iter().enumerate() {
            let (Some(participant), Some(terms)) = (self.coordinator.participant(seat), &self.terms) else { continue };
            if self.state.steps[seat] == Step::Absent {
                continue;
            }
            let within = if moves && seat == Protocol::Postgres as usize { HOME_PAUSE_MAX } else { SEAL_WITHIN };
            let order = self.order(seat, terms);
            let late = || Err(Trouble::Unknown(format!("no answer in {within:?}")));
            let sealed = tokio::time::timeout(within, participant.seal(&order));
            let mut sealed = std::pin::pin!(sealed);
            let answer = loop {
                tokio::select! {
                    answer = sealed.as_mut() => break answer.unwrap_or_else(|_| late()),
                    // The lease is shorter than a long pause.
                    () = tokio::time::sleep(RENEW_EVERY) => {
                        self.note_progress();
                        if self.save().await? {
                            break Err(Trouble::No("called off".into()));
                        }
                    }
                }
            };
            match answer {
                Ok(()) => {}
                Err(Trouble::Overtaken) => return Err(LedgerFault::Overtaken),
                Err(trouble) => return Ok(Some(format!("{}: {trouble}", database.label()))),
            }
        }
        Ok(None)
    }

    /// Tells how long the tenant stood still, once it goes on.
    fn went_on(&mut self, decision: Decision) {
        let Some(since) = self.still.take() else { return };
        let (pause, outcome) = (since.elapsed(), if decision == Decision::Commit { "moved" } else { "stayed" });
        metrics::histogram!("dynabase_home_move_pause_seconds", "outcome" => outcome).record(pause.as_secs_f64());
        let milliseconds = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        tracing::info!(org = %self.entry.org, id = self.entry.id, milliseconds, outcome, "a tenant stood still");
        let part = &mut self.entry.participants[Protocol::Postgres as usize];
        let before = if part.note.is_empty() { String::new() } else { format!("{}; ", part.note) };
        part.set_note(&format!("{before}transactions waited for {milliseconds} ms"));
        self.paused = Some(part.note.clone());
    }

    async fn decide(&mut self, decision: Decision) -> Result<(), LedgerFault> {
        // The journal first, so that a reason is not lost with the process.
        self.save().await?;
        if decision == Decision::Commit
            && let Some(why) = self.seal().await?
        {
            self.entry.reason.get_or_insert(why);
            // No commit is asked for: an abort is.
            self.events.push_back(Event::Outdated);
            return Ok(());
        }
        self.note_progress();
        reach("before the decision");
        let decided = self.coordinator.catalog().decide(&self.entry, decision).await;
        reach("after the decision");
        let event = match decided {
            Ok(decided) => {
                self.went_on(decided);
                Event::Decided(decided)
            }
            Err(LedgerFault::Outdated) => {
                self.entry.reason.get_or_insert_with(|| "the tenant's record was changed meanwhile".to_owned());
                Event::Outdated
            }
            Err(fault) => {
                self.write_failed(fault).await?;
                Event::Undecided
            }
        };
        self.events.push_back(event);
        Ok(())
    }

    async fn close(&mut self) -> Result<(), LedgerFault> {
        if self.entry.deed == Deed::Purge
            && self.entry.phase == Phase::Committed
            && let Err(fault) = self.coordinator.revoke_keys(&self.entry.org).await
        {
            self.write_failed(fault.into()).await?;
            self.events.push_back(Event::Unclosed);
            return Ok(());
        }
        reach("before the end");
        let closed = self.coordinator.catalog().close(self.entry.clone()).await;
        reach("after the end");
        let event = match closed {
            Ok(()) => Event::Closed,
            Err(fault) => {
                self.write_failed(fault).await?;
                Event::Unclosed
            }
        };
        self.events.push_back(event);
        Ok(())
    }

    /// Keeps the journal and the lease. Says whether somebody called the transition off.
    async fn save(&mut self) -> Result<bool, LedgerFault> {
        self.entry.lease_until_ms = lease(LEASE);
        match self.coordinator.catalog().save(self.entry.clone()).await {
            Ok(cancel) => {
                self.entry.cancel = cancel;
                Ok(cancel)
            }
            // The journal may be behind; the record decides.
            Err(LedgerFault::Catalog(Fault::Unavailable(what))) => {
                tracing::warn!(id = self.entry.id, what, "the journal could not be written");
                Ok(self.entry.cancel)
            }
            Err(fault) => Err(fault),
        }
    }

    /// Waits before a write is tried again; gives up only what can't succeed.
    async fn write_failed(&mut self, fault: LedgerFault) -> Result<(), LedgerFault> {
        match fault {
            LedgerFault::Catalog(Fault::Unavailable(what)) => {
                tracing::warn!(id = self.entry.id, what, "the catalog could not be written");
                let pause = pause(self.writes_failed);
                self.writes_failed += 1;
                tokio::time::sleep(pause).await;
                Ok(())
            }
            fault => Err(fault),
        }
    }
}

fn pause(failures: u32) -> Duration {
    PAUSE_MIN.saturating_mul(1 << failures.min(10)).min(PAUSE_MAX)
}
