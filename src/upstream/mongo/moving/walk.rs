//! Reading all of a tenant's documents of one collection, as bytes.

use bson::doc;

use super::{BATCH, Move, MoveError, bare, id};
use crate::{
    tenant::Isolation,
    upstream::mongo::{Error, Reply, Upstream, account::run},
    wire::mongo::bson::{self as wire, Document},
};

impl Upstream {
    /// Begins to walk over a tenant's documents of one collection.
    pub(super) async fn walk(
        &self,
        it: &Move,
        isolation: Isolation,
        database: &str,
        collection: &str,
    ) -> Result<Walk, MoveError> {
        let mut ask = Vec::new();
        let open = wire::open(&mut ask);
        wire::put_str(&mut ask, "find", collection);
        let filter = wire::open_document(&mut ask, "filter");
        it.put_mine(isolation, &mut ask);
        wire::close(&mut ask, filter);
        wire::put_i32(&mut ask, "batchSize", BATCH);
        wire::put_str(&mut ask, "$db", database);
        wire::close(&mut ask, open);
        let first = self.command(&ask).await?;
        Ok(Walk { reply: Some(first), database: database.to_owned(), collection: collection.to_owned() })
    }
}

/// A document's id and its bare bytes.
pub(super) type Bare = (Vec<u8>, Vec<u8>);

/// Each document of a batch.
pub(super) fn bares(batch: &[Vec<u8>]) -> Result<Vec<Bare>, MoveError> {
    let one = |bytes: &Vec<u8>| {
        let document = Document::new(bytes)?;
        Ok((id(document)?, bare(document)?))
    };
    batch.iter().map(one).collect()
}

/// A cursor at the server.
pub(super) struct Walk {
    /// The batch that has come.
    reply: Option<Reply>,
    database: String,
    collection: String,
}

impl Walk {
    /// The next documents; `None` at the end.
    pub(super) async fn next(&mut self, upstream: &Upstream) -> Result<Option<Vec<Vec<u8>>>, MoveError> {
        let Some(reply) = self.reply.take() else { return Ok(None) };
        let body = reply.document()?;
        let cursor = body.get("cursor")?.and_then(|it| it.document()).ok_or(Error::Protocol("no cursor"))?;
        let batch = match cursor.get("firstBatch")? {
            Some(batch) => Some(batch),
            None => cursor.get("nextBatch")?,
        };
        let mut documents = Vec::new();
        for element in batch.and_then(|it| it.array()).into_iter().flatten() {
            documents.push(element?.document().ok_or(Error::Protocol("no document"))?.bytes().to_vec());
        }
        let id = cursor.get("id")?.and_then(|it| it.i64()).unwrap_or(0);
        if id != 0 {
            let more = doc! {
                "getMore": id, "collection": &self.collection, "batchSize": BATCH, "$db": &self.database,
            };
            self.reply = Some(run(upstream, more).await?);
        }
        Ok(Some(documents))
    }
}
