//! What the deployment holds of a tenant: all that [`Upstream::remove`] would purge.

use bson::{Document, doc};

use super::{
    Error, Upstream,
    account::{collections, decode, run},
};
use crate::tenant::{Isolation, OrgId};

/// One place with documents of a tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Whether it is a database of the tenant's own, else a collection that tenants share.
    pub own: bool,
    /// The tenant's name for it: the database, or `database.collection`.
    pub name: String,
    /// Documents.
    pub documents: u64,
    /// Their bytes, where the server says so: of a database of its own.
    pub bytes: Option<u64>,
}

impl Upstream {
    /// Every place with documents of a tenant.
    ///
    /// # Errors
    /// The deployment can't be reached or refuses the platform.
    pub async fn holdings(&self, org: &OrgId) -> Result<Vec<Held>, Error> {
        let own = self.place(org, Isolation::Database);
        let shared = self.place(org, Isolation::Filter);
        let mut held = Vec::new();
        for name in self.databases().await? {
            if let Some(logical) = own.logical(&name) {
                let stats = decode(&run(self, doc! { "dbStats": 1, "$db": &name }).await?)?;
                held.push(Held {
                    own: true,
                    name: logical.to_owned(),
                    documents: number(&stats, "objects").unwrap_or(0),
                    bytes: number(&stats, "dataSize"),
                });
            } else if let Some(logical) = shared.logical(&name) {
                for collection in collections(self, &name).await? {
                    let count = doc! { "count": &collection, "query": { "org_id": org.as_str() }, "$db": &name };
                    let documents = number(&decode(&run(self, count).await?)?, "n").unwrap_or(0);
                    if documents > 0 {
                        held.push(Held { own: false, name: format!("{logical}.{collection}"), documents, bytes: None });
                    }
                }
            }
        }
        Ok(held)
    }

    /// The names of all physical databases.
    pub(super) async fn databases(&self) -> Result<Vec<String>, Error> {
        let told = decode(&run(self, doc! { "listDatabases": 1, "nameOnly": true, "$db": "admin" }).await?)?;
        let list = told.get_array("databases").map_err(|_| Error::Protocol("listDatabases without databases"))?;
        Ok(list.iter().filter_map(|it| it.as_document()?.get_str("name").ok().map(str::to_owned)).collect())
    }
}

/// A whole number in whichever form the server sends it.
pub(super) fn number(document: &Document, key: &str) -> Option<u64> {
    let value = document.get(key)?;
    let whole = value.as_i64().or_else(|| value.as_i32().map(i64::from));
    // Figures of servers are floats that hold whole numbers.
    #[allow(clippy::cast_possible_truncation, reason = "counts of documents are far below 2^53")]
    whole.or_else(|| value.as_f64().map(|float| float as i64)).and_then(|number| u64::try_from(number).ok())
}
