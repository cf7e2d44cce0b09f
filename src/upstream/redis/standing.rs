//! What the server holds of a tenant beyond its keys: the caps it stands under, and how much it has.
//!
//! Redis has no caps per user: the proxy enforces them. The server keeps which ones were decided last, in the
//! platform's own database, written only by who is newer than the last writer: so that they can be read back, and a
//! paused coordinator that wakes up too late changes nothing.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    DialError, Place, Upstream,
    dial::{integer, refused, strings},
    nodes,
};
use crate::{
    tenant::{OrgId, Tier, tier::RedisLimits},
    wire::resp::{self, put_request},
};

/// Elements of a key that are weighed.
const WEIGHED: u64 = 1000;

/// Keys measured per database when its memory is estimated.
const SAMPLE: usize = 500;

/// Writes a standing unless a newer one is there: 1 it did, 0 it did not.
const SET: &str = r"local fence = tonumber(redis.call('HGET', KEYS[1], 'fence') or '0')
local stage = tonumber(redis.call('HGET', KEYS[1], 'stage') or '0')
local f, s = tonumber(ARGV[1]), tonumber(ARGV[2])
if f < fence or (f == fence and s < stage) then return 0 end
redis.call('HSET', KEYS[1], 'fence', ARGV[1], 'stage', ARGV[2], 'tier', ARGV[3], 'keys', ARGV[4], 'memory', ARGV[5], 'max_ttl', ARGV[6])
return 1";

/// The caps a tenant stands under, as the server keeps them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// The tier's name.
    pub tier: String,
    /// Keys.
    pub keys: u64,
    /// Bytes.
    pub memory: u64,
    /// Longest life of a key in seconds; 0 is for ever.
    pub max_ttl: u64,
}

impl Standing {
    /// What a tier gives.
    pub fn of(tier: Tier, limits: &RedisLimits) -> Self {
        Self {
            tier: tier.name().to_owned(),
            keys: limits.keys,
            memory: limits.memory,
            max_ttl: limits.max_ttl.map_or(0, |ttl| ttl.as_secs()),
        }
    }

    /// Room for both; the later name.
    #[must_use]
    pub fn or_more(&self, other: &Self) -> Self {
        let max_ttl = if self.max_ttl == 0 || other.max_ttl == 0 { 0 } else { self.max_ttl.max(other.max_ttl) };
        Self {
            tier: self.tier.clone(),
            keys: self.keys.max(other.keys),
            memory: self.memory.max(other.memory),
            max_ttl,
        }
    }
}

/// What a tenant has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Keys over all of its logical databases.
    pub keys: u64,
    /// Bytes that they take, from a sample of each database.
    pub bytes: u64,
}

impl Upstream {
    /// In a cluster it is in the tenant's own slot.
    fn standing_key(&self, org: &OrgId) -> String {
        match self.nodes.is_cluster() {
            true => format!("dynabase:standing:{}", String::from_utf8_lossy(&self.space(org).channel_prefix())),
            false => format!("dynabase:standing:{}", self.names.base(org)),
        }
    }

    pub(super) async fn platform_for(
        &self,
        org: &OrgId,
        ask: &[u8],
        replies: usize,
    ) -> Result<Vec<Vec<u8>>, DialError> {
        self.platform_of(nodes::slot(&self.space(org).channel_prefix()), ask, replies).await
    }

    /// What the server keeps of a tenant's caps; `None` before its first transition.
    ///
    /// # Errors
    /// The server can't be reached or refuses the platform.
    pub async fn standing(&self, org: &OrgId) -> Result<Option<Standing>, DialError> {
        let key = self.standing_key(org);
        let mut ask = Vec::new();
        put_request(&mut ask, &[b"HMGET", key.as_bytes(), b"tier", b"keys", b"memory", b"max_ttl"]);
        let answers = self.platform_for(org, &ask, 1).await?;
        refused(&answers[0])?;
        let words = strings(&answers[0]);
        let number = |at: usize| words.get(at).and_then(|text: &String| text.parse().ok());
        Ok(match (words.first(), number(1), number(2), number(3)) {
            (Some(tier), Some(keys), Some(memory), Some(max_ttl)) => {
                Some(Standing { tier: tier.clone(), keys, memory, max_ttl })
            }
            _ => None,
        })
    }

    /// Keeps a tenant's caps, not where somebody newer than `fence` and `stage` has. Says whether it did.
    ///
    /// # Errors
    /// The server can't be reached (nothing was done, or the answer was lost) or refuses the platform.
    ///
    /// # Cancel safety
    /// Dropped, it may happen yet.
    pub async fn set_standing(
        &self,
        org: &OrgId,
        standing: &Standing,
        fence: u64,
        stage: u8,
    ) -> Result<bool, DialError> {
        let numbers =
            [fence, stage.into(), 0, standing.keys, standing.memory, standing.max_ttl].map(|number| number.to_string());
        let key = self.standing_key(org);
        let words =
            ["EVAL", SET, "1", &key, &numbers[0], &numbers[1], &standing.tier, &numbers[3], &numbers[4], &numbers[5]];
        let mut ask = Vec::new();
        put_request(&mut ask, &words.map(str::as_bytes));
        let answers = self.platform_for(org, &ask, 1).await?;
        refused(&answers[0])?;
        Ok(integer(&answers[0]) == Some(1))
    }

    /// Forgets a tenant's caps.
    ///
    /// # Errors
    /// As [`Self::set_standing`].
    pub async fn forget_standing(&self, org: &OrgId) -> Result<(), DialError> {
        let key = self.standing_key(org);
        let mut ask = Vec::new();
        put_request(&mut ask, &[b"DEL", key.as_bytes()]);
        let answers = self.platform_for(org, &ask, 1).await?;
        refused(&answers[0])
    }

    /// What a tenant has now.
    ///
    /// # Errors
    /// The server can't be reached or refuses the platform.
    pub async fn usage(self: &Arc<Self>, org: &OrgId) -> Result<Usage, DialError> {
        let registry = self.space(org).registry();
        let mut ask = Vec::new();
        put_request(&mut ask, &[b"HVALS", registry.as_bytes()]);
        let answers = self.platform_for(org, &ask, 1).await?;
        refused(&answers[0])?;
        let mut usage = Usage::default();
        let indexes = strings(&answers[0]);
        if indexes.iter().any(|index| index == "0") {
            // Other tenants' keys are there too.
            let place = Place::new(Arc::clone(self), org, 0);
            for tally in place.tally(SAMPLE).await?.values() {
                let (seen, bytes) = place.weigh(&tally.sample, WEIGHED).await?;
                usage.keys += tally.keys;
                usage.bytes += bytes / seen.max(1) * tally.keys;
            }
            return Ok(usage);
        }
        for index in indexes {
            let sample = SAMPLE.to_string();
            let mut ask = Vec::new();
            put_request(&mut ask, &[b"SELECT", index.as_bytes()]);
            put_request(&mut ask, &[b"DBSIZE"]);
            put_request(&mut ask, &[b"SCAN", b"0", b"COUNT", sample.as_bytes()]);
            put_request(&mut ask, &[b"SELECT", b"0"]);
            let answers = self.platform_for(org, &ask, 4).await?;
            answers.iter().try_for_each(|answer| refused(answer))?;
            let keys = integer(&answers[1]).and_then(|keys| u64::try_from(keys).ok()).unwrap_or(0);
            usage.keys += keys;
            // Keys are bytes, not text.
            let mut names = Vec::new();
            let mut items = resp::Cursor { rest: &answers[2] };
            while let Some(item) = items.item() {
                if let resp::Item::Bulk(name) = item {
                    names.push(name);
                }
            }
            let names = names.get(1..).unwrap_or_default();
            if names.is_empty() {
                continue;
            }
            let mut ask = Vec::new();
            put_request(&mut ask, &[b"SELECT", index.as_bytes()]);
            names.iter().for_each(|name| put_request(&mut ask, &[b"MEMORY", b"USAGE", name]));
            put_request(&mut ask, &[b"SELECT", b"0"]);
            let answers = self.platform_for(org, &ask, names.len() + 2).await?;
            let bytes: u64 =
                answers[1..].iter().filter_map(|it| integer(it)).filter_map(|bytes| u64::try_from(bytes).ok()).sum();
            usage.bytes += bytes / names.len() as u64 * keys;
        }
        Ok(usage)
    }
}
