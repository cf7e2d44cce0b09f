//! The collection `tiers`: what differs from `tiers.toml`, one document a tier, merged over it key by key. A document
//! that does not fit changes nothing, and is reported once.

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;
use parking_lot::Mutex;
use toml::{Table, Value};

use super::{Inner, TIERS, document::UPDATED_AT};
use crate::tenant::{Tier, Tiers};

/// Fields of a document that say nothing about limits.
const NOTES: [&str; 5] = ["_id", "note", "version", "created_at", UPDATED_AT];

/// Longest look at the collection, which holds four documents.
const READ_MAX: i64 = 100;

/// Deepest nesting of a document: `tier.postgres.rate.burst` is three.
const DEPTH_MAX: usize = 8;

/// The file's text, and what the collection says beside it.
#[derive(Default)]
pub(super) struct Overrides(Mutex<Both>);

#[derive(Default)]
struct Both {
    text: String,
    overrides: Table,
    /// What was last reported, so that it is reported once.
    reported: String,
}

impl Overrides {
    /// Takes a new text of `tiers.toml`; gives the tiers under the overrides that are known. Where those no longer fit,
    /// the text alone counts.
    pub(super) fn over(&self, text: &str) -> Result<Tiers, String> {
        let mut both = self.0.lock();
        let alone = Tiers::parse(text).map_err(|faults| faults.join("; "))?;
        both.text = text.to_owned();
        match merged(&both.text, &both.overrides) {
            Ok(tiers) => Ok(tiers),
            Err(what) => {
                tracing::error!(what, "the collection tiers does not fit tiers.toml, which alone counts");
                Ok(alone)
            }
        }
    }

    /// Takes what the collection says now. Gives the tiers if that changes them, and whether something was at fault.
    fn take(&self, documents: &[Document]) -> (Option<Tiers>, Option<String>) {
        let mut overrides = Table::new();
        let mut faults = Vec::new();
        for document in documents {
            match one(document) {
                Ok((tier, table)) => {
                    overrides.insert(tier.name().to_owned(), Value::Table(table));
                }
                Err(what) => faults.push(what),
            }
        }
        let mut both = self.0.lock();
        let mut tiers = None;
        if overrides != both.overrides {
            match merged(&both.text, &overrides) {
                Ok(merged) => {
                    both.overrides = overrides;
                    tiers = Some(merged);
                }
                Err(what) => faults.push(what),
            }
        }
        let what = faults.join("; ");
        let news = !what.is_empty() && what != both.reported;
        both.reported = what.clone();
        (tiers, news.then_some(what))
    }
}

/// Reads the collection; gives the tiers if that changes them.
pub(super) async fn read(inner: &Inner) -> mongodb::error::Result<Option<Tiers>> {
    let found = inner.database.collection::<Document>(TIERS).find(doc! {}).limit(READ_MAX).await?;
    let documents: Vec<Document> = found.try_collect().await?;
    let (tiers, fault) = inner.overrides.take(&documents);
    if let Some(what) = fault {
        inner.health.count_damaged();
        tracing::warn!(what, "damaged document in the collection tiers; the last good limits serve");
    }
    Ok(tiers)
}

fn one(document: &Document) -> Result<(Tier, Table), String> {
    let id = document.get_str("_id").map_err(|_| "its _id is no tier".to_owned())?;
    let tier: Tier = id.parse()?;
    let mut table = Table::new();
    for (name, bson) in document.iter().filter(|(name, _)| !NOTES.contains(&name.as_str())) {
        table.insert(name.clone(), value(bson, 0).ok_or_else(|| format!("{tier}.{name}: a value of a wrong type"))?);
    }
    Ok((tier, table))
}

fn value(bson: &Bson, depth: usize) -> Option<Value> {
    if depth > DEPTH_MAX {
        return None;
    }
    Some(match bson {
        Bson::String(text) => Value::String(text.clone()),
        Bson::Boolean(is) => Value::Boolean(*is),
        Bson::Int32(number) => Value::Integer((*number).into()),
        Bson::Int64(number) => Value::Integer(*number),
        Bson::Double(number) if number.fract() == 0.0 && number.abs() < 9e15 => Value::Integer(*number as i64),
        Bson::Double(number) => Value::Float(*number),
        Bson::Document(inner) => {
            let fields = inner.iter().map(|(name, bson)| Some((name.clone(), value(bson, depth + 1)?)));
            Value::Table(fields.collect::<Option<Table>>()?)
        }
        _ => return None,
    })
}

fn merged(text: &str, overrides: &Table) -> Result<Tiers, String> {
    let mut tiers: Table = toml::from_str(text).map_err(|error| error.message().to_owned())?;
    merge(&mut tiers, overrides);
    let text = toml::to_string(&tiers).map_err(|error| error.to_string())?;
    Tiers::parse(&text).map_err(|faults| faults.join("; ").replace('\n', " "))
}

/// Puts `over` over `under`: tables key by key, all else whole.
fn merge(under: &mut Table, over: &Table) {
    for (name, value) in over {
        match (under.get_mut(name), value) {
            (Some(Value::Table(under)), Value::Table(over)) => merge(under, over),
            _ => {
                under.insert(name.clone(), value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../../../config/tiers.toml");

    #[test]
    fn a_document_counts_over_the_file_key_by_key() {
        let overrides = Overrides::default();
        let plain = overrides.over(SHIPPED).expect("the shipped file");
        assert_eq!(plain.limits(Tier::Free).postgres.connections, 5);
        let over = doc! {"_id": "FREE", "note": "spring", "postgres": {"connections": 7.0, "storage": "1GB"}};
        let (tiers, fault) = overrides.take(std::slice::from_ref(&over));
        let tiers = tiers.expect("something changed");
        assert_eq!(fault, None);
        let postgres = &tiers.limits(Tier::Free).postgres;
        assert_eq!((postgres.connections, postgres.storage, postgres.client_sockets), (7, 1 << 30, 50));
        assert_eq!(tiers.limits(Tier::Pro), plain.limits(Tier::Pro));
        assert!(overrides.take(std::slice::from_ref(&over)).0.is_none(), "the same again is no change");
        // A new file is under it, too; without the document the file counts.
        let again = overrides.over(&SHIPPED.replacen("client_sockets = 50", "client_sockets = 60", 1)).expect("good");
        assert_eq!(
            (again.limits(Tier::Free).postgres.client_sockets, again.limits(Tier::Free).postgres.connections),
            (60, 7)
        );
        let (tiers, _) = overrides.take(&[]);
        assert_eq!(tiers.expect("something changed").limits(Tier::Free).postgres.connections, 5);
    }

    #[test]
    fn a_document_that_does_not_fit_changes_nothing_and_is_told_once() {
        let overrides = Overrides::default();
        overrides.over(SHIPPED).expect("the shipped file");
        for bad in [
            doc! {"_id": "GOLD", "postgres": {"connections": 7}},
            doc! {"_id": 7},
            doc! {"_id": "FREE", "postgres": {"connections": 1.5}},
            doc! {"_id": "FREE", "postgres": {"conections": 7}},
            doc! {"_id": "FREE", "postgres": {"connections": [1]}},
            doc! {"_id": "FREE", "postgres": 7},
            doc! {"_id": "FREE", "mongodb": {"rate": {"burst": 0}}},
        ] {
            let (tiers, fault) = overrides.take(std::slice::from_ref(&bad));
            assert!(tiers.is_none() && fault.is_some(), "{bad}");
            assert_eq!(overrides.take(std::slice::from_ref(&bad)).1, None, "{bad}");
        }
    }
}
