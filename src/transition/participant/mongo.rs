//! MongoDB's part: the caps that the deployment keeps of the tenant. MongoDB has none per user; the proxy's table enforces
//! them, on live sessions too. And the tenant's documents, where the tiers have them in different places:
//!
//! ```text
//! prepare  rounds of copying while the tenant writes, until little is left
//! seal     no request of the tenant is under way in any process; a last round; counts and digests are equal
//!          ── commit: with the tier the place changes, for every process ──
//! finish   requests go on once a process has the new policy; when all have, the place of before is cleared
//! restore  requests go on; the place to go to is cleared
//! ```

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;

use super::{Holding, Look, Order, PREPARES, Participant, ReadBack, Reply, SETTLES, Stage, Trouble, over, value};
use crate::{
    catalog::ledger::failpoint::reach,
    tenant::{Isolation, Limits, OrgId, Protocol, Tenant},
    upstream::mongo::{Error, Hold, Known, Move, MoveError, Standing, Upstream},
};

/// The tenants' MongoDB deployment.
pub struct Mongo {
    upstream: Arc<Upstream>,
    /// Of moves under way: by whose fence, and what is known to be in the place to go to.
    known: Mutex<HashMap<OrgId, (u64, Known)>>,
}

impl Mongo {
    /// The deployment behind `upstream`.
    pub fn new(upstream: Arc<Upstream>) -> Self {
        Self { upstream, known: Mutex::default() }
    }

    /// Copies in rounds while the tenant writes, until little is left for the standstill.
    async fn copy(&self, it: &Move, order: &Order) -> Result<(), Trouble> {
        let mut known = self.upstream.known(it).await.map_err(move_trouble)?;
        let mut before = u64::MAX;
        for turn in 1..=ROUNDS_MAX {
            let say = |count| order.progress.say(format!("round {turn}: {count} documents"));
            match self.upstream.carry_over(it, &mut known, &say).await {
                // What does not become less is no less at the standstill, whose own limit decides.
                Ok(round) if turn > 1 && (round.changed <= LITTLE || round.changed > before / 4 * 3) => break,
                Ok(round) => before = round.changed,
                Err(MoveError::Unfit(why)) => {
                    // A no leaves nothing behind.
                    self.upstream.clear(&it.org, it.to, it.fence).await.map_err(move_trouble)?;
                    return Err(Trouble::No(format!("its documents can't be moved: {why}")));
                }
                Err(error) => return Err(move_trouble(error)),
            }
        }
        self.known.lock().insert(it.org.clone(), (it.fence, known));
        Ok(())
    }

    /// Lets the tenant's requests go on in every process that has the policy of `epoch`; returns when all have.
    async fn release(&self, order: &Order, epoch: u64) -> Result<(), Trouble> {
        self.known.lock().remove(&order.tenant.org);
        let hold = Hold { org: order.tenant.org.clone(), fence: order.fence, until: Some(epoch) };
        self.hold(&hold).await?;
        reach("after a release");
        match self.upstream.agreed(&hold, RELEASED_WITHIN).await.map_err(trouble)? {
            true => Ok(()),
            false => Err(Trouble::Unknown("a process has not the decided policy yet".into())),
        }
    }

    /// Clears the place where nobody looks for the documents any more, then the notice.
    async fn leave(&self, it: &Move, place: Isolation, order: &Order) -> Result<(), Trouble> {
        self.upstream.clear(&it.org, place, it.fence).await.map_err(move_trouble)?;
        reach("after a place was cleared");
        self.upstream.drop_hold(&order.tenant.org, order.fence).await.map_err(trouble)
    }

    async fn hold(&self, hold: &Hold) -> Result<(), Trouble> {
        match self.upstream.put_hold(hold).await.map_err(trouble)? {
            true => Ok(()),
            false => Err(Trouble::Overtaken),
        }
    }

    async fn set(&self, order: &Order, standing: &Standing, stage: u8) -> Result<(), Trouble> {
        if let Some(it) = moving(order) {
            self.upstream.shut_out(&it).await.map_err(move_trouble)?;
        }
        match self.upstream.set_standing(&order.tenant.org, standing, order.fence, stage).await.map_err(trouble)? {
            true => Ok(()),
            false => Err(Trouble::Overtaken),
        }
    }
}

/// How long the tenant's requests may be kept waiting until all have come to an end.
const STILL_WITHIN: Duration = Duration::from_secs(5);

/// How long is waited for the processes' new policies; then the call is repeated.
const RELEASED_WITHIN: Duration = Duration::from_secs(10);

/// Rounds of copying, and how little one may have changed to be the last before the standstill.
const ROUNDS_MAX: usize = 20;
const LITTLE: u64 = 200;

/// What has to be moved.
fn moving(order: &Order) -> Option<Move> {
    let (from, to) = order.moves()?;
    Some(Move { org: order.tenant.org.clone(), from, to, fence: order.fence })
}

fn move_trouble(error: MoveError) -> Trouble {
    match error {
        MoveError::Overtaken => Trouble::Overtaken,
        MoveError::Unfit(why) => Trouble::No(format!("its documents can't be moved: {why}")),
        MoveError::Upstream(error) => trouble(error),
    }
}

fn trouble(error: Error) -> Trouble {
    match &error {
        Error::Lost(cause) if cause.kind() == std::io::ErrorKind::ConnectionRefused => {
            Trouble::Failed(error.to_string())
        }
        Error::NoPrimary => Trouble::Failed(error.to_string()),
        Error::Lost(_) | Error::Slow | Error::Protocol(_) => Trouble::Unknown(error.to_string()),
        // Retryable by its own word (a primary that steps down, a node that starts, a transaction that met another one or
        // has ended): it may have been done.
        Error::Refused { code: 11600 | 11602 | 10107 | 13435 | 13436 | 189 | 91 | 64 | 112 | 251, .. } => {
            Trouble::Unknown(error.to_string())
        }
        Error::Refused { .. } | Error::Login(_) | Error::Scram(_) => Trouble::No(error.to_string()),
    }
}

/// The caps before: what the server keeps, or, before the first transition, what the tier gives.
fn prior(order: &Order) -> Standing {
    serde_json::from_value(order.prior.clone()).unwrap_or_else(|_| Standing::of(order.tenant.tier, &order.from.mongodb))
}

impl Participant for Mongo {
    fn database(&self) -> Protocol {
        Protocol::Mongodb
    }

    fn look<'a>(&'a self, tenant: &'a Tenant, to: &'a Limits) -> Reply<'a, Look> {
        Box::pin(async move {
            let prior = self.upstream.standing(&tenant.org).await.map_err(trouble)?;
            let own = self.upstream.own_collections(&tenant.org).await.map_err(trouble)?;
            let made = self.upstream.made(&tenant.org).await.map_err(trouble)?.len();
            // In one of both places it has its documents.
            let used = own.max(u64::try_from(made).unwrap_or(u64::MAX));
            let over = over(Protocol::Mongodb, "collections", used, to.mongodb.collections.into());
            Ok(Look { prior: value(&prior), over: over.into_iter().collect() })
        })
    }

    fn prepare<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            let room = prior(order).or_more(&Standing::of(order.to_tier, &order.to.mongodb));
            if let Some(it) = moving(order) {
                // Before anything is done, so that a no has done nothing.
                self.upstream.fit(&it).await.map_err(move_trouble)?;
                self.upstream.note_moved(&it).await.map_err(move_trouble)?;
            }
            self.set(order, &room, PREPARES).await?;
            match moving(order) {
                Some(it) => self.copy(&it, order).await,
                None => Ok(()),
            }
        })
    }

    fn seal<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            let Some(it) = moving(order) else { return Ok(()) };
            let hold = Hold { org: it.org.clone(), fence: it.fence, until: None };
            reach("before a hold");
            self.hold(&hold).await?;
            reach("after a hold");
            if !self.upstream.agreed(&hold, STILL_WITHIN).await.map_err(trouble)? {
                return Err(Trouble::No("a request or a transaction of the tenant did not come to an end".into()));
            }
            let kept = self.known.lock().remove(&it.org).filter(|(fence, _)| *fence == it.fence);
            let mut known = match kept {
                Some((_, known)) => known,
                None => self.upstream.known(&it).await.map_err(move_trouble)?,
            };
            let round = self.upstream.carry_over(&it, &mut known, &|_| {}).await.map_err(move_trouble)?;
            if round.source != self.upstream.sum(&it).await.map_err(move_trouble)? {
                return Err(Trouble::No("the documents in both places are not the same".into()));
            }
            let digest = data_encoding::HEXLOWER.encode(&round.source.1[..8]);
            order.progress.say(format!("{} documents in both places, digest {digest}", round.source.0));
            Ok(())
        })
    }

    fn finish<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            if moving(order).is_some() {
                self.release(order, order.tenant.epoch + 1).await?;
            }
            let wanted = Standing::of(order.to_tier, &order.to.mongodb);
            self.set(order, &wanted, SETTLES).await?;
            match self.upstream.standing(&order.tenant.org).await.map_err(trouble)? {
                Some(found) if found == wanted => {
                    if let Some(it) = moving(order) {
                        self.leave(&it, it.from, order).await?;
                    }
                    Ok(())
                }
                _ => Err(Trouble::Unknown("the server does not keep what was set".into())),
            }
        })
    }

    fn restore<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            self.set(order, &prior(order), SETTLES).await?;
            if let Some(it) = moving(order) {
                self.release(order, order.tenant.epoch).await?;
                self.leave(&it, it.to, order).await?;
            }
            Ok(())
        })
    }

    fn live<'a>(&'a self, stage: Stage, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            let Tenant { org, generation, .. } = &order.tenant;
            let done = match stage {
                Stage::Make | Stage::DropNext => self.upstream.provision(org, *generation).await,
                // A user has one password. Who comes with the next one before it is set sets it, as who comes with a
                // present one that the server has forgotten does; open connections keep going.
                Stage::TakeNext => self.upstream.ping().await,
                Stage::DropPrevious => self.upstream.provision(org, generation + 1).await,
                Stage::Purge => self.upstream.remove(org, true).await,
                Stage::Forget => Ok(()),
            };
            done.map_err(trouble)
        })
    }

    fn holdings<'a>(&'a self, tenant: &'a Tenant) -> Reply<'a, Vec<Holding>> {
        Box::pin(async move {
            let held = self.upstream.holdings(&tenant.org).await.map_err(trouble)?;
            let places = held.into_iter().map(|held| Holding {
                what: format!("{} {}", if held.own { "database" } else { "shared collection" }, held.name),
                count: Some(held.documents),
                bytes: held.bytes,
            });
            Ok(places.collect())
        })
    }

    fn read_back<'a>(&'a self, tenant: &'a Tenant, limits: &'a Limits) -> Reply<'a, ReadBack> {
        Box::pin(async move {
            let wanted = Standing::of(tenant.tier, &limits.mongodb);
            let found = self.upstream.standing(&tenant.org).await.map_err(trouble)?;
            // Before its first transition a tenant has no caps of its own there: the proxy's are the tier's.
            let agrees = found.as_ref().is_none_or(|found| *found == wanted);
            Ok(ReadBack { agrees, expected: value(&wanted), found: value(&found) })
        })
    }
}
