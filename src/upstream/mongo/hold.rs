//! A standstill of one tenant's requests in every process: the notice, who is there, who has complied.
//!
//! ```text
//! coordinator: hold ──────────► every process: lets nobody new in, waits for who is inside, says so ──► all have
//! coordinator: release, epoch ► every process: once its policy is of that epoch, lets in, says so ────► all have
//! ```
//!
//! A process gives a sign of life once a second, to the deployment that it would write to: who can't is no danger, and a
//! process that has not read the notices for [`STALE`] lets nobody in. Both are written by the platform's user.
//!
//! A notice only gets later ([`Hold::ack`]): one that is over stays, closed, so that a coordinator that was stopped and goes
//! on after its successor has finished can neither hold the tenant again nor let it in while somebody else holds it.

use std::{collections::HashMap, time::Duration};

use bson::{Document, doc};
use tokio::time::Instant;

use super::{
    Error, Upstream,
    account::{decode, run},
    standing::DATABASE,
};
use crate::{
    catalog::ledger::{is_dead, this_process},
    tenant::OrgId,
};

/// The notices.
const HOLDS: &str = "holds";

/// Signs of life, and what each process has complied with.
const PROCESSES: &str = "processes";

/// After this long without having read the notices a process lets nobody in.
pub const STALE: Duration = Duration::from_secs(3);

/// A process without a sign of life for this long is not waited for: it has let nobody in for a while.
const GONE: Duration = Duration::from_secs(6);

/// Notices read at once; there is one for each tenant whose documents are on the move.
const HOLDS_MAX: i32 = 1000;

/// `DuplicateKey`: a later notice is there.
const DUPLICATE_KEY: i32 = 11000;

/// Pause between two looks at who has complied.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// One notice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Whose requests.
    pub org: OrgId,
    /// The coordinator's fence.
    pub fence: u64,
    /// Go on, once the policy is of this epoch; `None`: stand still.
    pub until: Option<u64>,
}

impl Hold {
    /// What a process says that has complied, and the order of notices: later ones are larger.
    pub fn ack(&self) -> i64 {
        let fence = i64::try_from(self.fence).unwrap_or(i64::MAX / 2).min(i64::MAX / 2 - 1);
        fence * 2 + i64::from(self.until.is_some())
    }
}

impl Upstream {
    /// Every notice that is up.
    ///
    /// # Errors
    /// The deployment can't be reached or refuses the platform.
    pub async fn holds(&self) -> Result<Vec<Hold>, Error> {
        let ask = doc! {
            "find": HOLDS, "filter": { "open": true }, "limit": HOLDS_MAX, "batchSize": HOLDS_MAX, "singleBatch": true,
            "$db": DATABASE,
        };
        let read = |it: &Document| {
            let number = |key| it.get_i64(key).ok().and_then(|number| u64::try_from(number).ok());
            Some(Hold { org: OrgId::parse(it.get_str("org").ok()?)?, fence: number("fence")?, until: number("until") })
        };
        Ok(self.first_batch(ask).await?.iter().filter_map(read).collect())
    }

    /// Puts up a notice, or replaces an earlier one. False: a later one is there, or was.
    ///
    /// # Errors
    /// As [`Self::holds`].
    pub async fn put_hold(&self, hold: &Hold) -> Result<bool, Error> {
        // Every process asks for the open ones all the time, and the closed ones become many.
        let open = doc! { "key": { "open": 1 }, "name": "open", "sparse": true };
        run(self, doc! { "createIndexes": HOLDS, "indexes": [open], "$db": DATABASE }).await?;
        let long = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let mut held = doc! { "org": hold.org.as_str(), "fence": long(hold.fence), "order": hold.ack(), "open": true };
        held.extend(hold.until.map(|epoch| ("until".to_owned(), long(epoch).into())));
        // Where a later one stands, the filter finds nothing and the insertion meets it.
        let put = doc! {
            "findAndModify": HOLDS, "query": { "_id": self.names.base(&hold.org), "order": { "$lte": hold.ack() } },
            "update": held, "upsert": true, "writeConcern": { "w": "majority" }, "$db": DATABASE,
        };
        match run(self, put).await {
            Ok(_) => Ok(true),
            Err(error) if error.code() == Some(DUPLICATE_KEY) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Takes a notice down, unless it is a later coordinator's.
    ///
    /// # Errors
    /// As [`Self::holds`].
    pub async fn drop_hold(&self, org: &OrgId, fence: u64) -> Result<(), Error> {
        let last = Hold { org: org.clone(), fence, until: Some(0) }.ack();
        let mine = doc! {
            "q": { "_id": self.names.base(org), "order": { "$lte": last } },
            "u": { "$set": { "order": last }, "$unset": { "open": "" } },
        };
        run(self, doc! { "update": HOLDS, "updates": [mine], "writeConcern": { "w": "majority" }, "$db": DATABASE })
            .await
            .map(drop)
    }

    /// Forgets a tenant's notice: the next tenant of this name begins anew.
    pub(super) async fn forget_hold(&self, org: &OrgId) -> Result<(), Error> {
        let mine = doc! { "q": { "_id": self.names.base(org) }, "limit": 1 };
        run(self, doc! { "delete": HOLDS, "deletes": [mine], "$db": DATABASE }).await.map(drop)
    }

    /// This process' sign of life, with the notices that it has complied with.
    ///
    /// # Errors
    /// As [`Self::holds`].
    pub async fn beat(&self, acks: &[(OrgId, i64)]) -> Result<(), Error> {
        let acks: Vec<Document> = acks.iter().map(|(org, ack)| doc! { "org": org.as_str(), "ack": ack }).collect();
        let update = doc! {
            "q": { "_id": this_process() }, "u": { "$inc": { "beat": 1_i64 }, "$set": { "acks": acks } }, "upsert": true,
        };
        run(self, doc! { "update": PROCESSES, "updates": [update], "$db": DATABASE }).await.map(drop)
    }

    /// Waits until every process has complied with a notice. False: not in time.
    ///
    /// # Errors
    /// As [`Self::holds`].
    pub async fn agreed(&self, hold: &Hold, within: Duration) -> Result<bool, Error> {
        let deadline = Instant::now() + within;
        let mut seen: HashMap<String, (i64, Instant)> = HashMap::new();
        loop {
            let ask = doc! { "find": PROCESSES, "batchSize": HOLDS_MAX, "$db": DATABASE };
            let mut all = true;
            for process in self.first_batch(ask).await? {
                let (Ok(name), Ok(beat)) = (process.get_str("_id"), process.get_i64("beat")) else { continue };
                let acks = process.get_array("acks").map(Vec::as_slice).unwrap_or_default();
                let complied = acks.iter().filter_map(|it| it.as_document()).any(|it| {
                    it.get_str("org").is_ok_and(|org| org == hold.org.as_str())
                        && it.get_i64("ack").is_ok_and(|ack| ack >= hold.ack())
                });
                if complied {
                    continue;
                }
                let now = Instant::now();
                let last = seen.entry(name.to_owned()).or_insert((beat, now));
                if last.0 != beat {
                    *last = (beat, now);
                }
                if is_dead(name) || last.1.elapsed() > GONE {
                    let gone = doc! { "q": { "_id": name, "beat": beat }, "limit": 1 };
                    run(self, doc! { "delete": PROCESSES, "deletes": [gone], "$db": DATABASE }).await?;
                    continue;
                }
                all = false;
            }
            if all || Instant::now() >= deadline {
                return Ok(all);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// The documents of a reply's first batch.
    async fn first_batch(&self, ask: Document) -> Result<Vec<Document>, Error> {
        let told = decode(&run(self, ask).await?)?;
        let batch = told.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch"));
        let batch = batch.map_err(|_| Error::Protocol("a cursor without a batch"))?;
        Ok(batch.iter().filter_map(|it| it.as_document().cloned()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_notice_is_not_complied_with_by_an_earlier_word() {
        let org = OrgId::parse("acme").expect("an id");
        let hold = |fence, until| Hold { org: org.clone(), fence, until }.ack();
        assert!(hold(1, None) < hold(1, Some(1)) && hold(1, Some(9)) < hold(2, None));
        assert!(hold(u64::MAX, None) < hold(u64::MAX, Some(1)));
    }
}
