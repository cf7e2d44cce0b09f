//! A tenant's server user: made on first use, its rights grown by each logical database that the tenant uses.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bson::{Document, RawDocumentBuf, doc};
use hashbrown::HashSet;
use parking_lot::RwLock;

use super::{Error, Lease, Login, Pool, Reply, Target, Upstream, connection::AUTHENTICATION_FAILED};
use crate::tenant::{DEFAULT_NAME, Isolation, Names, OrgId, namespace::MongoNamespace};

/// Logical databases of one tenant: each costs the server files, and the tenant's user two roles.
const DATABASES_MAX: usize = 100;

/// How long a tenant without clients keeps its account.
const FRESH: Duration = Duration::from_secs(120);

/// What a tenant's user may do in its databases: documents, indexes, collections, their figures.
const ROLES: [&str; 2] = ["readWrite", "dbAdmin"];

/// `UserNotFound`.
const NO_USER: i32 = 11;

/// The number of a user that is there already.
const USER_EXISTS: i32 = 51003;

/// `TooManyDatabases` of ours; it has no number upstream.
pub const TOO_MANY_DATABASES: i32 = 13;

/// A tenant's user and its connections.
#[derive(Debug)]
pub struct Account {
    pub(super) generation: u32,
    org: OrgId,
    place: MongoNamespace,
    /// `None` where the deployment has no users.
    login: Option<Login>,
    pool: Arc<Pool>,
    /// Physical databases that the user may use.
    granted: RwLock<HashSet<String>>,
    granting: tokio::sync::Mutex<()>,
    made: Instant,
}

impl Account {
    pub(super) fn new(org: &OrgId, generation: u32, names: &Names, target: &Arc<Target>) -> Self {
        let place = names.mongodb(org, Isolation::Database);
        let login = target.login.as_ref().map(|_| Login {
            user: place.user.clone(),
            password: names.password("mongodb", org, generation),
            source: "admin".to_owned(),
            sha1: false,
        });
        let pool = Pool::new(Arc::clone(target), login.clone());
        Self {
            generation,
            org: org.clone(),
            place,
            login,
            pool,
            granted: RwLock::default(),
            granting: tokio::sync::Mutex::default(),
            made: Instant::now(),
        }
    }

    /// A connection for one request to a logical database (`None`: to none in particular).
    ///
    /// # Errors
    /// The deployment can't be reached, refuses the platform, or the tenant has too many databases.
    ///
    /// # Cancel safety
    /// Dropping it may leave the user made and granted.
    pub async fn lease(&self, upstream: &Upstream, database: Option<&str>) -> Result<Lease, Error> {
        if self.login.is_none() {
            return upstream.platform().await;
        }
        if let Some(logical) = database {
            self.open(upstream, logical).await?;
        }
        let lease = match self.pool.lease().await {
            // It was never made, or its secret was changed: by a rotation, which must not be taken back by who still
            // holds what was opened before it.
            Err(error) if error.code() == Some(AUTHENTICATION_FAILED) => {
                match upstream.newer(&self.org, self.generation) {
                    Some(newer) => newer.pool.lease().await?,
                    None => {
                        self.make(upstream).await?;
                        self.pool.lease().await?
                    }
                }
            }
            other => other?,
        };
        upstream.saw(&lease);
        Ok(lease)
    }

    /// Makes sure that the user may use a logical database.
    ///
    /// # Errors
    /// The platform is refused, or the tenant has too many databases.
    pub async fn open(&self, upstream: &Upstream, logical: &str) -> Result<(), Error> {
        match self.place.physical(logical) {
            Some(physical) if self.login.is_some() && !self.granted.read().contains(&physical) => {
                self.grant(upstream, physical).await
            }
            _ => Ok(()),
        }
    }

    async fn make(&self, upstream: &Upstream) -> Result<(), Error> {
        let Some(login) = &self.login else { return Ok(()) };
        let _one = self.granting.lock().await;
        put_user(upstream, User { login, place: &self.place }, true).await.map(drop)
    }

    /// Lets the user use one more database. A server may remember a connection's rights: older ones are not used
    /// again.
    async fn grant(&self, upstream: &Upstream, physical: String) -> Result<(), Error> {
        let Some(login) = &self.login else { return Ok(()) };
        let _one = self.granting.lock().await;
        if self.granted.read().contains(&physical) {
            return Ok(());
        }
        let has = put_user(upstream, User { login, place: &self.place }, false).await?;
        let missing = !has.contains(&physical);
        if missing && has.len() >= DATABASES_MAX {
            return Err(Error::Refused {
                code: TOO_MANY_DATABASES,
                message: format!(
                    "too many databases: {DATABASES_MAX} of {DATABASES_MAX} in use; drop one to use another"
                ),
            });
        }
        if missing {
            let roles: Vec<Document> = ROLES.iter().map(|role| doc! { "role": role, "db": &physical }).collect();
            run(upstream, doc! { "grantRolesToUser": &login.user, "roles": roles, "$db": "admin" }).await?;
            self.pool.renew();
        }
        let mut granted = self.granted.write();
        granted.extend(has);
        granted.insert(physical);
        Ok(())
    }

    pub(super) fn user(&self) -> Option<User<'_>> {
        self.login.as_ref().map(|login| User { login, place: &self.place })
    }

    pub(super) fn renew(&self) {
        self.pool.renew();
    }

    pub(super) fn tidy(&self) {
        self.pool.tidy();
    }

    pub(super) fn is_fresh(&self) -> bool {
        self.made.elapsed() < FRESH
    }
}

/// A tenant's user.
pub(super) struct User<'a> {
    login: &'a Login,
    place: &'a MongoNamespace,
}

/// Makes sure that the user is there, its password set anew if `reset`; gives the databases that it may use.
pub(super) async fn put_user(upstream: &Upstream, user: User<'_>, reset: bool) -> Result<HashSet<String>, Error> {
    let User { login, place } = user;
    let ask = doc! { "usersInfo": { "user": &login.user, "db": "admin" }, "$db": "admin" };
    let told = decode(&run(upstream, ask).await?)?;
    let users = told.get_array("users").map_err(|_| Error::Protocol("usersInfo without users"))?;
    if let Some(present) = users.first().and_then(|user| user.as_document()) {
        if reset {
            set_password(upstream, login).await?;
        }
        let roles = present.get_array("roles").map(Vec::as_slice).unwrap_or_default();
        let databases = roles.iter().filter_map(|role| role.as_document()?.get_str("db").ok().map(str::to_owned));
        return Ok(databases.collect());
    }
    let first = place.physical(DEFAULT_NAME).ok_or(Error::Login("no name for the first database"))?;
    let roles: Vec<Document> = ROLES.iter().map(|role| doc! { "role": role, "db": &first }).collect();
    let make = doc! {
        "createUser": &login.user, "pwd": login.password.expose(), "roles": roles,
        "mechanisms": ["SCRAM-SHA-256"], "$db": "admin",
    };
    match run(upstream, make).await {
        // Another process was faster.
        Err(error) if error.code() == Some(USER_EXISTS) => set_password(upstream, login).await?,
        other => drop(other?),
    }
    Ok(HashSet::from([first]))
}

async fn set_password(upstream: &Upstream, login: &Login) -> Result<(), Error> {
    let set = doc! { "updateUser": &login.user, "pwd": login.password.expose(), "$db": "admin" };
    run(upstream, set).await.map(drop)
}

/// Takes a user away that may be gone already.
pub(super) async fn drop_user(upstream: &Upstream, user: &str) -> Result<(), Error> {
    if upstream.target.login.is_none() {
        return Ok(());
    }
    match run(upstream, doc! { "dropUser": user, "$db": "admin" }).await {
        Err(error) if error.code() == Some(NO_USER) => Ok(()),
        other => other.map(drop),
    }
}

/// Drops the tenant's databases, and its documents from those that tenants share.
pub(super) async fn purge(upstream: &Upstream, org: &OrgId) -> Result<(), Error> {
    let own = upstream.place(org, Isolation::Database);
    let shared = upstream.place(org, Isolation::Filter);
    for name in upstream.databases().await? {
        if own.logical(&name).is_some() {
            run(upstream, doc! { "dropDatabase": 1, "$db": &name }).await?;
        } else if shared.logical(&name).is_some() {
            for collection in collections(upstream, &name).await? {
                let mine = vec![doc! { "q": { "org_id": org.as_str() }, "limit": 0 }];
                run(upstream, doc! { "delete": &collection, "deletes": mine, "$db": &name }).await?;
            }
        }
    }
    Ok(())
}

/// Collections (not views) of a physical database, without the server's own.
pub async fn collections(upstream: &Upstream, database: &str) -> Result<Vec<String>, Error> {
    named(upstream, database, doc! { "type": "collection" }).await
}

/// What of a physical database a filter finds by name and type, without the server's own.
pub(super) async fn named(upstream: &Upstream, database: &str, filter: Document) -> Result<Vec<String>, Error> {
    let ask = doc! { "listCollections": 1, "filter": filter, "nameOnly": true, "$db": database };
    let mut names = Vec::new();
    let mut told = decode(&run(upstream, ask).await?)?;
    loop {
        let cursor = told.get_document("cursor").map_err(|_| Error::Protocol("listCollections without a cursor"))?;
        let batch = cursor.get_array("firstBatch").or(cursor.get_array("nextBatch"));
        names.extend(
            batch
                .map(Vec::as_slice)
                .unwrap_or_default()
                .iter()
                .filter_map(|it| it.as_document()?.get_str("name").ok())
                .filter(|name| !name.starts_with("system."))
                .map(str::to_owned),
        );
        match cursor.get_i64("id") {
            Ok(id) if id != 0 => {
                let more = doc! { "getMore": id, "collection": "$cmd.listCollections", "$db": database };
                told = decode(&run(upstream, more).await?)?;
            }
            _ => return Ok(names),
        }
    }
}

/// Runs an errand of the platform's.
pub async fn run(upstream: &Upstream, command: Document) -> Result<Reply, Error> {
    let body = RawDocumentBuf::try_from(&command).map_err(|_| Error::Protocol("a command that is no BSON"))?;
    upstream.command(body.as_bytes()).await
}

/// A reply as a tree: for errands only.
pub fn decode(reply: &Reply) -> Result<Document, Error> {
    let body = reply.document()?;
    Document::from_reader(body.bytes()).map_err(|_| Error::Protocol("a reply that is no BSON"))
}
