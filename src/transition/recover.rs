//! What a crash left: transitions that nobody works on are taken up, before the listeners open and ever after. Also where
//! a stuck one is seen.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use tokio::task::JoinSet;

use super::{Coordinator, Refused, coordinator::Ask, life::Errand};
use crate::{
    catalog::{Entry, Fault, LedgerFault, now_ms},
    tenant::OrgId,
};

/// Longest time that a start waits for what a crash left; the rest goes on while serving.
const RECOVER_WITHIN: Duration = Duration::from_secs(10);

/// How often open transitions are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// A transition that is open for longer than this is stuck, for metrics and alarms.
pub const STUCK_AFTER: Duration = Duration::from_secs(120);

/// Transitions of others remembered, so that each of their changes is told once.
const SEEN_MAX: usize = 10_000;

impl Coordinator {
    /// Takes up what a crash left and carries it to its end, as far as that is possible in ten seconds: a database that
    /// is away must not keep the others' tenants waiting. [`Self::run`] goes on with the rest.
    pub async fn recover(&self) {
        let mut work = JoinSet::new();
        for entry in self.open().await {
            let coordinator = self.clone();
            work.spawn(async move { coordinator.take_up(&entry.org).await });
        }
        let all = async { while work.join_next().await.is_some() {} };
        if tokio::time::timeout(RECOVER_WITHIN, all).await.is_err() {
            tracing::warn!("tier transitions of an earlier process are not over yet: going on while serving");
        }
    }

    /// Looks after open transitions until dropped: takes up those that nobody works on, tells what others did, counts.
    pub async fn run(&self) {
        let Some(mut asked) = self.asked() else { return };
        let mut begun: JoinSet<()> = JoinSet::new();
        let mut work: JoinSet<(OrgId, Result<Entry, LedgerFault>)> = JoinSet::new();
        let mut mine: HashSet<OrgId> = HashSet::new();
        let mut seen: HashMap<String, Entry> = HashMap::new();
        let mut purging: JoinSet<()> = JoinSet::new();
        let mut purge = tokio::time::interval(self.purge_every());
        purge.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut ticker = tokio::time::interval(LOOK_EVERY);
        ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticker.tick() => {}
                Some(done) = work.join_next() => {
                    if let Ok((org, _)) = done {
                        mine.remove(&org);
                    }
                    continue;
                }
                Some(_) = begun.join_next() => continue,
                _ = purge.tick() => {
                    let coordinator = self.clone();
                    // One at a time: a purge is not urgent, and the databases have other things to do.
                    if purging.is_empty() {
                        purging.spawn(async move { coordinator.purge_overdue().await });
                    }
                    continue;
                }
                Some(_) = purging.join_next() => continue,
                Some((request, answer)) = asked.recv() => {
                    let coordinator = self.clone();
                    begun.spawn(async move {
                        let entry = match &request {
                            Ask::Tier(request) => coordinator.begin(request).await,
                            Ask::Life(errand) => coordinator.begin_errand(errand).await,
                        };
                        // Whoever asked may be gone: what has begun goes on.
                        let _ = answer.send(entry.clone());
                        if let Ok(entry) = entry {
                            // What it could not do is logged, and taken up again above.
                            let _ = coordinator.drive(entry).await;
                        }
                    });
                    continue;
                }
            }
            let open = self.open().await;
            let now = now_ms();
            let age = |entry: &Entry| Duration::from_millis(now.saturating_sub(entry.began_ms));
            let stuck = open.iter().filter(|entry| age(entry) > STUCK_AFTER).count();
            let oldest = open.iter().map(age).max().unwrap_or_default();
            metrics::gauge!("dynabase_tier_transitions_open").set(count(open.len()));
            metrics::gauge!("dynabase_tier_transitions_stuck").set(count(stuck));
            metrics::gauge!("dynabase_tier_transition_oldest_seconds").set(oldest.as_secs_f64());
            seen.retain(|id, _| open.iter().any(|entry| entry.id == *id));
            for entry in open {
                let changed = seen
                    .get(&entry.id)
                    .is_none_or(|known| known.phase != entry.phase || known.participants != entry.participants);
                if changed && seen.len() < SEEN_MAX {
                    self.tell(&entry);
                    seen.insert(entry.id.clone(), entry.clone());
                }
                // A lease that holds is somebody's, perhaps ours.
                if mine.contains(&entry.org) {
                    continue;
                }
                let (coordinator, org) = (self.clone(), entry.org.clone());
                mine.insert(org.clone());
                work.spawn(async move {
                    let done = coordinator.take_up_if_left(&org).await;
                    (org, done)
                });
            }
        }
    }

    /// Purges the tenants whose grace is over, and the homes that tenants have left.
    async fn purge_overdue(&self) {
        for (org, act) in self.overdue().await {
            let errand = Errand { org: org.clone(), act, by: "grace" };
            let done = match self.begin_errand(&errand).await {
                Ok(entry) => self.drive(entry).await.map(drop).map_err(Refused::from),
                Err(refused) => Err(refused),
            };
            match done {
                // Another process is at it, or was.
                Ok(()) | Err(Refused::Busy { .. } | Refused::Unknown | Refused::NotDeleted | Refused::Same) => {}
                Err(refused) => tracing::warn!(%org, %refused, ?act, "what is due to go could not be taken away yet"),
            }
        }
    }

    /// As [`Self::take_up`], but not from this process' own hands.
    async fn take_up_if_left(&self, org: &OrgId) -> Result<Entry, LedgerFault> {
        let entry = self.catalog().open_transition(org).await?;
        if self.is_mine(&entry) && entry.lease_until_ms > now_ms() {
            return Err(LedgerFault::Overtaken);
        }
        self.take_up(org).await
    }

    /// Every open transition; what can't be read is logged and left.
    async fn open(&self) -> Vec<Entry> {
        let mut stream = self.catalog().open_transitions();
        let mut open = Vec::new();
        while let Some(entry) = stream.recv().await {
            match entry {
                Ok(entry) => open.push(entry),
                Err(Fault::Unavailable(what)) => tracing::warn!(what, "open tier transitions can't be read"),
                Err(fault) => tracing::error!(%fault, "a tier transition's entry is damaged"),
            }
        }
        open
    }
}

/// Small numbers are exact in a float.
fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
}
