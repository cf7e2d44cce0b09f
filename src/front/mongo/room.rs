//! Room for collections and indexes: how many of them a tenant may bring into being at the server, which keeps files for
//! each, whoever made it.
//!
//! A request that may bring a collection into being is looked at before it is sent, unless this process knows that the
//! collection is there; what is there goes on, whatever the tier. How they are counted:
//! - in shared databases, those that came into being by the tenant's requests, noted one by one before they do, over all
//!   processes: exactly. Dropping one gives no room, as it stays at the server; its name can be used again.
//! - in databases of its own, those that the server lists at that moment, views among them. Requests that make one at the
//!   same moment do not see each other's: as many as the tier's `connections` may be too many. A tenant that drops through
//!   one process and makes anew through another that remembers may have its number once for each process.

use super::{
    commands::ReplyRule,
    prepare::namespaces,
    rewrite::{Forward, Prepare},
    tenancy::{Known, Tenancy, Way},
};
use crate::{
    refusal::{Limit, Over},
    tenant::Isolation,
    upstream::mongo::{Error, Room, Upstream},
};

/// Longest `database.collection` in bytes; the rewriting has refused longer ones.
const NAMESPACE_MAX_BYTES: usize = 255;

/// The collections that a request may bring into being, beside those of a `bulkWrite`: logical names.
fn named<'f>(forward: &'f Forward<'_>) -> impl Iterator<Item = (&'f str, &'f str)> {
    let own = forward.collection.filter(|_| forward.creates);
    let prepared = match forward.prepare {
        Some(Prepare::Images { collection } | Prepare::MergeIndex { collection }) => Some(collection),
        Some(Prepare::IndexRoom { .. }) | None => None,
    };
    own.into_iter().chain(prepared).map(|collection| (forward.database, collection)).chain(forward.target)
}

fn is_bulk(forward: &Forward<'_>) -> bool {
    forward.creates && forward.reply == ReplyRule::BulkWrite
}

/// Whether all that a request may bring into being is known to be there: so it is of most, without an allocation.
pub fn is_known(forward: &Forward<'_>, way: &Way, known: &Known) -> bool {
    !is_bulk(forward)
        && named(forward).all(|(database, collection)| {
            let mut name = [0; NAMESPACE_MAX_BYTES];
            let mut end = 0;
            for part in [way.place.prefix(), database, ".", collection] {
                let Some(place) = name.get_mut(end..end + part.len()) else { return false };
                place.copy_from_slice(part.as_bytes());
                end += part.len();
            }
            std::str::from_utf8(&name[..end]).is_ok_and(|name| known.has(name, way.isolation))
        })
}

/// The collections that a request may bring into being: physical `database.collection`.
pub fn brought(forward: &Forward<'_>, sent: &[u8], way: &Way) -> Vec<String> {
    if is_bulk(forward) {
        return namespaces(forward, sent);
    }
    let physical = |(database, collection): (&str, &str)| {
        let database = way.place.physical(database)?;
        Some(format!("{database}.{collection}"))
    };
    named(forward).filter_map(physical).collect()
}

/// The limit that keeps a tenant from bringing these collections into being. Those that are there are known from now on.
///
/// # Errors
/// The deployment can't be reached or refuses the platform.
pub async fn met(
    upstream: &Upstream,
    tenancy: &Tenancy,
    way: &Way,
    names: &[String],
    known: &Known,
) -> Result<Option<Over>, Error> {
    let absent = upstream.absent(names).await?;
    for name in names.iter().filter(|name| !absent.contains(name)) {
        known.note(name);
    }
    if absent.is_empty() {
        return Ok(None);
    }
    let policy = tenancy.policy();
    let max = policy.limits.mongodb.collections;
    let in_use = match way.isolation {
        Isolation::Filter => match upstream.note_made(tenancy.org(), &absent, max).await? {
            Room::Noted => return Ok(None),
            Room::Full(in_use) => in_use,
        },
        Isolation::Database => {
            let in_use = upstream.own_collections(tenancy.org()).await?;
            if in_use + u64::try_from(absent.len()).unwrap_or(u64::MAX) <= max.into() {
                return Ok(None);
            }
            in_use
        }
    };
    let tier = policy.tenant.tier;
    Ok(Some(Over { limit: Limit::Collections, tier, max: max.into(), in_use, retry_after: None }))
}
