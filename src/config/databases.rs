//! The ways to the databases that are configured, and what moves tenants between tiers over all of them.

use std::sync::Arc;

use super::{Config, arm_failpoint, program_folders};
use crate::{
    catalog::Catalog,
    front::mongo::member::Member,
    tenant::{Home, Tier, Tiers},
    transition::{Coordinator, Participants, participant},
    upstream::{
        self,
        neon::Homes,
        postgres::{Dump, Provisioner},
    },
};

impl Config {
    /// What moves tenants between tiers, over every database that is configured.
    ///
    /// # Errors
    /// What is wrong with the configuration: not after [`Self::load`].
    pub fn coordinator(&self, catalog: Catalog, tiers: Tiers) -> Result<Coordinator, String> {
        arm_failpoint();
        let provisioner = Provisioner::new(self.upstream.postgres.admin()?);
        let mut postgres = participant::Postgres::new(provisioner, self.names()?);
        let neon = self.upstream.neon.homes(self.names()?)?;
        if let Some(homes) = &neon {
            let dump = Dump::new(program_folders());
            postgres = postgres.with_neon(participant::Homecoming::new(homes.clone(), self.names()?, dump));
        }
        let mut participants = Participants::none().with(Arc::new(postgres));
        if let Some(redis) = self.redis()? {
            participants = participants.with(Arc::new(participant::Redis::new(redis)));
        }
        if let Some(mongodb) = self.mongodb()? {
            participants = participants.with(Arc::new(participant::Mongo::new(mongodb)));
        }
        if self.convex()?.is_some() {
            participants = participants.with(Arc::new(participant::Convex));
        }
        participants = match neon {
            None => participants,
            Some(Homes::Server(provisioner)) => {
                participants.with(Arc::new(participant::Postgres::of_neon_homes(*provisioner, self.names()?)))
            }
            Some(Homes::Projects(projects)) => {
                participants.with(Arc::new(participant::Neon::new(projects, catalog.clone())))
            }
        };
        Ok(Coordinator::new(catalog, tiers, participants).purging(self.tenants.clone()))
    }

    /// The tiers whose new tenants would have a Neon home, if there were any: they get the main one.
    pub fn without_neon(&self, tiers: &Tiers) -> Vec<Tier> {
        let wants = |tier: &Tier| tiers.limits(*tier).postgres.home == Home::Neon;
        Tier::ALL.into_iter().filter(wants).filter(|_| !self.upstream.neon.is_on()).collect()
    }

    /// The way to MongoDB, if it is configured.
    ///
    /// # Errors
    /// What is wrong with the configuration: not after [`Self::load`].
    pub fn mongodb(&self) -> Result<Option<Arc<upstream::mongo::Upstream>>, String> {
        let names = self.names()?;
        Ok(self.upstream.mongodb.target()?.map(|target| upstream::mongo::Upstream::new(target, names)))
    }

    /// The replica set as whose primary MongoDB drivers may see us.
    pub fn mongodb_member(&self) -> Option<Member> {
        let member = self.mongodb.member().ok().flatten()?;
        if let Some(host) = self.mongodb_stranger(&member) {
            tracing::warn!(host, "the certificate is not for the host of mongodb.advertise: drivers will refuse it");
        }
        Some(member)
    }

    /// The advertised host, where the certificate shown to clients is not for it.
    pub fn mongodb_stranger<'a>(&self, member: &'a Member) -> Option<&'a str> {
        let tls = self.tls.as_ref()?;
        (!tls.is_for(member.host()).unwrap_or(true)).then(|| member.host())
    }

    /// The way to Convex deployments, if there are any.
    ///
    /// # Errors
    /// What is wrong with the configuration.
    pub fn convex(&self) -> Result<Option<Arc<upstream::convex::Upstream>>, String> {
        upstream::convex::Upstream::new(&self.upstream.convex, self.names()?)
    }

    /// The way to Redis, if it is configured.
    ///
    /// # Errors
    /// What is wrong with the configuration: not after [`Self::load`].
    pub fn redis(&self) -> Result<Option<Arc<upstream::redis::Upstream>>, String> {
        let names = self.names()?;
        let target = self.upstream.redis.target()?;
        Ok(target.map(|target| upstream::redis::Upstream::new(target, names, crate::front::redis::commands::for_acl())))
    }
}
