//! Makes the collections: with rules that keep an operator's typing error out, and with indexes. May be repeated.

use bson::{Document, doc};
use futures_util::TryStreamExt;
use mongodb::{Database, IndexModel, error::Result};

use super::{KEYS, ORGS, TIERS, code};
use crate::tenant::Tier;

/// MongoDB's code for a collection that is there already.
const NAMESPACE_EXISTS: i32 = 48;

/// What was done with a collection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// Its name.
    pub collection: &'static str,
    /// It was not there before.
    pub new: bool,
    /// Why its rules could not be set, where the server has none.
    pub without_rules: Option<String>,
}

pub(super) async fn run(database: &Database) -> Result<Vec<Made>> {
    let mut made = Vec::new();
    for (collection, rules) in [(ORGS, orgs()), (TIERS, tiers()), (KEYS, keys())] {
        made.push(collection_with(database, collection, rules).await?);
    }
    // `key list --org`, and the deletion of a tenant.
    database.collection::<Document>(KEYS).create_index(IndexModel::builder().keys(doc! {"org": 1}).build()).await?;
    Ok(made)
}

async fn collection_with(database: &Database, collection: &'static str, rules: Document) -> Result<Made> {
    let there: Vec<String> = database
        .list_collections()
        .filter(doc! {"name": collection})
        .await?
        .map_ok(|one| one.name)
        .try_collect()
        .await?;
    let new = there.is_empty();
    if new {
        match database.create_collection(collection).await {
            Err(error) if code(&error) == Some(NAMESPACE_EXISTS) => {}
            done => done?,
        }
    }
    // Moderate: a document that does not fit and was there before may still be mended step by step.
    let set = doc! {
        "collMod": collection, "validator": {"$jsonSchema": rules}, "validationLevel": "moderate",
        "validationAction": "error",
    };
    let without_rules = match database.run_command(set).await {
        Ok(_) => None,
        Err(error) if code(&error).is_some() => Some(super::words(&error)),
        Err(error) => return Err(error),
    };
    Ok(Made { collection, new, without_rules })
}

fn orgs() -> Document {
    let tiers: Vec<&str> = Tier::ALL.iter().map(|tier| tier.name()).collect();
    let names =
        doc! {"bsonType": "array", "maxItems": 256, "items": {"bsonType": "string", "minLength": 1, "maxLength": 63}};
    doc! {
        "bsonType": "object",
        "required": ["_id", "tier", "status", "epoch"],
        "properties": {
            "_id": {"bsonType": "string", "pattern": "^([a-z0-9][a-z0-9_-]{0,47}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})$"},
            "tier": {"enum": tiers},
            "status": {"enum": ["active", "suspended", "deleting"]},
            "epoch": {"bsonType": "number", "minimum": 0},
            "generation": {"bsonType": "number", "minimum": 0, "maximum": 4_294_967_295_i64},
            "databases": names.clone(),
            "users": names,
            // The words that decide where data is looked for.
            "routes": {"bsonType": "object", "properties": {
                "postgres": {"enum": ["main", "neon"]},
                "sql": {"enum": ["main", "neon"]},
                "mongodb": {"enum": ["filter", "database"]},
            }},
        },
    }
}

fn tiers() -> Document {
    let tiers: Vec<&str> = Tier::ALL.iter().map(|tier| tier.name()).collect();
    doc! {"bsonType": "object", "properties": {"_id": {"enum": tiers}}}
}

fn keys() -> Document {
    doc! {
        "bsonType": "object",
        "required": ["_id", "org", "user"],
        "properties": {
            "_id": {"bsonType": "string", "pattern": "^[0-9a-f]{64}$"},
            "org": {"bsonType": "string"},
            "user": {"bsonType": "string", "minLength": 1, "maxLength": 63},
            "expires_at": {"bsonType": ["date", "string", "null"]},
        },
    }
}
