//! A tenant's SQL databases between their two homes: the main server and Neon.
//!
//! ```text
//! prepare  both ends are this coordinator's; the new place is filled while the tenant writes on
//!          ── no transaction of the tenant begins in any process ([`crate::catalog::Catalog::still`]) ──
//! seal     those under way have ended; the old place is closed; what has changed is carried over; both are the same
//!          ── commit: tier and home in one write, for every process; transactions go on ──
//! finish   the old place stays closed, and is kept for a while
//! restore  the old place is open; the new one is as empty as before
//! ```

use std::{collections::HashMap, time::Duration};

use parking_lot::Mutex;

use super::{Order, PREPARES, SETTLES, Trouble, neon, postgres::trouble};
use crate::{
    tenant::{Home, Limits, Names, OrgId, Tenant},
    upstream::{
        neon::Homes,
        postgres::{Dump, Filled, Mark, Move, MoveError, Provisioner},
    },
};

/// Longest pause that a move may make: what takes longer is called off, and the tenant goes on where it was.
pub const HOME_PAUSE_MAX: Duration = Duration::from_secs(60);

/// How long transactions that are under way may take to come to an end.
const STILL_WITHIN: Duration = Duration::from_secs(15);

/// Between which homes a tenant's SQL databases move with its tier.
pub fn rehomes(tenant: &Tenant, to: &Limits, has_neon: bool) -> Option<(Home, Home)> {
    let (from, to) = (tenant.home(), to.postgres.home);
    (has_neon && from != to).then_some((from, to))
}

/// Moves tenants between homes.
pub struct Homecoming {
    neon: Homes,
    names: Names,
    dump: Dump,
    /// Of moves under way: by whose fence, and what has been brought.
    filled: Mutex<HashMap<OrgId, (u64, Filled)>>,
}

/// Both ends of a move.
struct Ends {
    from: Provisioner,
    to: Provisioner,
}

impl Homecoming {
    /// Between the main server and these Neon homes; schemas are read by the program that `dump` finds.
    pub fn new(neon: Homes, names: Names, dump: Dump) -> Self {
        Self { neon, names, dump, filled: Mutex::default() }
    }

    async fn end(&self, main: &Provisioner, home: Home, tenant: &Tenant) -> Result<Provisioner, Trouble> {
        match (home, &self.neon) {
            (Home::Main, _) => Ok(main.clone()),
            (Home::Neon, Homes::Server(provisioner)) => Ok((**provisioner).clone()),
            (Home::Neon, Homes::Projects(projects)) => projects.main(tenant).await.map_err(neon::said),
        }
    }

    async fn ends(&self, main: &Provisioner, tenant: &Tenant, (from, to): (Home, Home)) -> Result<Ends, Trouble> {
        Ok(Ends { from: self.end(main, from, tenant).await?, to: self.end(main, to, tenant).await? })
    }

    fn step<'a>(&'a self, ends: &'a Ends, tenant: &'a Tenant, by: Mark, returns: bool) -> Move<'a> {
        Move { tenant, from: &ends.from, to: &ends.to, names: &self.names, by, returns }
    }

    /// Says what is in the way of a move, and how many bytes it is of. Changes nothing.
    pub async fn look(&self, main: &Provisioner, tenant: &Tenant, homes: (Home, Home)) -> Result<u64, Trouble> {
        let ends = self.ends(main, tenant, homes).await?;
        let by = Mark { fence: 0, stage: PREPARES };
        self.step(&ends, tenant, by, false).fit(&self.dump).await.map_err(told)?;
        let held = ends.from.holdings(tenant, &self.names).await.map_err(trouble)?;
        Ok(held.iter().map(|(_, bytes)| bytes).sum())
    }

    /// Whether the tenant may come into its databases at `home`.
    pub async fn is_open(&self, main: &Provisioner, tenant: &Tenant, home: Home) -> Result<bool, Trouble> {
        self.end(main, home, tenant).await?.lets_in(tenant, &self.names).await.map_err(trouble)
    }

    /// Brings what is there to the new place, while the tenant goes on.
    pub async fn prepare(&self, main: &Provisioner, order: &Order, homes: (Home, Home)) -> Result<(), Trouble> {
        let ends = self.ends(main, &order.tenant, homes).await?;
        let it = self.step(&ends, &order.tenant, order.mark(PREPARES), order.returns);
        it.fit(&self.dump).await.map_err(told)?;
        it.begin().await.map_err(told)?;
        let say = |word| order.progress.say(word);
        let mut filled = it.fill(&self.dump, &say).await.map_err(told);
        if matches!(filled, Err(Trouble::No(_))) {
            // A table may have gone while it was read.
            filled = it.fill(&self.dump, &say).await.map_err(told);
        }
        match filled {
            Ok(filled) => {
                self.filled.lock().insert(order.tenant.org.clone(), (order.fence, filled));
                Ok(())
            }
            Err(Trouble::No(why)) => {
                // A no leaves nothing behind.
                it.restore().await.map_err(told)?;
                Err(Trouble::No(why))
            }
            Err(trouble) => Err(trouble),
        }
    }

    /// The rest, while the tenant stands still.
    pub async fn seal(&self, main: &Provisioner, order: &Order, homes: (Home, Home)) -> Result<(), Trouble> {
        let ends = self.ends(main, &order.tenant, homes).await?;
        let it = self.step(&ends, &order.tenant, order.mark(PREPARES), order.returns);
        let kept = self.filled.lock().remove(&order.tenant.org).filter(|(fence, _)| *fence == order.fence);
        it.stand_still(STILL_WITHIN).await.map_err(told)?;
        let carried = it.carry(&self.dump, kept.map(|(_, filled)| filled)).await.map_err(told)?;
        it.open().await.map_err(told)?;
        order.progress.say(format!(
            "moved to {}: {} rows in {} tables are the same in both places, {} of them travelled in the pause",
            homes.1.label(),
            carried.rows,
            carried.tables,
            carried.late
        ));
        Ok(())
    }

    /// After the commit.
    pub async fn finish(&self, main: &Provisioner, order: &Order, homes: (Home, Home)) -> Result<(), Trouble> {
        let ends = self.ends(main, &order.tenant, homes).await?;
        self.step(&ends, &order.tenant, order.mark(SETTLES), order.returns).finish().await.map_err(told)
    }

    /// After an abort.
    pub async fn restore(&self, main: &Provisioner, order: &Order, homes: (Home, Home)) -> Result<(), Trouble> {
        self.filled.lock().remove(&order.tenant.org);
        let ends = self.ends(main, &order.tenant, homes).await?;
        self.step(&ends, &order.tenant, order.mark(SETTLES), order.returns).restore().await.map_err(told)
    }

    /// Takes away what the tenant has left at `home`.
    pub async fn forget(&self, main: &Provisioner, order: &Order, home: Home) -> Result<(), Trouble> {
        let place = self.end(main, home, &order.tenant).await?;
        Move::forget(&place, &order.tenant, &self.names, order.mark(SETTLES)).await.map_err(told)
    }
}

fn told(error: MoveError) -> Trouble {
    match error {
        MoveError::Overtaken => Trouble::Overtaken,
        MoveError::Unfit(why) => Trouble::No(format!("its database can't be moved: {why}")),
        busy @ MoveError::Busy { .. } => Trouble::No(busy.to_string()),
        MoveError::Server(error) => trouble(error),
    }
}
