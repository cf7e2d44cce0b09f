//! What has to be so at the server before a request is sent: the tenant's rights, room for its collections (`room`) and
//! indexes, what a shared collection needs.
//!
//! A shared collection comes into being with the first document of any tenant, and with it the platform's index over
//! `{org_id: 1, _id: 1}` ([`index::PLATFORM`]): without it a tenant's query would walk over everybody's documents. It is
//! asked for once per collection and process, and no request fails because of it.

use std::{sync::Arc, time::Duration};

use ::bson::{Document as Tree, doc};
use tokio::sync::oneshot;

use super::{
    Server,
    commands::ReplyRule,
    local::shared,
    refuse::{self, Answer, Repeat},
    rewrite::{Forward, Prepare, index},
    room,
    tenancy::{Tenancy, Way},
};
use crate::{
    refusal::{Limit, Over, Refusal},
    tenant::{Isolation, tier::INDEXES_OF_SERVER},
    upstream::mongo::{Error, Upstream, account},
    wire::mongo::bson::Document,
};

/// How long a request waits for the platform's index on its collection. On an empty collection it is there at once; on a
/// full one of before it is built while requests go on.
const INDEX_WITHIN: Duration = Duration::from_secs(1);

/// Collections of one `bulkWrite` that are looked after; the others are with their next request.
const COLLECTIONS_MAX: usize = 8;

/// Whether a request may be sent.
pub enum Ready {
    /// Yes.
    Go,
    /// The client is told that it was done: nothing that it can see depends on it.
    LeftOut,
    /// No.
    Refused(Answer),
}

/// Does what a request needs before it is sent.
///
/// # Errors
/// The deployment can't be reached or refuses the platform.
pub async fn before(
    server: &Server,
    tenancy: &Tenancy,
    way: &Way,
    forward: &Forward<'_>,
    sent: &[u8],
) -> Result<Ready, Error> {
    let upstream = &server.upstream;
    let filter = way.isolation == Isolation::Filter;
    let known = &server.registry.known;
    let new: Vec<String> = match room::is_known(forward, way, known) {
        true => Vec::new(),
        false => {
            let brought = room::brought(forward, sent, way);
            brought.into_iter().filter(|name| !known.has(name, way.isolation)).collect()
        }
    };
    if !new.is_empty() {
        if let Some(over) = room::met(upstream, tenancy, way, &new, known).await? {
            return Ok(Ready::Refused(refuse::render(&Refusal::OverLimit(over), Repeat::Plain)));
        }
        for namespace in new.into_iter().take(COLLECTIONS_MAX).filter(|_| filter) {
            platform_index(server, namespace).await;
        }
    }
    if let (true, "listIndexes" | "dropIndexes", Some(collection)) = (filter, forward.row.name, forward.collection)
        && let Some(physical) = way.place.physical(forward.database)
        && !shared::is_mine(upstream, way, tenancy.org(), &physical, collection).await?
    {
        // Whether others have it is theirs to know.
        return Ok(Ready::Refused(shared::not_there(forward.database, collection)));
    }
    match &forward.prepare {
        Some(Prepare::IndexRoom { collection }) => {
            let wished = wished_indexes(sent);
            if let Some(over) = index_room(upstream, tenancy, way, (forward.database, collection), &wished).await? {
                let full = refuse::render(&Refusal::OverLimit(over), Repeat::Plain);
                // What only makes faster is left out, as where the server itself has no more room.
                let left_out = filter && forward.reply == ReplyRule::IndexesWished;
                return Ok(if left_out { Ready::LeftOut } else { Ready::Refused(full) });
            }
        }
        Some(prepare) => prepared(upstream, tenancy, way, forward.database, prepare).await?,
        None => {}
    }
    for database in further_databases(forward, sent, way) {
        way.open(upstream, &database).await?;
    }
    Ok(Ready::Go)
}

/// Asks for the platform's index of a shared collection, the first time.
async fn platform_index(server: &Server, namespace: String) {
    let known = Arc::clone(&server.registry.known);
    if !known.index(&namespace) {
        return;
    }
    let Some((database, collection)) = namespace.split_once('.') else { return };
    let command = doc! { "createIndexes": collection, "indexes": [platform()], "$db": database };
    let upstream = Arc::clone(&server.upstream);
    let (tell, told) = oneshot::channel::<()>();
    server.later(async move {
        match account::run(&upstream, command).await {
            Ok(_) => {}
            // It will be the same the next time: the collection is a view, or has no room.
            Err(error @ Error::Refused { .. }) => {
                tracing::warn!(namespace, %error, "a shared collection without an index")
            }
            Err(error) => {
                tracing::debug!(namespace, %error, "a shared collection's index has to be asked for again");
                known.forget(&namespace);
            }
        }
        drop(tell);
    });
    let _ = tokio::time::timeout(INDEX_WITHIN, told).await;
}

/// The platform's index. Unique, as `$merge` needs it; as `_id` is, it never refuses anything.
fn platform() -> Tree {
    doc! { "key": { "org_id": 1, "_id": 1 }, "name": index::PLATFORM, "unique": true }
}

/// The names of the indexes that a rewritten `createIndexes` makes.
fn wished_indexes(sent: &[u8]) -> Vec<String> {
    let Some((head, payload)) = sent.split_first_chunk() else { return Vec::new() };
    let Ok(message) = crate::wire::mongo::Message::parse(head, payload) else { return Vec::new() };
    let list = message.body.get("indexes").ok().flatten().and_then(|list| list.array());
    let name = |index: Document<'_>| Some(index.get("name").ok()??.str()?.to_owned());
    list.into_iter().flatten().map_while(Result::ok).filter_map(|it| name(it.document()?)).collect()
}

/// The limit that keeps a tenant from having these indexes on a collection as well.
async fn index_room(
    upstream: &Upstream,
    tenancy: &Tenancy,
    way: &Way,
    (database, collection): (&str, &str),
    wished: &[String],
) -> Result<Option<Over>, Error> {
    let policy = tenancy.policy();
    let max = policy.limits.mongodb.indexes(way.isolation);
    // The server's own number then.
    if way.isolation == Isolation::Database && max >= INDEXES_OF_SERVER {
        return Ok(None);
    }
    let Some(physical) = way.place.physical(database) else { return Ok(None) };
    let listed =
        account::run(upstream, doc! { "listIndexes": collection, "cursor": { "batchSize": 1000 }, "$db": physical })
            .await;
    let listed = match listed {
        // Not there yet.
        Err(error) if error.code() == Some(26) => Tree::new(),
        listed => account::decode(&listed?)?,
    };
    let names = listed.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch"));
    let names: Vec<&str> =
        names.into_iter().flatten().filter_map(|it| it.as_document()?.get_str("name").ok()).collect();
    let mark = format!("{}{}", index::MARK, tenancy.org());
    let own = |name: &&&str| match way.isolation {
        Isolation::Filter => name.ends_with(&mark),
        Isolation::Database => **name != index::ID,
    };
    let in_use = names.iter().filter(own).count();
    let new = wished.iter().filter(|name| *name != index::ID && !names.contains(&name.as_str())).count();
    if new == 0 || in_use + new <= usize::try_from(max).unwrap_or(usize::MAX) {
        return Ok(None);
    }
    let in_use = u64::try_from(in_use).unwrap_or(u64::MAX);
    let tier = policy.tenant.tier;
    Ok(Some(Over { limit: Limit::Indexes, tier, max: max.into(), in_use, retry_after: None }))
}

/// Logical databases beyond the request's own that a bulk write names: the tenant's user needs its rights on them.
fn further_databases(forward: &Forward<'_>, sent: &[u8], way: &Way) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for name in namespaces(forward, sent) {
        if let Some(logical) = name.split_once('.').and_then(|(physical, _)| way.place.logical(physical))
            && !found.iter().any(|known| known == logical)
        {
            found.push(logical.to_owned());
        }
    }
    found
}

/// The physical `database.collection` that a bulk write names.
pub(super) fn namespaces(forward: &Forward<'_>, sent: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    if forward.reply != ReplyRule::BulkWrite {
        return found;
    }
    let Some((head, payload)) = sent.split_first_chunk() else { return found };
    let Ok(message) = crate::wire::mongo::Message::parse(head, payload) else { return found };
    let mut note = |namespace: Document<'_>| {
        let name = namespace.get("ns").ok().flatten().and_then(|it| it.str().map(str::to_owned));
        found.extend(name);
    };
    for (_, documents) in message.sections().iter().filter(|(name, _)| *name == "nsInfo") {
        let mut documents = *documents;
        while let Ok((document, rest)) = Document::split(documents) {
            note(document);
            documents = rest;
        }
    }
    if let Ok(Some(list)) = message.body.get("nsInfo") {
        list.array().into_iter().flatten().map_while(Result::ok).filter_map(|it| it.document()).for_each(note);
    }
    found
}

/// Makes a shared collection what the request needs it to be; once per collection and process.
async fn prepared(
    upstream: &Upstream,
    tenancy: &Tenancy,
    way: &Way,
    database: &str,
    prepare: &Prepare<'_>,
) -> Result<(), Error> {
    let Some(physical) = way.place.physical(database) else { return Ok(()) };
    let (collection, command): (&str, Tree) = match prepare {
        Prepare::Images { collection } => {
            let on = doc! { "enabled": true };
            (collection, doc! { "collMod": *collection, "changeStreamPreAndPostImages": on, "$db": &physical })
        }
        Prepare::IndexRoom { .. } => return Ok(()),
        Prepare::MergeIndex { collection } => {
            (collection, doc! { "createIndexes": *collection, "indexes": [platform()], "$db": &physical })
        }
    };
    let what = (
        std::mem::discriminant(prepare) == std::mem::discriminant(&Prepare::Images { collection: "" }),
        format!("{physical}.{collection}"),
    );
    if tenancy.is_prepared(&what) {
        return Ok(());
    }
    match account::run(upstream, command.clone()).await {
        // Not there yet: made first.
        Err(error) if error.code() == Some(26) => {
            let make = doc! { "create": collection, "$db": &physical };
            match account::run(upstream, make).await {
                Err(error) if error.code() == Some(48) => {}
                other => drop(other?),
            }
            account::run(upstream, command).await?;
        }
        other => drop(other?),
    }
    tenancy.set_prepared(what);
    Ok(())
}
