//! Writes of a move that a later coordinator shuts out: each is one transaction with a look at whose move it is.
//!
//! ```text
//! coordinator   begin: touch the standing where its fence is not above mine ─► the batch ─► commit
//! a later one   end the earlier one's session ─► raise the fence in the standing: conflicts with every open look
//! ```
//!
//! A process that was stopped anywhere in between, or a batch that the network brings late, finds its transaction ended or
//! its look in vain: nothing of it is written. A deployment without transactions (a standalone server) has only the look.

use std::sync::atomic::{AtomicI64, Ordering};

use aws_lc_rs::digest;
use bson::{Bson, Document, doc};

use super::{Move, MoveError};
use crate::{
    catalog::ledger::failpoint::reach,
    tenant::OrgId,
    upstream::mongo::{
        Error, Reply, Upstream,
        account::{decode, run},
        holdings::number,
        standing::{COLLECTION, DATABASE},
    },
};

/// `IllegalOperation`: transaction numbers are for replica sets.
const NO_TRANSACTIONS: i32 = 20;

/// `WriteConflict`, `NoSuchTransaction`: nothing was written, and the next look says whether it may be.
const WRITE_CONFLICT: i32 = 112;
const ENDED: i32 = 251;

/// Attempts at one batch.
const TRIES: usize = 5;

/// Transactions of this process: a session's numbers only grow.
static NUMBER: AtomicI64 = AtomicI64::new(1);

/// The session of the move with this fence: its successor knows it too.
fn session(base: &str, fence: u64) -> Bson {
    let told = digest::digest(&digest::SHA256, format!("move {base} {fence}").as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&told.as_ref()[..16]);
    bson::Uuid::from_bytes(bytes).into()
}

/// A command with more fields at its end.
fn with(command: &[u8], more: &Document) -> Result<Vec<u8>, MoveError> {
    let more = bson::serialize_to_vec(more).map_err(|_| Error::Protocol("a command that is no BSON"))?;
    let inner = |bytes: &[u8]| bytes.get(4..bytes.len().saturating_sub(1)).unwrap_or_default().to_vec();
    let mut whole = vec![0; 4];
    whole.extend(inner(command));
    whole.extend(inner(&more));
    whole.push(0);
    let length = i32::try_from(whole.len()).map_err(|_| Error::Protocol("a batch that is too long"))?;
    whole[..4].copy_from_slice(&length.to_le_bytes());
    Ok(whole)
}

impl Upstream {
    /// Runs a write, given without a write concern, unless a later coordinator has been here.
    ///
    /// # Errors
    /// [`MoveError::Overtaken`]: it was not written; the deployment's: it may have been.
    ///
    /// # Cancel safety
    /// Dropped, it may have been written, but never after a later coordinator has come.
    pub(super) async fn fenced(&self, org: &OrgId, fence: u64, write: &[u8]) -> Result<Reply, MoveError> {
        let mut last = Err(MoveError::Upstream(Error::Slow));
        for _ in 0..TRIES {
            last = self.attempt(org, fence, write).await;
            match &last {
                Err(MoveError::Upstream(error)) => match error.code() {
                    Some(NO_TRANSACTIONS) => {
                        self.fence(org, fence).await?;
                        let write = with(write, &doc! { "writeConcern": { "w": "majority" } })?;
                        return Ok(self.command(&write).await?);
                    }
                    Some(WRITE_CONFLICT | ENDED) => {}
                    _ => break,
                },
                _ => break,
            }
        }
        last
    }

    async fn attempt(&self, org: &OrgId, fence: u64, write: &[u8]) -> Result<Reply, MoveError> {
        let base = self.names.base(org);
        let within = doc! {
            "lsid": { "id": session(&base, fence) }, "txnNumber": NUMBER.fetch_add(1, Ordering::Relaxed),
            "autocommit": false,
        };
        let not_above = doc! { "_id": &base, "fence": { "$lte": i64::try_from(fence).unwrap_or(i64::MAX) } };
        let mut look = doc! {
            "update": COLLECTION, "updates": [{ "q": not_above, "u": { "$inc": { "batches": 1_i64 } } }],
            "startTransaction": true, "$db": DATABASE,
        };
        look.extend(within.clone());
        let looked = decode(&run(self, look).await?)?;
        if number(&looked, "n") != Some(1) {
            self.end(&within, "abortTransaction").await.ok();
            return Err(MoveError::Overtaken);
        }
        reach("in a batch");
        let written = match self.command(&with(write, &within)?).await {
            Ok(reply) if decode(&reply)?.get_array("writeErrors").is_ok_and(|errors| !errors.is_empty()) => {
                Err(Ok(reply))
            }
            Ok(reply) => Ok(reply),
            Err(error) => Err(Err(error)),
        };
        match written {
            Ok(reply) => {
                self.end(&within, "commitTransaction").await?;
                Ok(reply)
            }
            Err(not) => {
                // Where it does not arrive, the server ends it by itself, or the successor does.
                self.end(&within, "abortTransaction").await.ok();
                Ok(not?)
            }
        }
    }

    async fn end(&self, within: &Document, how: &str) -> Result<(), Error> {
        let mut end = doc! { how: 1 };
        end.extend(within.clone());
        end.extend(doc! { "writeConcern": { "w": "majority" }, "$db": "admin" });
        run(self, end).await.map(drop)
    }

    /// Ends what an earlier coordinator of the move has open, so that nobody waits for it to run out.
    ///
    /// # Errors
    /// The deployment can't be reached.
    pub async fn shut_out(&self, it: &Move) -> Result<(), MoveError> {
        let Some(before) = self.standing_fence(&it.org).await?.filter(|before| *before < it.fence) else {
            return Ok(());
        };
        let theirs = doc! { "id": session(&self.names.base(&it.org), before) };
        match run(self, doc! { "killSessions": [theirs], "$db": "admin" }).await {
            // A server that does not know it ends the transaction when its time is over.
            Ok(_) | Err(Error::Refused { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fence_has_a_session_of_its_own_that_its_successor_knows() {
        assert_eq!(session("t_a", 5), session("t_a", 5));
        assert!(session("t_a", 5) != session("t_a", 6) && session("t_a", 5) != session("t_b", 5));
    }

    #[test]
    fn fields_are_added_at_the_end() {
        let bytes = bson::serialize_to_vec(&doc! { "a": 1 }).expect("BSON");
        let both = with(&bytes, &doc! { "b": true }).expect("short");
        assert_eq!(Document::from_reader(both.as_slice()).expect("BSON"), doc! { "a": 1, "b": true });
    }
}
