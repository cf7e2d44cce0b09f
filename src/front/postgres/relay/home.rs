//! Where a session's database is: it may change its home while the session goes on.
//!
//! Between two transactions a session looks where its tenant's record says that the database is, and goes there. While it is
//! on its way nobody gets a connection ([`crate::upstream::postgres::Pool`]), and who waits looks again afterwards.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::Relay;
use crate::{
    front::postgres::Server,
    session::Session,
    tenant::{self, Tenant},
    upstream::postgres::{Home, Lease, Pool, STILL_PATIENCE, TakeError},
};

/// Pause before a database is looked for again that is no longer, or not yet, where it was looked for.
pub(super) const MOVED_PAUSE: Duration = Duration::from_millis(10);

/// One of the tenant's databases in one of its homes: the pool, and where its connections lead; `None` where there is no
/// such home, or not this database.
fn place(
    server: &Server,
    session: &Session,
    tenant: &Tenant,
    home: tenant::Home,
    database: &str,
) -> Option<(Arc<Pool>, Arc<Home>)> {
    let upstream = match home {
        tenant::Home::Main => &server.upstream,
        tenant::Home::Neon => server.neon.as_ref()?,
    };
    if !tenant.has_database_in(home.protocol(), database) {
        return None;
    }
    let pool = upstream.pool(session.slot());
    let home = upstream.home(&pool, tenant, database)?;
    Some((pool, home))
}

/// Takes a first connection to the database, in whichever home it is by then.
pub(super) async fn find(
    server: &Server,
    session: &Session,
    pool: &mut Arc<Pool>,
    home: &mut Arc<Home>,
    deadline: Instant,
) -> Result<Lease, TakeError> {
    let began = Instant::now();
    let mut deadline = deadline;
    loop {
        let taken = pool.try_take(home);
        match pool.take(home, taken, deadline).await {
            Err(TakeError::Moved) if began.elapsed() < STILL_PATIENCE => {
                tokio::time::sleep(MOVED_PAUSE).await;
                let policy = Arc::clone(&session.slot().policy());
                let now = policy.tenant.home_of(session.protocol(), &home.logical);
                if let Some(there) = place(server, session, &policy.tenant, now, &home.logical) {
                    (*pool, *home) = there;
                }
                deadline = Instant::now() + policy.limits.sql(pool.protocol()).queue_timeout;
            }
            done => return done,
        }
    }
}

impl Relay {
    /// Goes where the tenant's database is now, if it has changed its home since the last transaction.
    pub(super) fn go_home(&mut self) {
        let policy = self.session.slot().policy();
        let home = policy.tenant.home_of(self.session.protocol(), &self.home.logical);
        if home.protocol() == self.pool.protocol() {
            return;
        }
        let tenant = Arc::clone(&policy.tenant);
        drop(policy);
        // Not where it would lead nowhere: a branch, which is in one home only.
        if let Some(there) = place(&self.server, &self.session, &tenant, home, &self.home.logical) {
            (self.pool, self.home) = there;
            self.conversation.move_to(self.server.shared(&self.home.database));
        }
    }
}
